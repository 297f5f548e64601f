"""One type for every "how often" and "how long": `"2000 steps"`, `"500 micro_steps"`, `"10M tokens"`, `"1 epochs"`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

Unit = Literal["steps", "micro_steps", "samples", "tokens", "epochs"]
UNITS: tuple[Unit, ...] = ("steps", "micro_steps", "samples", "tokens", "epochs")
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s+([a-z_]+?)\s*$")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come. A step is one optimizer update; skipped updates consume samples but are no step."""

    steps: int = 0
    micro_steps: int = 0
    samples: int = 0
    tokens: int = 0
    epoch_samples: int | None = None
    """Samples in one epoch; None where the source has no epochs (mixtures, generators)."""

    def in_unit(self, unit: Unit) -> float:
        """This progress counted in `unit`. Raises ValueError for epochs of a source that has none."""
        if unit == "epochs":
            if not self.epoch_samples:
                raise ValueError("this data source has no epochs: give the interval in steps, samples or tokens")
            return self.samples / self.epoch_samples
        return float(getattr(self, unit))


@dataclass(frozen=True, slots=True)
class Interval:
    """An amount of progress in a named unit. Parsed from and written as text."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Interval:
        """Parse `"10M tokens"`. Raises ValueError naming what would be right."""
        match = _PATTERN.match(text)
        unit = match.group(3) if match else ""
        if match and unit + "s" in UNITS:
            unit += "s"
        if match is None or unit not in UNITS:
            raise ValueError(f'"{text}" is no interval: write a number and one of {", ".join(UNITS)}, as "2000 steps"')
        amount = float(match.group(1)) * _SUFFIX[match.group(2)]
        if amount <= 0:
            raise ValueError(f'"{text}": an interval is more than zero; leave the key out to switch it off')
        if unit != "epochs" and amount != int(amount):
            raise ValueError(f'"{text}": only epochs may be fractional')
        return cls(amount, cast(Unit, unit))

    def due(self, before: Progress, after: Progress) -> int | None:
        """The newest multiple of this interval reached between `before` and `after`, counted in its unit, else None.

        An event fires at the first update boundary at or past each multiple and is named by the multiple.
        """
        old = math.floor(before.in_unit(self.unit) / self.amount + 1e-9)
        new = math.floor(after.in_unit(self.unit) / self.amount + 1e-9)
        return int(new * self.amount) if new > old else None

    def to_steps(self, *, micro_steps_per_step: int, samples_per_step: int, tokens_per_step: int,
                 epoch_samples: int | None) -> int:
        """Whole optimizer updates in this interval, rounded down, at least one."""
        per_step = {"steps": 1, "micro_steps": micro_steps_per_step, "samples": samples_per_step,
                    "tokens": tokens_per_step}
        if self.unit == "epochs":
            if not epoch_samples:
                raise ValueError("this data source has no epochs: give the length in steps, samples or tokens")
            return max(1, int(self.amount * epoch_samples / samples_per_step + 1e-9))
        return max(1, int(self.amount) // per_step[self.unit])

    def __str__(self) -> str:
        number = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{number} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> Interval:
            if isinstance(value, Interval):
                return value
            if isinstance(value, str):
                return cls.parse(value)
            raise ValueError(f'{value!r} is no interval: write a number and a unit, as "2000 steps"')
        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(str))

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\d+(\.\d+)?\s*[KMBT]?\s+(" + "|".join(UNITS) + ")$",
                "examples": ["2000 steps", "10M tokens"]}
