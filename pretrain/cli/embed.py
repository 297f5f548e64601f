"""`pretrain embed`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.eval import BestOption, Dtype, DtypeOption, RemoteCodeOption, StepOption, TargetArgument
from pretrain.errors import ExitCode, UserError

if TYPE_CHECKING:
    from pretrain.engine.distributed import World
    from pretrain.engine.ranks import RankEnvironment

SUFFIXES = (".npy", ".npz", ".parquet", ".jsonl")
_MEET_S, _ENCODE_S = 300.0, 24 * 3600.0
"""Seconds for all processes to meet, and for the slowest to encode its share."""


def embed(target: TargetArgument, *,
          texts: Annotated[list[str], typer.Option("--texts", help="A text; may be repeated.", default_factory=list)],
          file: Annotated[Path | None, typer.Option("--file", help="Texts: one a line (.txt), or a column of .csv, "
                                                    ".tsv, .jsonl, .parquet.")] = None,
          column: Annotated[str, typer.Option(help="Column of the file with the texts.")] = "text",
          out: Annotated[Path | None, typer.Option(help="File of vectors: .npy, .npz (ids, vectors), .parquet or "
                                                   ".jsonl; default: vectors.npy.")] = None,
          head: Annotated[str | None, typer.Option(help="Head of the model; default: its default one.")] = None,
          dim: Annotated[int | None, typer.Option(min=1, help="First coordinates, at length 1; default: all.")] = None,
          max_length: Annotated[int | None, typer.Option(min=2, help="Tokens a text; default: the model's.")] = None,
          batch_size: Annotated[int | None, typer.Option(min=1, help="Texts a forward.")] = None,
          nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine; each takes a share.")] = 1,
          dtype: DtypeOption = Dtype.FP32, step: StepOption = None, best: BestOption = False,
          trust_remote_code: RemoteCodeOption = False) -> None:
    """Vectors of texts, of length 1, in the order of the texts.

    Exit codes: 0 done, 2 bad input, 3 corrupt files.
    """
    from pretrain.engine.launcher import launch, worker_command
    from pretrain.engine.ranks import rank_environment
    out = out or Path("vectors.npy")
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: must end in {', '.join(SUFFIXES)}")
    if bool(texts) == (file is not None):
        raise UserError("give --texts or --file, one of them")
    own = rank_environment(os.environ)
    if own is None and nproc > 1:
        raise typer.Exit(launch(worker_command("pretrain.cli.main", *sys.argv[1:]), nproc))
    from transformers.utils import logging

    from evaluation.embed import embed_texts, read_texts, write_vectors
    from evaluation.embedding_eval import Encoder
    from evaluation.target import open_target
    logging.disable_progress_bar()
    given = texts or read_texts(file or Path(), column)
    opened = open_target(target, dtype=dtype.value, step=step, best=best, trust_remote_code=trust_remote_code)
    encoder = Encoder.of(opened, max_length=max_length, batch_size=batch_size)
    world = _join(own)
    place = (world.rank, world.size) if world is not None else (0, 1)
    name, vectors = embed_texts(encoder, given, head, dim, place)
    if place[0] == 0:
        write_vectors(out, given, vectors)
        norms = vectors.norm(dim=1)
        print(f"{out}: {len(vectors)} x {vectors.shape[1]} ({name}), lengths {norms.min():.4f} to {norms.max():.4f}")
    if world is not None:
        from pretrain.engine.distributed import shutdown
        shutdown(ExitCode.DONE, world)


def _join(own: RankEnvironment | None) -> World | None:
    """The other processes, where there are any."""
    if own is None or own.world_size == 1:
        return None
    from pretrain.engine.distributed import join
    return join(own, timeout_s=_MEET_S, collective_s=_ENCODE_S)
