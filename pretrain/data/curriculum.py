"""A curriculum: the proportions of a mixture change at given batches.

Each stage draws its samples by an order of its own, from 0, keyed by its number; what it draws depends neither on how
long the stages before it lasted nor on what they drew. Batch k of the run is batch k - start of its stage, so that any
batch is still found at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from pretrain.config.source import OrderConfig
from pretrain.data.bijection import stream_key
from pretrain.data.order import GlobalOrder, I64Array, Order


class StagedOrder:
    """Which samples stand in batch k, stage after stage. Answers what `GlobalOrder` answers."""

    def __init__(self, starts: Sequence[int], orders: Sequence[GlobalOrder]) -> None:
        """`starts`: first batch of each stage, 0 first."""
        self.starts, self.orders = list(starts), list(orders)
        self.global_batch_size, self.n_sources = orders[0].global_batch_size, orders[0].n_sources

    @classmethod
    def of(cls, sizes: Sequence[int | None], stages: Sequence[tuple[int, Sequence[float]]], *, global_batch_size: int,
           seed: int, order: OrderConfig, period: int) -> Order:
        """The order of sources of these sizes with (first batch, weights) of each stage; one stage is a plain order.

        Raises ConfigError where lanes, batch, weights and sources do not fit.
        """
        orders = [GlobalOrder(sizes, global_batch_size=global_batch_size, seed=_stage_seed(seed, number), order=order,
                              weights=weights, period=period) for number, (_, weights) in enumerate(stages)]
        return orders[0] if len(orders) == 1 else cls([start for start, _ in stages], orders)

    @property
    def epoch_samples(self) -> None:
        """A mixture has no epochs."""

    def positions(self, k: int, start: int, stop: int) -> tuple[I64Array, I64Array]:
        """Source number [n] and sample id in that source [n] of rows [start, stop) of batch k."""
        order, batch = self._stage(k)
        return order.positions(batch, start, stop)

    def epochs(self, k: int, start: int, stop: int) -> I64Array:
        """Epoch [n] in which those rows are served, of their own source and counted from the start of the stage."""
        order, batch = self._stage(k)
        return order.epochs(batch, start, stop)

    def _stage(self, k: int) -> tuple[GlobalOrder, int]:
        number = bisect_right(self.starts, k) - 1
        return self.orders[number], k - self.starts[number]


def _stage_seed(seed: int, stage: int) -> int:
    return seed if stage == 0 else stream_key("order/stage", seed, stage) >> 1
