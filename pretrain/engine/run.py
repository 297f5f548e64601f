"""A rank of a training run, from joining the world to leaving it with the agreed code."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from pretrain.config.load import LoadedConfig
from pretrain.config.run import RunConfig
from pretrain.engine.claim import BranchRequest, Claim, claim_run
from pretrain.engine.distributed import Failure, World, join, shutdown
from pretrain.engine.evaluator import Evaluator
from pretrain.engine.outofmemory import memory_told
from pretrain.engine.preflight import rank_table
from pretrain.engine.ranks import RankEnvironment, forget_meeting, meet
from pretrain.engine.setup import prepare
from pretrain.engine.stopping import StopSignals
from pretrain.engine.watch import watching
from pretrain.errors import ExitCode, PretrainError
from pretrain.monitor.logs import setup_logging
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.status import Status

EvaluatorFactory = Callable[[RunConfig], Sequence[Evaluator]]
AfterRun = Callable[[LoadedConfig], None]
_LOST_PEER = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process exited", re.IGNORECASE)
"""What gloo and NCCL say where another rank has died."""
_AFTER_HANG_S = 120.0
"""Seconds by which a collective outlives the discovery of a hang."""
_log = logging.getLogger("pretrain")


def run_rank(loaded: LoadedConfig, own: RankEnvironment, signals: StopSignals, make_evaluators: EvaluatorFactory, *,
             log_level: str = "info", branch: BranchRequest | None = None, after: AfterRun | None = None) -> NoReturn:
    """Train as one rank and leave the process. `after` runs on rank 0 once a run is done (reports, say)."""
    world: World | None = None
    claim: Claim | None = None
    failure: Failure | None = None
    code = ExitCode.INTERNAL

    def taken(now: Claim) -> None:
        nonlocal claim
        claim = now

    def leave_early() -> None:
        told = world.known_failure() if world is not None else None
        if told is not None:  # torchrun and srun end the others with a signal once one rank has failed
            _record(claim, told.code, f"error on rank {told.rank}", told.line)
            shutdown(told.code)
        _record(claim, ExitCode.STOPPED, signals.reason, "")
        signals.leave_at_once()

    signals.leave = leave_early
    try:
        setup_logging(log_level, None, own.rank)
        _threads(loaded.config)
        settings = loaded.config.launch
        meeting = RunFolder(Path(loaded.config.runs_dir) / loaded.config.name).meeting_dir
        own = meet(own, meeting, os.environ, timeout_s=settings.timeout)
        # A collective that failed before a hang is found would hide which rank it is.
        world = join(own, timeout_s=settings.timeout, preflight_s=settings.preflight, collective_s=max(
            settings.timeout, settings.hang_timeout + _AFTER_HANG_S) if settings.hang_timeout else None)
        if world.is_main:
            forget_meeting(meeting)
        claim = claim_run(loaded, world, branch, taken=taken)
        console = setup_logging(log_level, claim.folder.log_file, world.rank)
        if world.is_main:
            _log.info("command: pretrain %s", shlex.join(sys.argv[1:]))
        if world.is_main and world.size > 1:
            for line in rank_table(world.peers):
                _log.info("%s", line)
        code = _train(loaded, world, claim, signals, make_evaluators, console)
    except Exception as error:
        failure = _failed(error, own.rank, world)
        code = failure.code
    if failure is None:
        _record(claim, code, "", "")
        if code is ExitCode.DONE and after is not None and own.rank == 0:
            _afterwards(after, loaded)
    else:
        _record(claim, code, f"error on rank {failure.rank}", failure.line)
        if world is not None:
            world.recorded()
    shutdown(code, world if failure is None else None)
    raise AssertionError("unreachable")


def _train(loaded: LoadedConfig, world: World, claim: Claim, signals: StopSignals, make_evaluators: EvaluatorFactory,
           console: Console) -> ExitCode:
    beating = claim.lease.beating() if claim.lease is not None else contextlib.nullcontext()
    with beating:
        evaluators = world.all_or_none(lambda: make_evaluators(loaded.config))
        trainer = prepare(loaded, world, claim, evaluators, console, signals)
        signals.hold()
        try:
            with watching(trainer, claim), memory_told(lambda: trainer.reporter.clock.interrupted, trainer.config,
                                                       trainer.batch, trainer.engine.precision, world):
                code = trainer.train()
        finally:
            trainer.loader.close()
            trainer.keeper.close()
            if trainer.reporter.progress is not None:
                trainer.reporter.progress.close()
            if trainer.reporter.writer is not None:
                trainer.reporter.writer.close()
            if trainer.reporter.status is not None:
                claim.status = replace(trainer.reporter.status, step=trainer.state.step, k=trainer.state.k,
                                       total_steps=trainer.total_steps, reason=trainer.reporter.reason,
                                       rewinds=len(trainer.state.rewinds))
    return code


def _failed(error: Exception, rank: int, world: World | None) -> Failure:
    """Why the run fails, as far as this rank can tell. Tells the user, unless another rank does.

    The first rank to fail tells the others, who then fail of its absence: they leave with its code and without a
    traceback of their own.
    """
    known = isinstance(error, PretrainError)
    line = str(error) if known else f"{type(error).__name__}: {error}"
    lost = not known and _LOST_PEER.search(line) is not None
    if lost:
        line = f"rank {rank} lost its connection to another rank"
    mine = Failure(rank, error.code if isinstance(error, PretrainError) else ExitCode.INTERNAL, line)
    _log.error("%s", line, exc_info=None if known else error, extra={"console": False})
    if isinstance(error, PretrainError) and error.agreed:
        if rank == 0:
            print(f"error: {line}", file=sys.stderr)
        return mine
    first = world.first_failure(line, mine.code) if world is not None else mine
    own = first is not None and first.rank == rank
    if known or (own and lost):
        if own or first is None or first.line != line:
            print(f"error: {line}", file=sys.stderr)
    elif own:
        print(f"rank {rank}: {''.join(traceback.format_exception(error))}", file=sys.stderr)
    else:
        print(f"rank {rank} ends: rank {first.rank if first else 0} has failed", file=sys.stderr)
    return first or mine


def _afterwards(after: AfterRun, loaded: LoadedConfig) -> None:
    """What follows a run that is done cannot undo it."""
    try:
        after(loaded)
    except Exception as error:
        _log.warning("the run is done, but what follows failed: %s: %s", type(error).__name__, error)


def _record(claim: Claim | None, code: ExitCode, reason: str, message: str) -> None:
    """Write the verdict and give the lease back, as far as the disk allows."""
    if claim is None or claim.lease is None:
        return
    status: Status = claim.status or Status(fence=claim.lease.fence)
    with contextlib.suppress(OSError, PretrainError):
        status.ended(code, reason or status.reason, message or status.message).write(claim.folder)
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
