"""`pretrain eval`."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.options import JsonOption, LogLevel, LogLevelOption, SetOption
from pretrain.errors import CheckFailed

if TYPE_CHECKING:
    from evaluation.results import Results
    from evaluation.target import Target


class Task(StrEnum):
    """What can be evaluated."""

    PERPLEXITY = "perplexity"
    NEEDLE = "needle"
    STS = "sts"
    RETRIEVAL = "retrieval"
    COLLAPSE = "collapse"
    GATES = "gates"


class Dtype(StrEnum):
    """Of the weights and of what is computed with them."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", show_default=False,
                                               help="Run, checkpoint, export, Hugging Face folder or config.")]
StepOption = Annotated[int | None, typer.Option("--step", help="Of a run: this checkpoint instead of the newest.")]
BestOption = Annotated[bool, typer.Option("--best", help="Of a run: the checkpoint that was best on validation.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of weights and activations.")]
HeadOption = Annotated[list[str], typer.Option("--head", metavar="HEAD[:DIM]", show_default=False, default_factory=list,
                                               help="Encoders: this head, cut to DIM coordinates; may be repeated.")]
RemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the folder.")]


def evaluate(target: TargetArgument, *,
             task: Annotated[Task, typer.Option("--task", "--suite", help="What to evaluate.")] = Task.PERPLEXITY,
             data: Annotated[Path | None, typer.Option(help="Dataset (task sts: file of pairs); default: the run's "
                                                       "own.")] = None,
             split: Annotated[str | None, typer.Option(help="Split of the dataset; default: val.")] = None,
             seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens a window; default: the run's.")] = None,
             dtype: DtypeOption = Dtype.FP32,
             batch_size: Annotated[int | None, typer.Option(min=1, help="Windows a forward.")] = None,
             max_windows: Annotated[int | None, typer.Option(min=1, help="Windows, or needles, of the split.")] = None,
             samples: Annotated[int, typer.Option(min=0, max=64, help="Texts to write as well.")] = 0,
             baselines: Annotated[bool, typer.Option("--baselines", help="N-grams too; of encoders BM25, the untrained "
                                                     "model, all-MiniLM-L6-v2.")] = False,
             head: HeadOption,
             pool: Annotated[int | None, typer.Option(min=2, help="Task retrieval: passages searched.")] = None,
             controls: Annotated[bool, typer.Option("--controls", help="Needle: every control too. Perplexity: that of "
                                                    "the backbone alone and its like too.")] = False,
             null: Annotated[str | None, typer.Option(help="Task needle: run of the adapter without memory.")] = None,
             sets: SetOption,
             seed: Annotated[int, typer.Option(min=0, help="Of intervals, texts and gates.")] = 0,
             step: StepOption = None, best: BestOption = False,
             out: Annotated[Path | None, typer.Option(help="Folder of results.json; default: RUN/eval/...")] = None,
             trust_remote_code: RemoteCodeOption = False, as_json: JsonOption = False,
             log_level: LogLevelOption = LogLevel.WARNING) -> None:
    """Evaluate a run, checkpoint, export or Hugging Face folder.

    Writes results.json into RUN/eval (or --out) and prints a table. Exit codes: 0 done, 2 bad input, 3 corrupt files,
    5 a gate failed, or a needle was found where none is. A config stands for its untrained model; `--set` changes it,
    and of other targets the task (--set data.source.ctx_chunks=16).
    """
    from transformers.utils import logging

    from evaluation.embedding_eval import evaluate_collapse, evaluate_retrieval, evaluate_sts
    from evaluation.needle_eval import evaluate_needle
    from evaluation.offline import Request, default_folder, evaluate_gates, evaluate_perplexity
    from evaluation.samples import SAMPLING
    from evaluation.target import open_target
    logging.disable_progress_bar()
    opened = open_target(target, dtype=dtype.value, step=step, best=best, trust_remote_code=trust_remote_code,
                         sets=sets)
    request = Request(data=data, split=split, seq_len=seq_len, batch_size=batch_size, max_windows=max_windows,
                      baselines=baselines, texts=samples, seed=seed, controls=controls, null=null, sets=tuple(sets),
                      sampling=replace(SAMPLING, seed=seed), heads=tuple(head), pool=pool)
    command = ["pretrain", *sys.argv[1:]]
    tasks = {Task.PERPLEXITY: evaluate_perplexity, Task.NEEDLE: evaluate_needle, Task.GATES: evaluate_gates,
             Task.STS: evaluate_sts, Task.RETRIEVAL: evaluate_retrieval, Task.COLLAPSE: evaluate_collapse}
    results = tasks[task](opened, request, command)
    folder = out or default_folder(opened, request, results)
    path = results.write(folder) if folder is not None else None
    _refresh_report(opened)
    if as_json:
        print(results.model_dump_json(indent=1))
    else:
        _show(results, path)
    if results.passed is False:
        raise CheckFailed(f"{target}: {results.failure}")


def _show(results: Results, path: Path | None) -> None:
    from rich.console import Console

    from evaluation.needle_tables import needle_tables
    from evaluation.tables import comparison_table, details_table, metrics_table, vectors_table
    console = Console()
    if results.task in (Task.STS, Task.RETRIEVAL, Task.COLLAPSE):
        console.print(vectors_table(results))
    else:
        console.print(details_table(results) if results.task == Task.GATES else metrics_table(results))
    for part in needle_tables(results) if results.task == Task.NEEDLE else ():
        console.print(part, highlight=False)
    if results.baselines:
        console.print(comparison_table(results))
    for sample in results.samples:
        console.rule("sample", align="left")
        console.print(sample.prompt, style="dim", end="", markup=False, highlight=False)
        console.print(sample.text, markup=False, highlight=False)
    if path is not None:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def _refresh_report(target: Target) -> None:
    """A run that has a report, or a summary, gets one with these results; a running run writes its own at the end."""
    folder = target.run_folder
    if folder is not None and folder.report_file.is_file():
        from evaluation.report import write_report
        write_report(folder.root)
    if folder is not None and folder.metrics_json.is_file():
        from evaluation.summary import write_summary
        write_summary(folder.root)
