"""May retrieval be claimed? The decision rule of AFRB spec section 19, as a pure function of figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.metrics.needle import Nulls, Rate

MIN_EXAMPLES = 200
SEEDS = "A claim needs three seeds with the same result."
Outcome = Literal["retrieval", "no retrieval", "leak", "undecided"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the figures of one run allow to be said."""

    outcome: Outcome
    words: str


def decide(hit: Rate, nulls: Nulls, *, examples: int, shuffled: Rate | None, null_adapter: Rate | None) -> Verdict:
    """Retrieval is claimed only if the lower bound of the hit rate is above the strongest bag null and above all that
    the matched null adapter may reach, and the needle is not found where it does not stand.

    Args:
        hit: free-running hit rate.
        nulls: exact rates of guessers on this task.
        examples: how many needles were asked for.
        shuffled: hit rate with other ids in the needle's place, target unchanged; None: not measured.
        null_adapter: hit rate of the parameter-matched adapter without memory, trained alike; None: not measured.
    """
    told = f"{hit.value:.2%} of answer tokens ({hit.hits}/{hit.n}, 95% {hit.ci[0]:.2%} to {hit.ci[1]:.2%})"
    if shuffled is not None and not shuffled.at_uniform_chance(nulls.uniform):
        return Verdict("leak", f"Leak: with the needle replaced in the context the old one is still given in "
                       f"{shuffled.value:.2%} ({shuffled.hits}/{shuffled.n}); {told} is no retrieval.")
    if hit.ci[0] <= nulls.strongest:
        if hit.at_chance(nulls.uniform):
            return Verdict("no retrieval", f"No retrieval: {told} is what guessing any id gives "
                           f"({nulls.uniform:.4%}).")
        if hit.ci[0] <= nulls.context_bag:
            return Verdict("no retrieval", f"No retrieval: {told} is above guessing any id, not above guessing any "
                           f"token of the context ({nulls.context_bag:.2%}).")
        return Verdict("no retrieval", f"No retrieval shown: {told} is not above knowing the needle's tokens without "
                       f"their order ({nulls.needle_bag:.2%}).")
    if examples < MIN_EXAMPLES:
        return Verdict("undecided", f"Undecided: {told}, but {examples} examples are fewer than {MIN_EXAMPLES}.")
    if shuffled is None:
        return Verdict("undecided", f"Undecided: {told}, above every null, but the shuffled-needle control was not run "
                       "(--controls).")
    if null_adapter is None:
        return Verdict("undecided", f"Undecided: {told}, above every null and gone when the needle is shuffled, but no "
                       "matched null adapter was given (--null RUN).")
    if hit.ci[0] <= null_adapter.ci[1]:
        return Verdict("no retrieval", f"No retrieval by the memory: {told} is not above what the null adapter, which "
                       f"has none, may reach ({null_adapter.value:.2%}, up to {null_adapter.ci[1]:.2%}).")
    return Verdict("retrieval", f"Retrieval: {told}, above every null ({nulls.strongest:.2%}) and the null adapter "
                   f"({null_adapter.value:.2%}), at chance when the needle is shuffled. {SEEDS}")
