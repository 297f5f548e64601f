"""The command `pretrain`. Subcommands are imported on use, so that help costs no torch."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import pretrain
from pretrain.config.suggest import nearest
from pretrain.errors import ExitCode, PretrainError

COMMANDS: dict[str, tuple[str, str]] = {
    "prep": ("pretrain.cli.prep:prep", "Raw text to shards: read, deduplicate, split, tokenize, write."),
    "data": ("pretrain.cli.data:app", "Look into prepared data: stats, verify, peek, at."),
    "train": ("pretrain.cli.train:train", "Train, or go on with, the run that a config describes."),
    "eval": ("pretrain.cli.eval:evaluate", "Evaluate a run, checkpoint, export or Hugging Face folder."),
    "sweep": ("pretrain.cli.sweep:sweep", "Train presets x variants x seeds; one table with paired differences."),
    "embed": ("pretrain.cli.embed:embed", "Vectors of texts."),
    "export": ("pretrain.cli.export:export", "Write safetensors, config, tokenizer and model card, and prove them."),
    "generate": ("pretrain.cli.generate:generate", "Continue a text."),
    "estimate": ("pretrain.cli.estimate:estimate", "Parameters, memory a rank, FLOPs and hours before anything runs."),
    "presets": ("pretrain.cli.presets:app", "List and show the presets."),
    "config": ("pretrain.cli.config:app", "Show, compare and describe configs."),
    "doctor": ("pretrain.cli.doctor:doctor", "What this machine can do; collect what a bug report needs."),
    "slurm": ("pretrain.cli.slurm:app", "The run of a config as a job of a cluster: render, submit, watch, cancel."),
    "runs": ("pretrain.cli.runs:app", "List runs."),
    "backup": ("pretrain.cli.backup:backup", "Copy a run to another disk, proven by hashes."),
    "control": ("pretrain.cli.control:control", "Ask a run to save, stop, evaluate or reload its learning rate."),
    "demo": ("pretrain.cli.demo:demo", "The whole way on this machine: prepare, train, evaluate, export, report."),
}


class LazyGroup(TyperGroup):
    """A group whose commands are imported when they are called; its own help reads the table above only."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        """Import and return the command, None where there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        loaded = getattr(importlib.import_module(module), attribute)
        if not isinstance(loaded, typer.Typer):
            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(cmd_name, help=inspect.getdoc(loaded))(loaded)
            loaded = single
        command = typer.main.get_command(loaded)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        """The command of the first word; a mistyped one is told the nearest right one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f'no command "{args[0]}"{nearest(args[0], COMMANDS)}')
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """The list of commands, each with its whole line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


app = typer.Typer(cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  pretty_exceptions_enable=False, context_settings={"max_content_width": 120})


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pretrain {pretrain.__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                                help="Show the version and exit.")] = False) -> None:
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
