"""The ledger of claims: `docs/claims.yaml` holds it, `python -m evaluation.claims` renders `docs/claims.md` from it.

A claim is what somebody says of a system. Beside it stand the figure that would show it honestly, what was measured
with the commands that measured it, the controls, and what came of it. Every figure names the results file that it was
read from and the place in it; `problems` holds the ledger to those files.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from pretrain.config.load import load_yaml_model
from pretrain.config.model import Section
from pretrain.monitor.rows import read_metrics
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import write_json_atomic, write_text_atomic

PLACES = ("docs/results", "benchmarks/results")
"""Where results files lie, from the root of the repository."""
_ROUNDING = 5e-4
"""Relative difference that rounding to four digits may leave."""


class Figure(Section):
    """One number of a results file."""

    name: str = Field(description="what was measured")
    value: float
    ci: tuple[float, float] | None = Field(None, description="95% interval")
    n: int | None = Field(None, description="number of things it is computed over")
    seeds: list[int] = Field(default_factory=list, description="of the runs; empty: nothing was drawn")
    file: str = Field(description="results file, from the root of the repository")
    at: list[str | int] = Field(min_length=1, description="keys that lead to the number in the file, or to an object "
                                "with value, ci and n")
    note: str = ""


class Claim(Section):
    """One claim and what came of it."""

    id: str = Field(pattern="^[a-z0-9-]+$")
    system: str = Field(description="family that it is about")
    claim: str
    figure: str = Field(description="the number that is claimed, as it was published")
    source: str = Field(description="where it is claimed")
    metric: str = Field(description="what would show it honestly")
    status: Literal["measured", "not tried"]
    verdict: str = Field(min_length=1, description="in a few words: not supported, holds for the legacy metric only")
    reason: str = Field(description="why; of what was not tried: why not")
    commands: str = Field("", description="what was run, to the letter, a command a line")
    measured: list[Figure] = Field(default_factory=list)
    controls: list[Figure] = Field(default_factory=list, description="the same where the effect should be absent, or "
                                   "known")

    @model_validator(mode="after")
    def _has_its_figures(self) -> Claim:
        if self.status == "measured" and not (self.measured and self.commands.strip()):
            raise ValueError(f"{self.id}: status measured needs figures under measured, and commands")
        if self.status == "not tried" and (self.measured or self.controls or self.commands):
            raise ValueError(f"{self.id}: has figures or commands, so its status is not: not tried")
        return self


class Ledger(Section):
    """All claims."""

    about: str = Field(description="what holds of all measurements: machine, precision")
    claims: list[Claim]

    @model_validator(mode="after")
    def _distinct(self) -> Ledger:
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError("two claims have one id")
        return self


def read_ledger(path: Path) -> Ledger:
    """The ledger in a YAML file. Raises ConfigErrors with everything that is wrong in it."""
    return load_yaml_model(Ledger, path)[0]


def problems(ledger: Ledger, root: Path) -> list[str]:
    """Figures whose file is missing, lies elsewhere than in `PLACES` of `root`, or says something else."""
    return [f"{claim.id}, {figure.name}: {problem}" for claim in ledger.claims
            for figure in (*claim.measured, *claim.controls) for problem in _differences(figure, root)]


def _differences(figure: Figure, root: Path) -> Iterator[str]:
    path = (root / figure.file).resolve()
    if not any(path.is_relative_to((root / place).resolve()) for place in PLACES):
        yield f"{figure.file} lies neither in {' nor in '.join(PLACES)}"
        return
    try:
        found = json.loads(path.read_bytes())
        for key in figure.at:
            found = found[key]
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield f"{figure.file} at {figure.at}: {type(error).__name__}: {error}"
        return
    stored = found if isinstance(found, dict) else {"value": found}
    own: dict[str, Any] = {"value": figure.value, "ci": figure.ci, "n": figure.n}
    for key, value in own.items():
        if value is not None and not _same(value, stored.get(key)):
            yield f"{key} {value} is {stored.get(key)} in {figure.file} at {figure.at}"


def _same(given: Any, stored: Any) -> bool:
    if isinstance(given, (tuple, list)):
        return isinstance(stored, list) and len(given) == len(stored) and all(map(_same, given, stored))
    number = isinstance(stored, (int, float)) and not isinstance(stored, bool)
    return number and math.isclose(given, stored, rel_tol=_ROUNDING, abs_tol=1e-9)


def keep(results: Path, to: Path) -> None:
    """Copy a results file to where it is kept, without the names of the machine; of a run's metrics.jsonl, what its
    evaluations in training found, by step."""
    if results.suffix == ".jsonl":
        document: dict[str, Any] = {"run": results.parent.name, "evaluations": _evaluations(results.parent)}
    else:
        document = json.loads(results.read_bytes())
    if isinstance(document.get("host"), dict):
        document["host"] = {key: value for key, value in document["host"].items() if key not in ("host", "platform")}
    to.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(to, document)


def _evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """Figures of a run's evaluations in training: step, name, then value and 95% interval where there is one."""
    found: dict[str, dict[str, Any]] = {}
    for row in read_metrics(RunFolder.open(run)):
        for key, value in row.items():
            if "/" in key and not key.startswith("time/") and not key.endswith(("/low", "/high")):
                ends = [row.get(f"{key}/{end}") for end in ("low", "high")]
                figure = {"value": value} | ({"ci": ends} if None not in ends else {})
                found.setdefault(str(row["step"]), {})[key] = figure
    return found


