"""`pretrain export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.eval import BestOption, Dtype, DtypeOption, StepOption
from pretrain.cli.options import LogLevel, LogLevelOption


def export(run: Annotated[str, typer.Argument(metavar="RUN", show_default=False, help="Run or checkpoint folder.")],
           step: StepOption = None, best: BestOption = False, dtype: DtypeOption = Dtype.FP32,
           out: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/export/step-N-DTYPE.")] = None,
           native: Annotated[bool, typer.Option("--native/--wrapped", help="As the plain transformers architecture, "
                                                "where there is one, or as ours.")] = True,
           overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that is there.")] = False,
           log_level: LogLevelOption = LogLevel.WARNING) -> None:
    """Write safetensors, config, tokenizer and model card, and prove them.

    The result is loaded in a fresh process, which compares logits on stored tokens, before it appears under its name.
    Exit codes: 0 done, 2 bad input, 3 corrupt checkpoint, 5 the export is not the model (then nothing is left behind).
    """
    from transformers.utils import logging

    from evaluation.export import export_run
    logging.disable_progress_bar()
    done = export_run(run, step=step, best=best, dtype=dtype.value, out=out, native=native, overwrite=overwrite)
    typer.echo(f"{done.folder}: in a fresh process logits differ by at most {done.largest_difference:.2g} of the "
               f"largest ({dtype.value})")
