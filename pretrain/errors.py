"""Exit codes and the errors that carry them.

Whatever a user can cause is raised as one of these with one clear line: it names the file, key or rank, the value,
and what would be right. The command line prints that line without a traceback and leaves with the error's code.
"""

from __future__ import annotations

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


class UserError(PretrainError):
    """Bad input: a config value, a path, a command. Cured by the user."""

    code = ExitCode.USER


class ConfigError(UserError):
    """A config value that cannot be used; `key` is its dotted path."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(f"{key}: {message}" if key else message)


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
