"""`pretrain export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.eval import BestOption, Dtype, DtypeOption, StepOption
from pretrain.cli.options import LogLevel, LogLevelOption
from pretrain.errors import UserError


class Layout(StrEnum):
    """Of the files."""

    HUGGINGFACE = "huggingface"
    SEED = "seed"


def export(run: Annotated[str, typer.Argument(metavar="RUN", show_default=False, help="Run or checkpoint folder.")],
           step: StepOption = None, best: BestOption = False, dtype: DtypeOption = Dtype.FP32,
           out: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export/step-N-DTYPE, of layout "
                                                    "seed RUN/export/seed.")] = None,
           native: Annotated[bool, typer.Option("--native/--wrapped", help="As the plain transformers architecture, "
                                                "where there is one, or as ours.")] = True,
           head: Annotated[str | None, typer.Option(metavar="HEAD[:DIM]", show_default=False, help="Encoders: the "
                                                    "vector that sentence-transformers gives; default: the "
                                                    "model's.")] = None,
           layout: Annotated[Layout, typer.Option(help="seed: best_sts.pt, best_val.pt, final.pt and step-N.pt of all "
                                                  "checkpoints of a run, in fp32.")] = Layout.HUGGINGFACE,
           overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
           log_level: LogLevelOption = LogLevel.WARNING) -> None:
    """Write safetensors, config, tokenizer and model card, and prove them.

    The result is loaded in a fresh process, which compares logits (of encoders: vectors) on stored tokens, before it
    appears under its name. Folders of encoders open in sentence-transformers.
    Exit codes: 0 done, 2 bad input, 3 corrupt checkpoint, 5 the export is not the model (then nothing is left behind).
    """
    from transformers.utils import logging
    logging.disable_progress_bar()
    if layout is Layout.SEED:
        from evaluation.seed_layout import export_seed_layout
        if step is not None or best or head is not None or dtype is not Dtype.FP32:
            raise UserError("--layout seed writes all checkpoints of a run, whole and in fp32; leave out --step, "
                            "--best, --head and --dtype")
        written = export_seed_layout(run, out=out, overwrite=overwrite)
        for file in written.files:
            typer.echo(str(written.folder / file))
        for name, why in written.missing.items():
            typer.echo(f"not written: {name} ({why})")
        return
    from evaluation.export import export_run
    done = export_run(run, step=step, best=best, dtype=dtype.value, out=out, native=native, overwrite=overwrite,
                      head=head)
    typer.echo(f"{done.folder}: in a fresh process {done.compared} differ by at most {done.largest_difference:.2g} of "
               f"the largest ({dtype.value})")
