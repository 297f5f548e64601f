"""What follows a start of a job: pure decisions from what the run folder and the controller say.

| the run ended with | then |
|---|---|
| 0, done | finished |
| 2 refused, 3 corrupt, 4 diverged, 5 a check failed, 130 | finished: a person has to look |
| 85 for a time limit, a preemption or USR1 | again |
| 85 for a control file, max_hours, SIGTERM from elsewhere | finished: someone wanted it to stop |
| 1 an internal error, 6 a hang, or no verdict at all | again |

*Again* holds up to `slurm.max_restarts`, and only where the start made progress (a newer checkpoint, or a step that no
start had reached before) or something outside of the run ended it: a preemption, a machine that failed, a batch script
that was lost. Steps are numbered anew at each restart, so the srun of a lost script, once its machine is reachable
again, ends "its" step by a number that now belongs to the next start.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config.slurm import SlurmConfig
from pretrain.errors import ExitCode
from pretrain.runfolder.status import Status
from slurm.facts import Facts, cause_of
from slurm.history import Action, Start

_PERSON = {ExitCode.USER, ExitCode.CORRUPT, ExitCode.DIVERGED, ExitCode.FAILED_CHECK, ExitCode.INTERRUPTED}
_BY_SIGNAL = ("time limit", "preempted", "asked")
"""Causes after which a run that saved is to go on."""
_KILLED = 128 + signal.SIGKILL
"""What srun answers where a task was killed."""
_REACH = 3
"""Starts after a lost one that its srun may still hit: it ends "its" step when ranks fail, and again when it is told to
end itself."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a start ended."""

    code: int
    """Exit code of the run: of its status where this start wrote one, else what srun's code tells."""
    reason: str
    reached: int
    progressed: bool
    struck: bool = False
    """Killed soon after a start whose batch script was lost, which may have done it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the batch script does next."""

    action: Action
    reason: str
    code: int
    """Exit code of the job."""


def outcome_of(start: Start, earlier: Sequence[Start], status: Status | None, saved: int, srun_code: int) -> Outcome:
    """How `start` ended. `status` counts where this start wrote it; `saved` is the step of the newest checkpoint."""
    own = status if status is not None and status.fence > start.fence else None
    reached = own.step if own is not None else 0
    before = max([start.step, *(max(other.reached, other.step) for other in earlier)])
    progressed = saved > start.step or reached > before
    if own is not None and own.code is not None:
        told = own.message if own.code not in (ExitCode.DONE, ExitCode.STOPPED) else ""
        return Outcome(own.code, told or own.reason or own.state, reached, progressed)
    known = {int(code) for code in ExitCode}
    code = srun_code if srun_code in known and own is None else int(ExitCode.INTERNAL)
    what = "ended without a verdict" if own is not None else "ended before it took the run folder"
    struck = srun_code == _KILLED and any(other.action == "leave" for other in earlier[-_REACH:])
    return Outcome(code, f"{what} (srun: {srun_code})", reached, progressed, struck)


def decide(slurm: SlurmConfig, start: Start, outcome: Outcome, facts: Facts) -> Decision:
    """What follows `start`. Pure."""
    code, reason = outcome.code, outcome.reason
    if code == ExitCode.DONE:
        return Decision("finish", "done", code)
    now = cause_of(facts, start.restart, slurm.save_before)
    if "cancelled" in (now, start.cause):
        return Decision("finish", "cancelled", code)
    if now == "requeued by Slurm":
        return Decision("leave", _lost(start, facts) or now, code)
    if code in _PERSON:
        return Decision("finish", reason, code)
    preempted = start.cause == "preempted" or facts.preempted
    if code == ExitCode.STOPPED:
        cause = "preempted" if preempted else start.cause or ("asked" if reason == "SIGUSR1" else "")
        if cause not in _BY_SIGNAL:
            return Decision("finish", f"stopped: {reason}", code)
        reason = f"{cause} ({reason})" if cause == "asked" else cause
    else:
        reason = _lost(start, facts) or (f"{start.cause}, not saved in time" if start.cause in _BY_SIGNAL else reason)
    outside = preempted or outcome.struck or bool(_lost(start, facts))
    return _again(slurm, start, reason, code, worth_it=outcome.progressed or outside)


def _again(slurm: SlurmConfig, start: Start, reason: str, code: int, *, worth_it: bool) -> Decision:
    if not worth_it:
        return Decision("finish", f"{reason}; this start made no progress", code)
    if slurm.restart == "never":
        return Decision("finish", f"{reason}; slurm.restart is never", code)
    if slurm.restart == "chain":
        return Decision("next", reason, code)
    if start.restart >= slurm.max_restarts:
        return Decision("finish", f"{reason}; slurm.max_restarts {slurm.max_restarts} reached", code)
    return Decision("requeue", reason, code)


def _lost(start: Start, facts: Facts) -> str:
    """Machines of this start that have failed."""
    failed = facts.failed(start.nodes)
    return f"node failure: {', '.join(failed)}" if failed else ""


def may_begin(slurm: SlurmConfig, job: str, restart: int, chain: Sequence[str], history: Sequence[Start]) -> str | None:
    """Why start number `restart` of `job` has nothing to do, None where it goes on. Pure.

    `chain`: jobs that were submitted together with it, itself included.
    """
    ended = [start for start in history if start.job in {job, *chain} and start.action is not None]
    last = ended[-1] if ended else None
    if last is not None and last.action == "finish" and (last.code == ExitCode.DONE or last.job != job):
        return f"job {last.job} ended: {last.reason}"
    if slurm.restart == "requeue" and restart > slurm.max_restarts:
        return f"slurm.max_restarts {slurm.max_restarts} reached"
    return None
