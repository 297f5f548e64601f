"""`pretrain data audit`: how much of an evaluation set stands in the training data."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.cli.options import JsonOption
from pretrain.cli.text import excerpt

if TYPE_CHECKING:
    from data_prep.audit import Audit, Level, Side

HIGH, MEDIUM = 0.05, 0.01
"""Contaminated shares above which a training set is called high or medium."""


def audit(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Training shards, DIR or DIR:SPLIT (train).")],
    evaluation: Annotated[str, typer.Argument(metavar="VAL", help="What must not be in it, DIR or DIR:SPLIT (val).")],
    limit: Annotated[float, typer.Option(min=0, max=1, help="Contaminated share of VAL that is accepted.")] = 0.0005,
    level: Annotated[str | None, typer.Option(metavar="word|token", show_default=False, help="What is compared; "
                                              "default: words where both sides have a tokenizer.")] = None,
    ngram: Annotated[int, typer.Option(min=2, max=64, help="Words or tokens of an n-gram.")] = 13,
    coverage: Annotated[float, typer.Option(min=0, max=1, help="Share of a text that makes it contaminated.")] = 0.5,
    run: Annotated[int, typer.Option(min=1, help="Words or tokens in a row that do.")] = 50,
    boilerplate: Annotated[int, typer.Option(min=1, help="n-grams in more training documents do not count.")] = 10,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, show_default=False,
                                                help="Processes; default: one a core.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what of VAL stands in TRAIN, by n-grams; exit code 5 where more than the limit is contaminated."""
    from data_prep.audit import audit as measure
    from data_prep.crew import available_cores
    from data_prep.progress import RichReporter
    from pretrain.errors import CheckFailed, UserError
    chosen: Level | None = "word" if level == "word" else "token" if level == "token" else None
    if level is not None and chosen is None:
        raise UserError(f'--level "{level}": word or token')
    sides = _side(train, "train"), _side(evaluation, "val")
    started = time.perf_counter()
    with RichReporter() as reporter:
        reporter.stage("audit", None)
        found = measure(*sides, level=chosen, ngram=ngram, coverage=coverage, run=run, boilerplate=boilerplate,
                        workers=workers or available_cores(), advance=reporter.advance)
    if as_json:
        low, high = found.interval()
        typer.echo(json.dumps(asdict(found) | {"fraction": found.fraction, "ci95": [low, high], "limit": limit,
                                               "assessment": _assessment(found)}))
    else:
        _print(found, *sides, time.perf_counter() - started)
    if found.fraction > limit:
        raise CheckFailed(f"{sides[1].name}: {found.contaminated:,} of {found.items:,} texts ({found.fraction:.3%}) "
                          f"stand in {sides[0].name}, {limit:.3%} is the limit")


def _side(stated: str, split: str) -> Side:
    from data_prep.audit import Side
    folder, _, name = stated.rpartition(":")
    return Side(Path(folder), name) if folder and not Path(stated).exists() else Side(Path(stated), split)


def _assessment(found: Audit) -> str | None:
    if not found.items:
        return None
    return "high" if found.fraction > HIGH else "medium" if found.fraction > MEDIUM else "low"


def _print(found: Audit, train: Side, evaluation: Side, seconds: float) -> None:
    low, high = found.interval()
    typer.echo(f"{evaluation.name}: {found.items:,} texts against {found.train_documents:,} of {train.name}, by "
               f"{found.level}s, in {seconds:.1f} s")
    typer.echo(f"contaminated: {found.contaminated:,} ({found.fraction:.3%}, 95% interval {low:.3%} to {high:.3%}); "
               f"touched: {found.suspicious:,}; {found.mean_coverage:.3%} of all {found.level}s are covered")
    typer.echo(f"boilerplate: {found.boilerplate_ngrams:,} n-grams do not count, {found.boilerplate_items:,} texts "
               "hold nothing else")
    if found.whole:
        typer.echo(f"contaminated all the same: {found.whole:,} texts of boilerplate that stand whole in training")
    for finding in found.worst:
        overlap = finding.overlap
        typer.echo(f"--- {overlap.coverage:.1%} covered, {overlap.run:,} {found.level}s in a row: "
                   f"{json.dumps(finding.provenance, ensure_ascii=False)}")
        typer.echo(excerpt(finding.excerpt, 300))
