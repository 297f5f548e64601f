"""A sweep: presets x variants x seeds, each an ordinary run in a folder of its own."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pretrain.config.model import Section
from pretrain.config.suggest import nearest
from pretrain.errors import ConfigError

SEED = "{seed}"
"""Stands for the seed of a run in what a sweep says of all runs."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep, as `pretrain train TARGET --set ...` takes it."""

    row: str
    """Label of its line in the table: preset, variant, or both joined by a slash."""
    seed: int
    target: str
    sets: tuple[str, ...]
    name: str
    """Name of the run folder."""


class SweepConfig(Section):
    """Presets x variants x seeds. The order of runs is seed by seed, so that a stopped sweep has whole comparisons."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}$", description="folder under runs_dir")
    runs_dir: str = Field("runs", description="runs lie in RUNS_DIR/NAME/ROW-sSEED")
    presets: list[str] | dict[str, str] = Field(
        min_length=1, description="preset names or YAML files; or label: preset")
    variants: dict[str, list[str]] = Field(
        {"": []}, min_length=1, description="label: list of KEY=VALUE that make the variant")
    seeds: list[int] = Field([41, 42, 43], min_length=1, description="the same for every row: differences are paired")
    sets: list[str] = Field([], description="KEY=VALUE for all runs; {seed} in it, or in one of a variant, is the "
                            "run's seed (data.source.seed={seed})")
    reference: str | None = Field(None, description="row that others are compared with; null: the first")
    metrics: list[str] = Field([], description="what the table shows; empty: eval.metric of the runs")
    at: Literal["final", "best"] = Field(
        "final", description="figures of the last evaluation in training, or of the one that was best by eval.metric")
    evaluate: list[str] = Field(
        [], description="arguments of `pretrain eval RUN ...` to run on each finished run, as `--task needle`; {seed} "
        "is the run's seed")
    nproc: int | None = Field(None, ge=1, description="ranks a run; null: launch.nproc of the preset")

    @field_validator("variants")
    @classmethod
    def _labels(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        for label in value:
            if label and not _LABEL.fullmatch(label):
                raise ConfigError("variants", f'label "{label}" becomes part of a folder name: letters, digits, '
                                  "dot, dash and underscore")
        if "" in value and len(value) > 1:
            raise ConfigError("variants", "one of several variants has no label")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ConfigError("seeds", f"{value}: a seed twice is the same run twice, not a replication")
        return value

    @field_validator("evaluate")
    @classmethod
    def _words(cls, value: list[str]) -> list[str]:
        for line in value:
            try:
                shlex.split(line)
            except ValueError as error:
                raise ConfigError("evaluate", f"{line!r} cannot be split into words ({error})") from None
        return value

    @model_validator(mode="after")
    def _rows(self) -> SweepConfig:
        rows = [row for row, _, _ in self._product()]
        if len(set(rows)) < len(rows):
            raise ConfigError("presets", f"two rows have the same label among {', '.join(rows)}; name them as "
                              "label: preset")
        if self.reference is not None and self.reference not in rows:
            raise ConfigError("reference", f'"{self.reference}" is no row{nearest(self.reference, rows)}; rows are '
                              f"{', '.join(rows)}")
        return self

    def _product(self) -> Iterator[tuple[str, str, list[str]]]:
        """(row, target, sets of the variant)."""
        presets = self.presets if isinstance(self.presets, dict) else {_stem(name): name for name in self.presets}
        if len(presets) < len(self.presets):
            raise ConfigError("presets", "two of them have the same name; name them as label: preset")
        for label in presets:
            if not _LABEL.fullmatch(label):
                raise ConfigError("presets", f'label "{label}" becomes part of a folder name: letters, digits, dot, '
                                  "dash and underscore; give one as label: preset")
        for (preset, target), (variant, sets) in itertools.product(presets.items(), self.variants.items()):
            parts = [part for part in (preset if len(presets) > 1 or not variant else "", variant) if part]
            yield "/".join(parts), target, sets

    @property
    def rows(self) -> list[str]:
        """Labels of the table's lines, in order."""
        return [row for row, _, _ in self._product()]

    @property
    def compared_with(self) -> str:
        """The reference row."""
        return self.reference if self.reference is not None else self.rows[0]

    def runs(self) -> list[SweepRun]:
        """Every run, all rows of a seed before the next seed."""
        found = []
        for seed in self.seeds:
            for row, target, sets in self._product():
                name = f"{row.replace('/', '-')}-s{seed}"
                own = (f"name={name}", f"runs_dir={self.runs_dir}/{self.name}", f"seed={seed}")
                ranks = () if self.nproc is None else (f"launch.nproc={self.nproc}",)
                given = (text.replace(SEED, str(seed)) for text in (*self.sets, *sets))
                found.append(SweepRun(row, seed, target, (*given, *own, *ranks), name))
        return found

    def evaluations(self, run: SweepRun) -> list[list[str]]:
        """Arguments of `pretrain eval` behind the run's folder, one list an evaluation."""
        return [shlex.split(line.replace(SEED, str(run.seed))) for line in self.evaluate]


def _stem(target: str) -> str:
    return target.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
