"""A rank of a training run, from joining the world to leaving it with the agreed code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

import torch
from rich.console import Console

from pretrain.config.load import LoadedConfig
from pretrain.config.run import RunConfig
from pretrain.engine.distributed import RankEnvironment, World, join, shutdown
from pretrain.engine.evaluator import Evaluator
from pretrain.engine.setup import Claim, claim_run, prepare
from pretrain.errors import ExitCode, PretrainError
from pretrain.monitor.logs import setup_logging
from pretrain.runfolder.status import Status

EvaluatorFactory = Callable[[RunConfig], Sequence[Evaluator]]
AfterRun = Callable[[LoadedConfig], None]
_log = logging.getLogger("pretrain")


def run_rank(loaded: LoadedConfig, own: RankEnvironment, make_evaluators: EvaluatorFactory, *, log_level: str = "info",
             after: AfterRun | None = None) -> NoReturn:
    """Train as one rank and leave the process. `after` runs on rank 0 once a run is done (reports, say)."""
    world: World | None = None
    claim: Claim | None = None
    code, message, together = ExitCode.INTERNAL, "", False
    try:
        setup_logging(log_level, None, own.rank)
        _threads(loaded.config)
        world = join(own, timeout_s=loaded.config.launch.timeout)
        claim = claim_run(loaded, world)
        console = setup_logging(log_level, claim.folder.log_file, world.rank)
        code = _train(loaded, world, claim, make_evaluators, console)
        together = True
        if code is ExitCode.DONE and after is not None and world.is_main:
            after(loaded)
    except PretrainError as error:
        code, message = error.code, str(error)
        if own.rank == 0 or not error.agreed:
            print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        code, message = ExitCode.INTERNAL, f"{type(error).__name__}: {error}"
        print(f"rank {own.rank}: {traceback.format_exc()}", file=sys.stderr)
    _record(claim, code, message)
    shutdown(code, world if together else None)
    raise AssertionError("unreachable")


def _train(loaded: LoadedConfig, world: World, claim: Claim, make_evaluators: EvaluatorFactory,
           console: Console) -> ExitCode:
    beating = claim.lease.beating() if claim.lease is not None else contextlib.nullcontext()
    with beating:
        trainer = prepare(loaded, world, claim, make_evaluators(loaded.config), console)
        trainer.stop.install()
        try:
            code = trainer.train()
        finally:
            trainer.loader.close()
            if trainer.reporter.progress is not None:
                trainer.reporter.progress.close()
            if trainer.reporter.writer is not None:
                trainer.reporter.writer.close()
            claim.status = trainer.reporter.status
        if claim.status is not None:
            claim.status = replace(claim.status, step=trainer.state.step, k=trainer.state.k,
                                   total_steps=trainer.total_steps, reason=trainer.reporter.reason)
    return code


def _record(claim: Claim | None, code: ExitCode, message: str) -> None:
    """Write the verdict and give the lease back, as far as the disk allows."""
    if claim is None or claim.lease is None:
        return
    status: Status = claim.status or Status(fence=claim.lease.fence)
    with contextlib.suppress(OSError, PretrainError):
        status.ended(code, status.reason or message.split(":")[0][:80], message).write(claim.folder)
    with contextlib.suppress(OSError, PretrainError):
        claim.lease.release()


def _threads(config: RunConfig) -> None:
    """CPU threads of this rank: as configured, else as the launcher said, else what torch takes."""
    if config.launch.threads:
        torch.set_num_threads(config.launch.threads)
    elif "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(max(1, int(os.environ["OMP_NUM_THREADS"])))
    if config.engine.deterministic:
        torch.use_deterministic_algorithms(True)
