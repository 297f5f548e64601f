"""Differences between runs that share their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pretrain.metrics.intervals import Interval


def paired_difference(values: Sequence[float], reference: Sequence[float], *,
                      level: float = 0.95) -> tuple[float, Interval | None]:
    """Mean of values - reference, pair by pair, and its Student-t interval; None with fewer than two pairs.

    Pairing takes out what seeds share (data order, initialisation). With three seeds the interval is wide, as it
    should be: its factor is 4.30 standard errors, not 1.96.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).

    Raises:
        ValueError: sequences of unequal or zero length, or a level outside (0, 1).
    """
    if len(values) != len(reference) or not values:
        raise ValueError(f"{len(values)} values and {len(reference)} references")
    if not 0 < level < 1:
        raise ValueError(f"level {level} must lie in (0, 1)")
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n < 2:
        return mean, None
    from scipy.stats import t
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = float(t.ppf(0.5 + level / 2, n - 1)) * spread
    return mean, (mean - half, mean + half)
