"""Task `perplexity`: token-weighted loss, perplexity, bits per byte and accuracy of a causal language model.

The same functions serve validation during training (all ranks) and evaluation afterwards (one process), so the two
figures agree: both form sums a forward, add them in float64 and divide once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_prep.tokenizer import TOKEN_BYTES
from pretrain.config.interval import Interval
from pretrain.config.run import RunConfig
from pretrain.data.batch import Batch, SampleSource
from pretrain.data.open import eval_batches, open_validation
from pretrain.data.shards import ShardSource
from pretrain.engine.evaluator import EvalResult, Metric, RunView
from pretrain.errors import ConfigError, DataCorruption
from pretrain.metrics.intervals import cluster_bootstrap
from pretrain.metrics.lm import bits_per_byte, label_bytes, perplexity, token_weighted_loss
from pretrain.objectives.causal_lm import MODEL_INPUTS

TASK = "perplexity"
VERSION = 1
PREFIX = "val"
_NLL, _TOKENS, _CORRECT, _BYTES = range(4)


def tally(forward: Callable[..., Any], batches: Iterable[Batch], device: torch.device,
          token_bytes: np.ndarray | None = None) -> np.ndarray:
    """Sums of each forward.

    Args:
        forward: the model in eval mode, returning `LMOutput`.
        batches: with `input_ids`, `labels` and what else the model takes, [B, T] each.
        device: where the model is.
        token_bytes: [V] UTF-8 bytes of each token; None: bytes are not counted.

    Returns:
        [forwards, 4] float64: negative log-likelihood in nats, labelled tokens, of them guessed first, bytes.
    """
    rows = []
    with torch.no_grad():
        for batch in batches:
            inputs = {name: batch.tensors[name].to(device) for name in MODEL_INPUTS if name in batch.tensors}
            out = forward(**inputs)
            n_bytes = 0 if token_bytes is None else label_bytes(batch["labels"].numpy(), token_bytes)
            rows.append((float(out.nll_sum), int(out.n_tokens), int(out.n_correct), n_bytes))
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def figures(sums: np.ndarray, *, has_bytes: bool, prefix: str = PREFIX, seed: int = 0) -> EvalResult:
    """Metrics with intervals from the sums of `tally`.

    Intervals resample whole forwards, that is batches of windows: tokens of one text are not independent.
    """
    sums = sums[sums[:, _TOKENS] > 0]
    n = int(sums[:, _TOKENS].sum())
    loss = token_weighted_loss(sums[:, _NLL], sums[:, _TOKENS])

    def interval(top: int, bottom: int, scale: float = 1.0) -> tuple[float, float] | None:
        if len(sums) < 2 or not np.isfinite(sums).all():
            return None
        low, high = cluster_bootstrap(sums[:, top] * scale, sums[:, bottom], seed=seed)
        return low, high

    loss_ci = interval(_NLL, _TOKENS)
    metrics = {
        "loss": Metric(loss, n, False, loss_ci),
        "perplexity": Metric(perplexity(loss), n, False, loss_ci and (perplexity(loss_ci[0]), perplexity(loss_ci[1]))),
        "accuracy": Metric(float(sums[:, _CORRECT].sum()) / n if n else math.nan, n, True, interval(_CORRECT, _TOKENS)),
    }
    n_bytes = int(sums[:, _BYTES].sum())
    if has_bytes and n_bytes:
        metrics["bits_per_byte"] = Metric(bits_per_byte(math.fsum(sums[:, _NLL]), n_bytes), n_bytes, False,
                                          interval(_NLL, _BYTES, 1 / math.log(2)))
    return EvalResult({f"{prefix}/{name}": metric for name, metric in metrics.items()})


def read_token_bytes(source: SampleSource) -> np.ndarray | None:
    """[V] int32 UTF-8 bytes of each token of the dataset behind a source; None where that is not known.

    Raises DataCorruption for a table that is no table.
    """
    if not isinstance(source, ShardSource):
        return None
    path = source.manifest.folder / TOKEN_BYTES
    if not path.is_file():
        return None
    try:
        table: np.ndarray = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataCorruption(f"{path}: cannot be read ({error})") from None
    if table.ndim != 1 or table.dtype.kind not in "iu" or len(table) < source.manifest.vocab_size:
        raise DataCorruption(f"{path}: is {table.dtype} {list(table.shape)}, integers "
                             f"[{source.manifest.vocab_size}] are right")
    return table


@dataclass(frozen=True, slots=True)
class ValidationData:
    """What the figures are computed on."""

    source: SampleSource
    token_bytes: np.ndarray | None

    @classmethod
    def open(cls, config: RunConfig) -> ValidationData:
        """The run's validation data. Raises ConfigError where the run has none."""
        source = open_validation(config)
        if source is None:
            raise ConfigError("data.validation", "there is nothing to evaluate on: name a source, or prepare a dataset "
                              "with a val split")
        return cls(source, read_token_bytes(source))


class PerplexityEvaluator:
    """Validation during training. The first call opens the data; later calls reuse it."""

    name = TASK

    def __init__(self, every: Interval | None, max_batches: int | None = None) -> None:
        """`max_batches`: global batches an evaluation, spread evenly over the split; None: all of it."""
        self.every = every
        self.max_batches = max_batches
        self._data: ValidationData | None = None

    def evaluate(self, view: RunView) -> EvalResult:
        """Called on all ranks; each takes its share of every global batch."""
        if self._data is None:
            self._data = ValidationData.open(view.config)
        batch = view.config.batch.resolve(view.world)
        batches = eval_batches(self._data.source, rank=view.rank, world=view.world, batch_size=batch.micro_batch_size,
                               max_samples=max_samples(self.max_batches, batch.global_batch_size))
        own = tally(view.forward, batches, view.device, self._data.token_bytes)
        # Rank r's sums stand in row r, so that adding over ranks gathers them. MPS has no float64.
        device = torch.device("cpu") if view.device.type == "mps" else view.device
        gathered = torch.zeros(view.world, *own.shape, dtype=torch.float64, device=device)
        gathered[view.rank] = torch.from_numpy(own)
        sums = view.all_reduce(gathered).cpu().numpy().reshape(-1, own.shape[1])
        return figures(sums, has_bytes=self._data.token_bytes is not None)


def max_samples(max_batches: int | None, global_batch_size: int) -> int | None:
    """Windows in that many global batches; None: all."""
    return None if max_batches is None else max_batches * global_batch_size
