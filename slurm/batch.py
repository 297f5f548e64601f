"""What the batch script runs on its first machine: `python -P -m slurm.batch RUN COMMAND`.

    begin              what went before, and whether anything is left to do
    interrupted NAME   the script was sent a signal; with --ask, ask the ranks through the run folder
    end CODE           what follows
    machines           which machines are bad, from what they found out themselves
    nodes, endpoint    how many machines to use; an address for torchrun

Reads what the controller says from standard input, writes to the run folder, and answers with its exit code. Asks no
Slurm program itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from pretrain.config.load import load_run_config
from pretrain.config.run import RunConfig
from pretrain.config.slurm import SlurmConfig
from pretrain.engine.ranks import expand_nodes
from pretrain.errors import ConfigError, ExitCode, PretrainError, UserError
from pretrain.runfolder.control import request
from pretrain.runfolder.holder import fences
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.lease import LEASE_TIMEOUT, live_holder
from pretrain.runfolder.status import Status
from slurm.codes import NOTHING_TO_DO, REQUEUE
from slurm.decide import decide, may_begin, outcome_of
from slurm.facts import Facts, cause_of
from slurm.history import Action, Start, note, read_history, read_submissions
from slurm.machines import SILENT, judge, read_results
from slurm.nodecheck import results_dir
from slurm.script import frozen_config

_ASK = "save_and_stop"
_LEAST_SPACE = 1 << 20
"""Bytes without which a disk counts as full: neither a status nor a line of a log can be trusted to be there."""


def begin(folder: RunFolder, slurm: SlurmConfig, facts: Facts) -> int:
    """Write down that this start begins, and what became of the one before where it could not say so itself."""
    job, restart = _job()
    history = read_history(folder)
    _close_lost(folder, history, job, restart, facts)
    history = read_history(folder)
    idle = may_begin(slurm, job, restart, _chain(folder, job), history)
    if idle is not None:
        _say(f"nothing to do: {idle}")
        done = any(start.action == "finish" and start.code == ExitCode.DONE for start in history)
        return NOTHING_TO_DO if done else int(ExitCode.INTERNAL)  # so that what waits for its success is not started
    if any(start.asked for start in history[-1:]):  # it was meant for a start that is over
        (folder.control_dir / _ASK).unlink(missing_ok=True)
    _await_lease(folder, job)
    step = _newest_step(folder)
    (folder.slurm_dir / "log" / f"{job}-{restart}").mkdir(parents=True, exist_ok=True)
    note(folder, "begin", job, restart, nodes=os.environ.get("SLURM_JOB_NODELIST", ""), begun=time.time(), step=step,
         fence=max([0, *fences(folder.lease_dir)]))
    before = f"; before it: {history[-1].reason}" if history else ""
    _say(f"start {len(history) + 1} of this run: job {job}, restart {restart}, on "
         f"{os.environ.get('SLURM_JOB_NODELIST', '?')}, from {f'step {step}' if step else 'the beginning'}{before}")
    return 0


def interrupted(folder: RunFolder, slurm: SlurmConfig, facts: Facts, name: str, ask: bool) -> int:
    """Write down why the batch script was signalled; with `ask`, ask the ranks through the run folder."""
    job, restart = _job()
    if ask:
        request(folder, _ASK)
    cause = cause_of(facts, restart, slurm.save_before)
    note(folder, "interrupted", job, restart, cause=cause, asked=ask)
    _say(f"SIG{name}: {cause}")
    return 0


def end(folder: RunFolder, slurm: SlurmConfig, facts: Facts, srun_code: int) -> int:
    """Decide what follows. The exit code of the job, or REQUEUE."""
    job, restart = _job()
    history = read_history(folder)
    own = next((start for start in history if (start.job, start.restart) == (job, restart)), None)
    if own is None:
        raise UserError(f"{folder.slurm_dir}: knows of no start {restart} of job {job}")
    if own.asked:
        (folder.control_dir / _ASK).unlink(missing_ok=True)
    newer = any(start.job == job and start.restart > restart for start in history)
    earlier = [start for start in history if start.begun < own.begun]
    saved = _newest_step(folder)
    outcome = outcome_of(own, earlier, Status.read(folder), saved, srun_code)
    if shutil.disk_usage(folder.root).free < _LEAST_SPACE:
        outcome = replace(outcome, reason=f"{outcome.reason}; the disk of {folder.root} is full")
    decision = decide(slurm, own, outcome, facts)
    if newer or (decision.action == "requeue" and not facts.state):
        # A batch script that was thought dead, or one that cannot know whether it was: the job is not its own now.
        _say("a later start of this job is under way" if newer else "no answer of the controller; nothing is requeued")
        return outcome.code
    try:
        note(folder, "end", job, restart, ended=time.time(), reason=decision.reason, code=outcome.code, saved=saved,
             reached=outcome.reached, action=decision.action)
    except OSError as error:
        _say(f"this cannot be written down: {error.strerror}")
    _say(f"{decision.reason}; {_WORDS[decision.action]}")
    return REQUEUE if decision.action == "requeue" else decision.code


_WORDS = {"finish": "finished", "requeue": "requeueing", "next": "the next job of the chain goes on",
          "leave": "Slurm starts it again"}


def machines(folder: RunFolder, slurm: SlurmConfig) -> int:
    """Judge what the machines found out. Where one is bad, print those to leave out from now on; the answer is 1."""
    job, restart = _job()
    names = expand_nodes(os.environ["SLURM_JOB_NODELIST"])
    found = judge(slurm, names, read_results(results_dir(folder, job, restart)))
    for name, told in (*found.notes.items(), *found.bad.items()):
        _say(f"{name}: {told}", sys.stderr)
    if not found.bad:
        return 0
    everywhere = len(found.bad) == len(names)
    if everywhere and set(found.bad.values()) == {SILENT}:
        _say("no machine has answered: the check itself has failed, going on without it", sys.stderr)
        return 0
    reason = "bad machines: " + ", ".join(f"{name} ({why})" for name, why in found.bad.items())
    action: Action = "finish"
    if slurm.restart == "chain" and not everywhere:
        action = "next"
    elif slurm.restart == "requeue" and restart < slurm.max_restarts and not everywhere:
        action = "requeue"
    note(folder, "end", job, restart, ended=time.time(), reason=reason, saved=_newest_step(folder), action=action,
         code=int(ExitCode.INTERNAL), excluded=sorted(found.bad))
    _say(f"{reason}; {_WORDS[action]}", sys.stderr)
    if action == "requeue":
        earlier = [name for start in read_history(folder) if start.job == job for name in start.excluded]
        print(",".join(dict.fromkeys([*slurm.exclude, *earlier])))
    return 1


def endpoint() -> int:
    """Print an address on this machine, with a port that is free now, for torchrun."""
    with socket.create_server(("", 0)) as probe:
        print(f"{os.environ.get('SLURMD_NODENAME') or socket.gethostname()}:{probe.getsockname()[1]}")
    return 0


def usable_nodes(config: RunConfig, slurm: SlurmConfig, allocated: int) -> int:
    """The most of the `allocated` machines over whose ranks the batch divides. Raises UserError where none will do."""
    for nodes in range(allocated, 0, -1):
        with contextlib.suppress(ConfigError):
            config.batch.resolve(nodes * slurm.ranks_per_node)
            return nodes
    raise UserError(f"batch.global_batch_size: {config.batch.global_batch_size} divides over no number of machines up "
                    f"to {allocated} with {slurm.ranks_per_node} ranks each")


def _job() -> tuple[str, int]:
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        raise UserError("environment: SLURM_JOB_ID is not set; this is for batch scripts that `pretrain slurm` wrote")
    return job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _chain(folder: RunFolder, job: str) -> Sequence[str]:
    return next((sent.jobs for sent in read_submissions(folder) if job in sent.jobs), (job,))


def _close_lost(folder: RunFolder, history: Sequence[Start], job: str, restart: int, facts: Facts) -> None:
    """Give the last start an end, where its batch script was lost before it could."""
    last = history[-1] if history else None
    if last is None or last.ended is not None or (last.job, last.restart) == (job, restart):
        return
    status = Status.read(folder)
    own = status if status is not None and status.fence > last.fence else None
    failed = facts.failed(last.nodes)
    told = (own.message or own.reason) if own is not None and own.code is not None else ""
    reason = f"node failure: {', '.join(failed)}" if failed else last.cause or told or "its batch script was lost"
    note(folder, "end", last.job, last.restart, ended=time.time(), reason=reason, code=own.code if own else None,
         saved=_newest_step(folder), reached=own.step if own else 0, action="leave")


def _await_lease(folder: RunFolder, job: str) -> None:
    """Wait until a holder of another job is known to be gone; a start of the same job takes over at once."""
    deadline = time.monotonic() + 1.5 * LEASE_TIMEOUT
    told = False
    while time.monotonic() < deadline:
        holder = live_holder(folder)
        if holder is None or (holder.slurm is not None and holder.slurm.job == job):
            return
        if not told:
            _say(f"waiting for the lease of {holder.process.host}, process {holder.process.pid}")
            told = True
        time.sleep(2.0)


def _newest_step(folder: RunFolder) -> int:
    found = folder.checkpoints()
    return found[0].step if found else 0


def _say(line: str, stream: TextIO | None = None) -> None:
    print(f"[pretrain] {time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=stream, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands above. Returns the exit code."""
    root, command, *rest = arguments
    if command == "endpoint":
        return endpoint()
    folder = RunFolder(Path(root))
    config = load_run_config(frozen_config(folder)).config
    slurm = config.slurm
    if slurm is None:
        raise UserError(f"{frozen_config(folder)}: has no slurm section")
    if command == "machines":
        return machines(folder, slurm)
    if command == "nodes":
        print(usable_nodes(config, slurm, int(os.environ["SLURM_JOB_NUM_NODES"])))
        return 0
    facts = Facts.parse(sys.stdin.read())
    if command == "begin":
        return begin(folder, slurm, facts)
    if command == "interrupted":
        return interrupted(folder, slurm, facts, rest[0], "--ask" in rest)
    return end(folder, slurm, facts, int(rest[0]))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            sys.exit(main(sys.argv[1:]))
        except PretrainError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(int(error.code))
        except OSError as error:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(int(ExitCode.INTERNAL))
