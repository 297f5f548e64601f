"""RunConfig -> the text of an sbatch file that an operator can read. Pure: no file is opened, no program asked.

Values in the `#SBATCH` header cannot be quoted reliably, so what is no plain word is refused; values in the body are
quoted for the shell. The script carries no logic of its own beyond signals and exit codes: what an interruption means
and what follows a start is decided by `slurm.batch`, which only reads what the script hands it, so that it also works
in a container that has no Slurm in it.
"""

from __future__ import annotations

import os.path
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.run import RunConfig
from pretrain.config.slurm import SlurmConfig
from pretrain.errors import ConfigError
from pretrain.runfolder.layout import RunFolder
from slurm.codes import NOTHING_TO_DO, REQUEUE

_PLAIN = re.compile(r"/[A-Za-z0-9._/@+=,:-]*")
_NONE = "is missing; a section with at least a time makes this run a job, as slurm: {time: 12:00:00, nodes: 2}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job runs from; what a config cannot know."""

    work_dir: Path
    """Absolute folder to which the config's own paths are relative."""
    python: str
    """Interpreter, unless `slurm.python` names one."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run as a job, with every path absolute."""

    config: RunConfig
    slurm: SlurmConfig
    work_dir: str
    root: str
    python: str

    @classmethod
    def of(cls, config: RunConfig, place: Place) -> Job:
        """Raises ConfigError for a config without a `slurm` section, a batch that does not divide over the ranks, or
        paths that an `#SBATCH` line cannot hold.
        """
        if config.slurm is None:
            raise ConfigError("slurm", _NONE)
        config.batch.resolve(config.slurm.ranks)
        work_dir = os.path.normpath(place.work_dir)
        root = os.path.normpath(os.path.join(work_dir, config.runs_dir, config.name))
        for key, path in (("the working folder", work_dir), ("runs_dir", root)):
            if not _PLAIN.fullmatch(path):
                raise ConfigError(key, f"{path!r} cannot stand in the header of a job: an absolute path of letters, "
                                  "digits and . _ / @ + = , : - would be right")
        return cls(config, config.slurm, work_dir, root, config.slurm.python or place.python)

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(Path(self.root))


def render(job: Job, command: Sequence[str] | None = None) -> str:
    """The sbatch file of `job`. `command` is what each rank runs, else `pretrain train` on the frozen config."""
    slurm = job.slurm
    ranks = f"{slurm.nodes} x {slurm.ranks_per_node} ranks"
    lines = [
        "#!/bin/bash",
        f"# Run {job.config.name} on {ranks}. Written by `pretrain slurm`: change the config, not this file.",
        *(f"#SBATCH --{option}" for option in _header(job)), "",
        "set -u", "", *_environment(job), "", *_helper(job), "", *_interruptions(job), "",
        "logs=$run/slurm/log/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}",
        "# What went before, and whether anything is left to do.",
        "facts | helper begin", "case $? in", "0) ;;", f"{NOTHING_TO_DO}) exit 0 ;;", "*) exit 1 ;;", "esac", "",
        *_checks(job), *_launch(job, command), "", *_afterwards(job)]
    return "\n".join(lines) + "\n"


def frozen_config(folder: RunFolder) -> Path:
    """The config as it was when the job was submitted: what its ranks read at every start."""
    return folder.slurm_dir / "config.yaml"


def script_file(folder: RunFolder) -> Path:
    """The sbatch file."""
    return folder.slurm_dir / "job.sbatch"


def _header(job: Job) -> Iterator[str]:
    """Options of sbatch, in the order of the config."""
    slurm = job.slurm
    torchrun = slurm.launcher == "torchrun"
    yield f"job-name={job.config.name}"
    yield f"comment=pretrain:{job.root}"
    yield f"chdir={job.work_dir}"
    yield f"output={job.root}/slurm/log/%j.out"
    yield "open-mode=append"
    yield "export=NONE"
    yield f"time={slurm.time}"
    yield f"signal=B:USR1@{slurm.save_before}"
    if slurm.min_nodes:  # a number of tasks would bound the number of machines
        yield f"nodes={slurm.min_nodes}-{slurm.nodes}"
        yield f"mincpus={slurm.ranks_per_node * (slurm.cpus or 1)}"
    else:
        yield f"nodes={slurm.nodes}"
        yield f"ntasks-per-node={1 if torchrun else slurm.ranks_per_node}"
        if slurm.cpus:
            yield f"cpus-per-task={slurm.cpus * (slurm.ranks_per_node if torchrun else 1)}"
    if slurm.gpus_per_node:
        yield f"gpus-per-node={slurm.gpus_per_node}"
    for name, value in (("mem", slurm.mem), ("partition", slurm.partition), ("account", slurm.account),
                        ("qos", slurm.qos), ("constraint", slurm.constraint), ("exclude", ",".join(slurm.exclude)),
                        ("reservation", slurm.reservation), ("dependency", slurm.dependency)):
        if value:
            yield f"{name}={value}"
    if slurm.exclusive:
        yield "exclusive"
    if slurm.mail:
        yield f"mail-user={slurm.mail.user}"
        yield f"mail-type={','.join(slurm.mail.events)}"
    yield "requeue" if slurm.restart == "requeue" else "no-requeue"