def render(ledger: Ledger) -> str:
    """The ledger as a page."""
    return "\n".join(_lines(ledger)) + "\n"


def _lines(ledger: Ledger) -> Iterator[str]:
    yield "# Claims"
    yield ""
    yield "Made from `claims.yaml` by `python -m evaluation.claims`; edit that. " + ledger.about.strip()
    for system in dict.fromkeys(claim.system for claim in ledger.claims):
        yield ""
        yield f"## {system}"
        yield ""
        yield "| claim | claimed | measured | verdict |"
        yield "|---|---|---|---|"
        own = [claim for claim in ledger.claims if claim.system == system]
        for claim in own:
            first = f"{claim.measured[0].name} {_number(claim.measured[0])}" if claim.measured else "-"
            yield (f"| [{_cell(claim.claim)}](#{claim.id}) | {_cell(claim.figure)} | {_cell(first)} "
                   f"| **{_cell(claim.verdict)}** |")
        for claim in own:
            yield from _claim(claim)


def _claim(claim: Claim) -> Iterator[str]:
    yield ""
    yield f'### <a id="{claim.id}"></a>{claim.claim}'
    yield ""
    yield f"Claimed: {claim.figure} ({claim.source}). What would show it: {claim.metric}."
    yield ""
    yield f"**{claim.verdict[0].upper()}{claim.verdict[1:]}.** {claim.reason.strip()}"
    for title, figures in (("measured", claim.measured), ("control", claim.controls)):
        if figures:
            yield ""
            yield f"| {title} | | seeds | file |"
            yield "|---|---|---|---|"
            for figure in figures:
                name = f"{figure.name}. {figure.note}" if figure.note else figure.name
                seeds = ", ".join(map(str, figure.seeds)) or "-"
                yield f"| {_cell(name)} | {_number(figure)} | {seeds} | [{Path(figure.file).name}]({_link(figure)}) |"
    if claim.commands:
        yield ""
        yield from ("```", *claim.commands.strip().splitlines(), "```")


def _number(figure: Figure) -> str:
    interval = f" ({figure.ci[0]:.4g} to {figure.ci[1]:.4g})" if figure.ci else ""
    return f"{figure.value:.4g}{interval}" + (f", n {figure.n:,}" if figure.n else "")


def _link(figure: Figure) -> str:
    """From the folder of the page."""
    return figure.file.removeprefix("docs/") if figure.file.startswith("docs/") else f"../{figure.file}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """`python -m evaluation.claims`: write docs/claims.md; `... keep RESULTS.json TO.json`: keep a results file."""
    match sys.argv[1:]:
        case []:
            write_text_atomic(Path("docs/claims.md"), render(read_ledger(Path("docs/claims.yaml"))))
        case ["keep", results, to]:
            keep(Path(results), Path(to))
        case _:
            sys.exit("python -m evaluation.claims, or: python -m evaluation.claims keep RESULTS.json TO.json")


if __name__ == "__main__":
    main()
