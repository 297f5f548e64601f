"""The command `pretrain`. Subcommands are imported on use, so that help costs no torch."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from pretrain.errors import ExitCode, PretrainError

COMMANDS: dict[str, tuple[str, str]] = {
    "prep": ("pretrain.cli.prep:prep", "Raw text to shards: read, deduplicate, split, tokenize, write."),
    "data": ("pretrain.cli.data:app", "Look into prepared data: stats, verify, peek, at."),
    "train": ("pretrain.cli.train:train", "Train, or go on with, the run that a config describes."),
    "eval": ("pretrain.cli.eval:evaluate", "Evaluate a run, checkpoint, export or Hugging Face folder."),
    "export": ("pretrain.cli.export:export", "Write safetensors, config, tokenizer and model card, and prove them."),
    "generate": ("pretrain.cli.generate:generate", "Continue a text."),
    "estimate": ("pretrain.cli.estimate:estimate", "Parameters, memory a rank, FLOPs and hours before anything runs."),
    "presets": ("pretrain.cli.presets:app", "List and show the presets."),
    "config": ("pretrain.cli.config:app", "Show, compare and describe configs."),
    "doctor": ("pretrain.cli.doctor:doctor", "What this machine can do; collect what a bug report needs."),
    "runs": ("pretrain.cli.runs:app", "List runs."),
    "control": ("pretrain.cli.control:control", "Ask a running run to save, stop, evaluate or reload its learning rate."),
    "demo": ("pretrain.cli.demo:demo", "The whole way on this machine: prepare, train, evaluate, export, report."),
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """The command; for the list in `--help` a stand-in with its one line."""
        if cmd_name not in COMMANDS:
            return None
        target, short_help = COMMANDS[cmd_name]
        stub = typer.Typer(add_completion=False, rich_markup_mode=None)
        if ctx.info_name and not _is_called(cmd_name):
            stub.command(cmd_name, help=short_help)(_stand_in)
            return typer.main.get_command(stub)
        module, attribute = target.split(":")
        loaded = getattr(importlib.import_module(module), attribute)
        if not isinstance(loaded, typer.Typer):
            stub.command(cmd_name, help=loaded.__doc__)(loaded)
            loaded = stub
        command = typer.main.get_command(loaded)
        command.name = cmd_name
        return command


def _stand_in() -> None:
    """Shown in the list of commands, never run."""


def _is_called(name: str) -> bool:
    """Whether `name` is the first word of the command line."""
    words = [w for w in sys.argv[1:] if not w.startswith("-")]
    return bool(words) and words[0] == name


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Pretraining of unusual architectures on DeepSpeed, with controls beside every claim.")


@app.callback()
def _root() -> None:
    """Pretraining of unusual architectures on DeepSpeed, with controls beside every claim."""


def main() -> None:
    """Run the command line; errors with a meaning end in one line and their exit code."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(int(ExitCode.INTERRUPTED))
    except PretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.code))
    except Exception:
        traceback.print_exc()
        sys.exit(int(ExitCode.INTERNAL))


if __name__ == "__main__":
    main()