def _environment(job: Job) -> Iterator[str]:
    slurm = job.slurm
    yield "# Environment: what stands here, and nothing of the shell that submitted."
    yield "unset SLURM_EXPORT_ENV"
    if slurm.modules:
        yield "if ! type module >/dev/null 2>&1; then"
        yield "    for file in /etc/profile.d/{lmod,z00_lmod,modules}.sh; do"
        yield "        # shellcheck source=/dev/null"
        yield '        [ ! -r "$file" ] || . "$file"'
        yield "    done"
        yield "fi"
        for module in slurm.modules:
            yield f"module load {quoted(module)} || exit 1"
    yield "export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1"
    if slurm.cpus:
        yield f"export OMP_NUM_THREADS={slurm.cpus}"
    else:
        share = f"SLURM_CPUS_ON_NODE / {slurm.ranks_per_node}"
        yield f"export OMP_NUM_THREADS=$(({share} > 0 ? {share} : 1))"
    for name, value in slurm.env.items():
        yield f"export {name}={quoted(value)}"


def _helper(job: Job) -> Iterator[str]:
    yield f"run={quoted(job.root)}"
    yield f"python={quoted(job.python)}"
    yield from _container(job)
    yield "# Reads what the controller says from its input; writes down and decides."
    yield "helper() {"
    if job.slurm.container and job.slurm.container.runtime == "pyxis":
        yield '    srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$SLURMD_NODENAME" \\'
        yield f'        {_python(job)} -m slurm.batch "$run" "$@"'
    else:
        yield f'    {_python(job)} -m slurm.batch "$run" "$@"'
    yield "}"
    yield "facts() {"
    yield "    for _ in 1 2 3 4 5 6; do # a controller that is being restarted answers soon"
    yield '        timeout 30 scontrol show job -o "$SLURM_JOB_ID" && break'
    yield "        sleep 5"
    yield "    done"
    yield '    timeout 30 squeue -h -j "$SLURM_JOB_ID" -o TimeLeft=%L'
    yield "    timeout 30 sinfo -h -N -t down,drain,fail,no_respond -o 'BadNode=%N %T'"
    yield "}"


def _interruptions(job: Job) -> Iterator[str]:
    yield f"# USR1 comes {job.slurm.save_before} s before the time limit and, on some clusters, before a preemption;"
    yield "# TERM when the job is ended. Ranks save at the next step."
    yield "step="
    yield "asked="
    yield "# shellcheck disable=SC2329 # called by the traps"
    yield "interrupted() {"
    yield "    asked=$1"
    if job.slurm.launcher == "torchrun":
        yield "    # torchrun dies of USR1: its ranks are asked through the run folder"
        yield '    facts | helper interrupted "$1" --ask'
    else:
        yield '    [ -z "$step" ] || kill -s USR1 "$step" 2>/dev/null'
        yield '    facts | helper interrupted "$1"'
    yield "}"
    yield "trap 'interrupted USR1' USR1"
    yield "trap 'interrupted TERM' TERM"


def _checks(job: Job) -> Iterator[str]:
    """Machines are looked at; where one is bad the job goes back into the queue without it."""
    slurm = job.slurm
    if slurm.checks == "off":
        return
    nodes = '"$SLURM_JOB_NUM_NODES"' if slurm.min_nodes else str(slurm.nodes)
    yield "# Each machine looks at itself. A bad one is left out, and the job waits for another."
    yield f"timeout --kill-after=10 {slurm.check_seconds} srun --export=ALL --mpi=none --wait=0 --distribution=block \\"
    yield f"    --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 \\"
    yield '    --output="$logs/machine-%N.log" --open-mode=append \\'
    yield f'    {_python(job)} -m slurm.nodecheck "$run"'
    if slurm.restart == "requeue":
        yield "if ! bad=$(helper machines </dev/null); then"
        yield "    trap '' USR1 TERM"
        yield '    [ -n "$bad" ] && scontrol requeue "$SLURM_JOB_ID" &&'
        yield '        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$bad" && exit 0'
        yield "    exit 1"
        yield "fi"
    else:
        yield "helper machines </dev/null || exit 1"
    yield ""


