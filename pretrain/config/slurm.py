"""The `slurm:` section: what a run asks of a cluster. Only `pretrain slurm` reads it; a local run passes it over.

Every value ends up in a shell script. What stands in its `#SBATCH` header is held to a plain alphabet here; what stands
in its body is quoted there.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.model import Section
from pretrain.errors import ConfigError

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,@:+=/-]*$")]
Constraint = Annotated[str, Field(pattern=r"^[A-Za-z0-9_(\[][A-Za-z0-9_.,:*|&()\[\]-]*$")]
NodeList = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*$")]
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+/-]*$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Any text on one line: quoted where it is used."""
MailEvent = Literal["BEGIN", "END", "FAIL", "REQUEUE", "INVALID_DEPEND", "TIME_LIMIT", "TIME_LIMIT_90",
                    "TIME_LIMIT_80", "TIME_LIMIT_50", "ALL"]
_LINK = r"(?:singleton|after(?:any|ok|notok|corr)?:\d+(?:_\d+)?(?:\+\d+)?(?::\d+(?:_\d+)?(?:\+\d+)?)*)"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = re.compile(r"SLURM_.*|SLURMD_.*|SBATCH_.*|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT")
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"
                   r"|(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)|(?P<only>\d+)(?::(?P<rest>\d+))?)")
_SIGNAL_SLACK_S = 60
"""Slurm sends the signal before a time limit up to so many seconds early."""


class MailConfig(Section):
    """Mail about the job."""

    user: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*(@[A-Za-z0-9.-]+)?$", description="who gets it")
    events: tuple[MailEvent, ...] = Field(("FAIL", "TIME_LIMIT"), min_length=1, description="what is written about")


class ContainerConfig(Section):
    """Image in which ranks and the job's own helper run."""

    runtime: Literal["apptainer", "pyxis"] = Field(description="apptainer: `apptainer exec` in front of each command; "
                                                   "pyxis: `srun --container-image`")
    image: str = Field(pattern=r"^[A-Za-z0-9./_][A-Za-z0-9._/@:#+-]*$", description="file or address of the image")
    mounts: tuple[Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/+-]*(:/[A-Za-z0-9._/+-]*(:(ro|rw))?)?$")], ...] = Field(
        (), description="folders of the node to see inside, as /data or /data:/mnt:ro")


class SlurmConfig(Section):
    """A job: its resources, its environment, and what becomes of it when it is interrupted."""

    time: Annotated[str, Field(pattern=r"^[0-9:-]+$")] = Field(
        description="longest time of one start: 30 (minutes), 12:00:00, 2-00:00:00")
    nodes: int = Field(1, ge=1, le=10_000, description="machines")
    min_nodes: int | None = Field(None, ge=1, description="go on with as few machines as this where more cannot be "
                                  "had; null: nodes")
    gpus_per_node: int = Field(0, ge=0, le=64, description="GPUs a machine; 0: CPUs only")
    tasks_per_node: int | None = Field(None, ge=1, le=1024, description="ranks a machine; null: one a GPU, else one")
    cpus: int | None = Field(None, ge=1, le=4096, description="CPUs a rank; null: the partition's default")
    mem: str | None = Field(None, pattern=r"^[0-9]+[KMGT]?$", description="memory a machine, as 480G; 0: all of it; "
                            "null: the partition's default")
    partition: Word | None = Field(None, description="null: the cluster's default")
    account: Word | None = Field(None, description="who is charged; null: the user's default")
    qos: Word | None = Field(None, description="quality of service; null: the account's default")
    constraint: Constraint | None = Field(None, description="features that machines must have, as h100&ib")
    exclude: tuple[NodeList, ...] = Field((), description="machines never to use, as n[3-4]")
    reservation: Word | None = Field(None, description="reservation to run in")
    dependency: str | None = Field(None, pattern=f"^{_LINK}([,?]{_LINK})*$",
                                   description="jobs to wait for, as afterok:123, or singleton")
    exclusive: bool = Field(True, description="no other job on the machines")
    mail: MailConfig | None = Field(None, description="null: none")
    container: ContainerConfig | None = Field(None, description="null: run on the machine itself")
    modules: tuple[Module, ...] = Field((), description="environment modules loaded first, in this order")
    env: dict[str, Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]] = Field(
        default_factory=dict, description="environment variables of the job; nothing else of the submitting shell")
    python: Line | None = Field(None, description="interpreter on the machines (or in the image) that has this "
                                "package; null: the one that submits")
    launcher: Literal["srun", "torchrun"] = Field("srun", description="srun: one task a rank; torchrun: one task a "
                                                  "machine, which starts its ranks")
    save_before: int = Field(300, ge=10, le=86_400, description="seconds before the time limit at which ranks are "
                             "asked to save")
    checks: Literal["off", "quick", "full"] = Field(
        "quick", description="machines before ranks start: GPUs, memory errors, disk, clock; full: also a matrix "
        "product and all-reduces; bad machines are left out and the job requeues")
    check_seconds: int = Field(300, ge=10, le=3600, description="longest time of these checks")
    grace: int = Field(60, ge=1, le=3600, description="seconds that the others have to end once a rank has ended")
    restart: Literal["requeue", "chain", "never"] = Field(
        "requeue", description="requeue: the job puts itself back into the queue; chain: jobs submitted beforehand, "
        "each waiting for the one before, where requeueing is forbidden; never: one start")
    max_restarts: int = Field(20, ge=0, le=10_000, description="starts after the first one; with chain, jobs after it")

    @field_validator("time")
    @classmethod
    def _time(cls, value: str) -> str:
        if not parse_time(value):
            raise ValueError(f'"{value}" is no time limit: write minutes, H:MM:SS or D-HH:MM:SS')
        return value

    @field_validator("env")
    @classmethod
    def _env(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ConfigError("slurm.env", f'"{name}" is no name of an environment variable: letters, digits and _')
            if _OURS.fullmatch(name):
                raise ConfigError("slurm.env", f"{name} is set by Slurm and the launcher; leave it out")
        return value

    @model_validator(mode="after")
    def _fits(self) -> SlurmConfig:
        if self.save_before + _SIGNAL_SLACK_S >= self.time_seconds:
            raise ConfigError("slurm.save_before", f"{self.save_before} s before a limit of {self.time_seconds} s "
                              f"leave no time to train (Slurm sends the signal up to {_SIGNAL_SLACK_S} s early); raise "
                              "slurm.time or lower it")
        if self.min_nodes and self.min_nodes >= self.nodes:
            raise ConfigError("slurm.min_nodes", f"{self.min_nodes} is not below slurm.nodes {self.nodes}; "
                              "leave it out")
        if self.container and not self.python:
            raise ConfigError("slurm.python", "is missing: name the interpreter inside slurm.container.image")
        return self

    @property
    def time_seconds(self) -> int:
        """Time limit of one start."""
        return parse_time(self.time)

    @property
    def ranks_per_node(self) -> int:
        """Ranks a machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_per_node


def parse_time(text: str) -> int:
    """Seconds of a Slurm time limit (`M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`); 0 where it is none."""
    match = _TIME.fullmatch(text)
    if match is None:
        return 0
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    minutes = part["m"] + part["minutes"] + part["only"]
    return ((part["days"] * 24 + part["h"] + part["hours"]) * 60 + minutes) * 60 + \
        part["s"] + part["seconds"] + part["rest"]
