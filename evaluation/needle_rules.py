"""Findings about a needle run that need evaluation figures (AFRB spec, section 17). Pure: nothing is changed here.

Rules are about any causal model; what they say of a memory is said where the model's schema has such a key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pretrain.config.needle import NeedleConfig
from pretrain.config.run import RunConfig
from pretrain.metrics.needle import Nulls, Rate
from pretrain.models.base import Diagnosis
from pretrain.monitor.rows import Row

SINGLE_PRECISION = 2.0**-24
"""What is smaller than this share of a state is lost in fp32."""
_WINDOW = 100
"""Steps over which a training figure is averaged before it is compared."""
_MEDIAN = 50
"""Steps whose median loss the last one is held against."""
_LEARNT = 0.1
"""Nats a token: a loss below, however often it doubles, is that of an answer that is known."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the rules look at."""

    step: int
    rates: Mapping[str, Rate]
    nulls: Nulls
    task: NeedleConfig
    config: RunConfig
    val_loss: float
    rows: Sequence[Row] = ()
    """Rows of metrics of the run so far."""
    controlled: bool = False
    """Whether the controls were run."""
    failed: Mapping[str, float] = field(default_factory=dict)
    """Of them, the hit rates of those above what a model without a leak reaches."""

    def model(self, key: str) -> object:
        """A key of the model's schema, None where it has no such key."""
        return getattr(self.config.model, key, None)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric."""
        pairs = [(float(row["step"]), float(row[key])) for row in self.rows  # type: ignore[arg-type]
                 if isinstance(row.get(key), (int, float)) and math.isfinite(float(row[key]))]  # type: ignore[arg-type]
        return np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])


def line(finding: Diagnosis) -> str:
    """As logs show it: `[DIAG:H3] finding | suggestion`."""
    return f"[DIAG:{finding.rule}] {finding.message} | {finding.remedy}"


def findings(evidence: Evidence) -> list[Diagnosis]:
    """Every rule that fires, in the order of the specification."""
    rules = (_no_retrieval, _too_good, _leak_without_memory, _echo, _diverging, _infonce, _memorised)
    return [found for rule in rules for found in rule(evidence)]


def _no_retrieval(e: Evidence) -> Iterator[Diagnosis]:
    hit = e.rates["needle_hit_rate"]
    if e.step >= 500 and hit.ci[0] <= e.nulls.uniform:
        causes = [*_causes(e)] or [("nothing in the configuration rules retrieval out", "train longer, or raise lr")]
        yield Diagnosis("H0", f"hit rate {hit.value:.2%} is not above chance {e.nulls.uniform:.2%}: "
                        + "; ".join(cause for cause, _ in causes), "; ".join(remedy for _, remedy in causes))


def _causes(e: Evidence) -> Iterator[tuple[str, str]]:
    """(cause, remedy) in the order in which they are worth looking at."""
    if e.model("kiss_ridge_calib") is False:
        yield "the readout was not calibrated", "model.kiss_ridge_calib true"
    if e.model("enable_pvm") is False:
        yield "there is no memory", "model.enable_pvm true"
    if e.model("readout_from") == "none":
        yield "no memory is read out", "model.readout_from pvm"
    if e.step < 3000:
        yield f"only {e.step} steps", "train longer"
    beta, distance = e.model("pvm_beta"), e.task.min_distance
    if e.model("enable_pvm") and isinstance(beta, float) and beta**distance < SINGLE_PRECISION:
        yield (f"the last state keeps {beta:g}^{distance} = {beta**distance:.2g} of the nearest needle, below "
               "single precision", f"model.pvm_beta of {0.1 ** (1 / distance):.4f} or more keeps a tenth")
    entropy = e.series("val/readout_entropy")[1]
    if len(entropy) and entropy[-1] > 0.95:
        yield f"the readout weighs all states alike ({entropy[-1]:.3f} of the highest entropy)", "a lower readout_tau"
    if e.task.needle_marker == "none":
        low, high = e.task.start_range
        yield (f"nothing marks the needle: even a perfect memory begins right in 1 of {high - low + 1} cases",
               "data.source.needle_marker key")


def _too_good(e: Evidence) -> Iterator[Diagnosis]:
    hit = e.rates["needle_hit_rate"]
    if e.failed:
        told = ", ".join(f"{name} {rate:.1%}" for name, rate in e.failed.items())
        yield Diagnosis("H1", f"the needle is still found where there is nothing to find ({told})",
                        "a leak: look for the answer in the inputs before reporting anything")
    elif not e.controlled and hit.value > 0.2:
        yield Diagnosis("H1", f"hit rate {hit.value:.1%} is above 20 %: a working memory or a leak",
                        "pretrain eval RUN --task needle --controls before reporting")


def _leak_without_memory(e: Evidence) -> Iterator[Diagnosis]:
    hit = e.rates["needle_hit_rate"]
    token_wise = e.model("n_afrb") == 0 and e.model("disable_attn") is True and not e.model("enable_pvm")
    if token_wise and not hit.at_uniform_chance(e.nulls.uniform):
        yield Diagnosis("H2", f"a model without attention and without memory finds {hit.hits} of {hit.n} tokens",
                        "a leak in task or evaluation: no figure of this setup counts")


def _echo(e: Evidence) -> Iterator[Diagnosis]:
    echo, hit = e.rates.get("needle_echo_rate"), e.rates["needle_hit_rate"]
    if echo is not None and not echo.at_chance(e.nulls.uniform) and echo.value >= 10 * hit.value:
        yield Diagnosis("H3", f"echo rate {echo.value:.1%} against {hit.value:.1%} found: the model repeats the token "
                        "it is looking at", "the echo is not retrieval; objective.legacy_loss false")


def _diverging(e: Evidence) -> Iterator[Diagnosis]:
    remedy = ("optim.grad_clip 0.5, optim.lr 1e-5, model.alpha 0.02, model.gamma 0.15, objective.infonce_tau 0.1; "
              "train.log names the batches, `pretrain data at RUN --batch K` shows them")
    skipped = e.series("skipped")[1]
    if len(skipped) and skipped[-1] > 0:
        yield Diagnosis("D1", f"{skipped[-1]:.0f} updates were skipped, not finite or spikes", remedy)
        return
    steps, loss = e.series("loss")
    lately = loss[steps > steps[-1] - _MEDIAN] if len(loss) else loss
    if len(lately) and loss[-1] > max(2 * float(np.median(lately)), _LEARNT):
        yield Diagnosis("D1", f"loss {loss[-1]:.3g} is above twice its median over {_MEDIAN} steps", remedy)


def _infonce(e: Evidence) -> Iterator[Diagnosis]:
    steps, loss = e.series("infonce_loss")
    if not len(loss) or steps[-1] < 300:
        return
    chance = math.log(1 + float(getattr(e.config.objective, "infonce_negatives", 0)))
    remedy = "objective.infonce_weight of 0.1 or less, infonce_tau 0.1, optim.lr 5e-5"
    newest = _mean(steps, loss, steps[-1])
    if newest > chance + 0.1:
        yield Diagnosis("N1", f"InfoNCE {newest:.2f} is above chance {chance:.2f}", remedy)
        return
    hundreds = [_mean(steps, loss, steps[-1] - back) for back in (2 * _WINDOW, _WINDOW, 0)]
    if hundreds[0] < hundreds[1] < hundreds[2]:
        told = ", ".join(f"{mean:.2f}" for mean in hundreds)
        yield Diagnosis("N1", f"InfoNCE has been rising for 300 steps ({told})", remedy)


def _memorised(e: Evidence) -> Iterator[Diagnosis]:
    steps, loss = e.series("lm_loss")
    if not len(loss):
        return
    remedy = "data.source.needle_train_size 0 streams new examples"
    newest = _mean(steps, loss, steps[-1])
    if e.val_loss - newest > 1.0:
        yield Diagnosis("O1", f"validation loss {e.val_loss:.2f} is {e.val_loss - newest:.2f} nats above training loss "
                        f"{newest:.2f}", remedy)
        return
    boundary = _epoch_drop(e, steps, loss)
    if boundary is not None:
        yield Diagnosis("O1", f"the largest drop of the training loss is where an epoch ends (step {boundary})", remedy)


def _epoch_drop(e: Evidence, steps: np.ndarray, loss: np.ndarray) -> int | None:
    """The step of the largest drop between rows where it is at an epoch's end (within 2 % of one) and stands out."""
    size, batch = e.task.needle_train_size, e.config.batch.global_batch_size
    if not size or not batch or len(loss) < 4:
        return None
    epoch = size / batch
    drops = loss[:-1] - loss[1:]
    at = int(np.argmax(drops))
    step = (steps[at] + steps[at + 1]) / 2
    away = abs(step / epoch - round(step / epoch)) * epoch
    near = away <= max(0.02 * epoch, (steps[at + 1] - steps[at]) / 2)
    clear = drops[at] > 4 * float(np.median(np.abs(drops)))
    return round(step) if near and clear and round(step / epoch) >= 1 else None


def _mean(steps: np.ndarray, values: np.ndarray, end: float) -> float:
    """Mean of the values in the window of steps that ends at `end`."""
    inside = (steps > end - _WINDOW) & (steps <= end)
    return float(values[inside].mean()) if inside.any() else math.nan