def _launch(job: Job, command: Sequence[str] | None) -> Iterator[str]:
    slurm = job.slurm
    torchrun = slurm.launcher == "torchrun"
    nodes, per_node = str(slurm.nodes), 1 if torchrun else slurm.ranks_per_node
    tasks = str(slurm.nodes * per_node)
    if slurm.min_nodes:
        yield "# As many of the machines as the batch divides over."
        yield "nodes=$(helper nodes </dev/null) || exit 1"
        nodes, tasks = '"$nodes"', f"$((nodes * {per_node}))"
    yield "# One task a machine, which starts its ranks." if torchrun else "# One task a rank."
    if torchrun:
        yield "endpoint=$(helper endpoint </dev/null) || exit 1"
    yield "code=85"
    yield 'if [ -z "$asked" ]; then'
    yield f"    srun --export=ALL --mpi=none --kill-on-bad-exit=0 --wait={slurm.grace} --distribution=block \\"
    flags = [f"--nodes={nodes} --ntasks={tasks} --ntasks-per-node={per_node}"]
    if slurm.cpus:
        flags.append(f"--cpus-per-task={slurm.cpus * (slurm.ranks_per_node if torchrun else 1)}")
    if slurm.gpus_per_node:
        flags.append("--gpu-bind=none")
    yield f"        {' '.join(flags)} \\"
    yield '        --output="$logs/rank-%t.log" --open-mode=append \\'
    python = f"        {_python(job)}"
    if torchrun:
        yield f"{python} -m torch.distributed.run --nnodes={nodes} --nproc-per-node={slurm.ranks_per_node} \\"
        yield '        --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint="$endpoint" \\'
        yield '        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \\'
        python = "       "
    yield f"{python} {_program(job, command)} &"
    yield "    step=$!"
    if not torchrun:
        yield '    [ -z "$asked" ] || kill -s USR1 "$step" 2>/dev/null # it came just now'
    yield '    wait "$step"'
    yield "    code=$?"
    yield '    while [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do # a signal ended the wait, not the step'
    yield '        wait "$step"'
    yield "        code=$?"
    yield "    done"
    yield "fi"


def _program(job: Job, command: Sequence[str] | None) -> str:
    if command is not None:
        return " ".join(quoted(word) for word in command)
    alone = " --nproc 1" if job.slurm.ranks == 1 else ""
    return f'-m pretrain.cli.main train "$run/slurm/config.yaml"{alone}'


def _container(job: Job) -> Iterator[str]:
    """The array `inside`: what stands in front of a command, or among the options of srun, to run it in the image."""
    container = job.slurm.container
    if container is None:
        return
    own = [job.work_dir, *([] if Path(job.root).is_relative_to(job.work_dir) else [os.path.dirname(job.root)])]
    mounts = ",".join([*(f"{path}:{path}" for path in own),
                       *(mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts)])
    if container.runtime == "apptainer":
        nvidia = "--nv " if job.slurm.gpus_per_node else ""
        yield f"inside=(apptainer exec {nvidia}--pwd {quoted(job.work_dir)}"
        yield f"    --bind {quoted(mounts)} {quoted(container.image)})"
    else:
        yield f"inside=(--container-image={quoted(container.image)} --container-workdir={quoted(job.work_dir)}"
        yield f"    --container-mounts={quoted(mounts)})"


def _python(job: Job) -> str:
    return '"${inside[@]}" "$python" -P' if job.slurm.container else '"$python" -P'


def quoted(text: str) -> str:
    """`text` as one word of bash."""
    if not set(text) & set("'$`\\"):
        return f"'{text}'" if "," in text else shlex.quote(text)  # a bare comma looks like a mistake in an array
    return "$'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _afterwards(job: Job) -> Iterator[str]:
    yield "# What follows is decided from the run folder; the code of srun is a hint only."
    yield "trap '' USR1 TERM"
    yield 'facts | helper end "$code"'
    yield "code=$?"
    if job.slurm.restart == "requeue":
        yield f'if [ "$code" -eq {REQUEUE} ]; then'
        yield '    scontrol requeue "$SLURM_JOB_ID" && exit 0'
        yield '    echo "error: this cluster does not let jobs requeue; submit again, with slurm.restart: chain" >&2'
        yield "    exit 85"
        yield "fi"
    yield 'exit "$code"'
