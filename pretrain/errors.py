"""Exit codes and the errors that carry them.

Whatever a user can cause is raised as one of these with one clear line: it names the file, key or rank, the value,
and what would be right. The command line prints that line without a traceback and leaves with the error's code.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """How a process of this stack ends. The launcher and `srun` return these unchanged."""

    DONE = 0
    INTERNAL = 1
    USER = 2
    CORRUPT = 3
    DIVERGED = 4
    FAILED_CHECK = 5
    HANG = 6
    STOPPED = 85
    INTERRUPTED = 130


class PretrainError(Exception):
    """Base of all errors with a meaning for the user. `code` is the exit code of the process."""

    code: ExitCode = ExitCode.INTERNAL
    agreed: bool = False
    """Whether every rank of a run raises this same error; one of them then tells the user."""


class UserError(PretrainError):
    """Bad input: a config value, a path, a command. Cured by the user."""

    code = ExitCode.USER


class ConfigError(UserError, ValueError):
    """A config value that cannot be used; `key` is its dotted path.

    `where` names the file (and line) or the option that gave the value; `value` is the value as the user wrote it,
    where the message does not name it already. A ValueError, so that pydantic collects it beside its own findings.
    """

    def __init__(self, key: str, message: str, *, where: str = "", value: str | None = None) -> None:
        self.key, self.message, self.where, self.value = key, message, where, value
        subject = f"{key} = {value}" if value is not None else key
        super().__init__(": ".join(part for part in (where, subject, message) if part))


class ConfigErrors(ConfigError):
    """Everything that is wrong with a config, one line each."""

    def __init__(self, problems: Sequence[ConfigError]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in problems]
        super().__init__("", lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems:", *lines]))


class DataCorruption(PretrainError):
    """Bytes on disk are not what was written. The run resumes once they are repaired."""

    code = ExitCode.CORRUPT


class Divergence(PretrainError):
    """Training stopped because too many updates in a row were not finite."""

    code = ExitCode.DIVERGED


class CheckFailed(PretrainError):
    """A gate, a validation or an evaluation did not pass."""

    code = ExitCode.FAILED_CHECK


class Hang(PretrainError):
    """A rank stopped making progress."""

    code = ExitCode.HANG
