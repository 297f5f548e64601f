"""The ledger of claims: `docs/claims.yaml` holds it, `python -m evaluation.claims` renders `docs/claims.md` from it.

A claim is what somebody says of a system; beside it stand the figure that would show it honestly, the runs that tested
it with their exact commands, and what came of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pretrain.config.load import load_yaml_model
from pretrain.config.model import Section
from pretrain.runfolder.publish import write_text_atomic

Verdict = Literal["reproduced", "refuted", "not tested", "open"]


class Trial(Section):
    """One measurement."""

    command: str = Field(description="what was run, to the letter")
    figure: str = Field(description="name of what was measured")
    value: float
    ci: tuple[float, float] | None = Field(None, description="95% interval")
    n: int | None = Field(None, description="number of things it is computed over")
    note: str = Field("", description="what else a reader must know")


class Claim(Section):
    """One claim and what came of it."""

    id: str = Field(pattern="^[a-z0-9-]+$")
    system: str = Field(description="family that it is about")
    claim: str
    source: str
    metric: str = Field(description="the figure that would show it honestly")
    verdict: Verdict = Field(description="open: tested in part, and undecided")
    reason: str = Field(description="why; of what is not tested: why not")
    trials: list[Trial] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_its_trials(self) -> Claim:
        if bool(self.trials) == (self.verdict == "not tested"):
            raise ValueError(f"{self.id}: a claim that was tested names its runs, one that was not has none")
        return self


class Ledger(Section):
    """All claims."""

    machine: str = Field(description="where the runs were made")
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


def render(ledger: Ledger) -> str:
    """The ledger as a page."""
    return "\n".join(_lines(ledger)) + "\n"


def _lines(ledger: Ledger) -> Iterator[str]:
    yield "# Claims"
    yield ""
    yield "Made from `claims.yaml` by `python -m evaluation.claims`; edit that. " + ledger.machine
    for system in dict.fromkeys(claim.system for claim in ledger.claims):
        yield ""
        yield f"## {system}"
        yield ""
        yield "| claim | source | verdict |"
        yield "|---|---|---|"
        own = [claim for claim in ledger.claims if claim.system == system]
        for claim in own:
            yield f"| [{_cell(claim.claim)}](#{claim.id}) | {_cell(claim.source)} | **{claim.verdict}** |"
        for claim in own:
            yield from _claim(claim)


def _claim(claim: Claim) -> Iterator[str]:
    yield ""
    yield f'### <a id="{claim.id}"></a>{claim.claim}'
    yield ""
    yield f"**{claim.verdict.capitalize()}.** {claim.reason} Honest figure: {claim.metric}."
    for trial in claim.trials:
        interval = f", 95% {trial.ci[0]:.4g} to {trial.ci[1]:.4g}" if trial.ci else ""
        count = f", n {trial.n:,}" if trial.n else ""
        yield ""
        yield f"- {trial.figure}: **{trial.value:.4g}**{interval}{count}. {trial.note}".rstrip()
        yield ""
        yield from (f"      {line}" for line in trial.command.strip().splitlines())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """`python -m evaluation.claims [DOCS]`: write claims.md beside claims.yaml."""
    docs = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    write_text_atomic(docs / "claims.md", render(read_ledger(docs / "claims.yaml")))


if __name__ == "__main__":
    main()
