"""The global order: which sample stands in row j of batch k.

Batch k is a pure function of the sources' sizes, the mixture, the order section, the seed, the global batch size B and
k. World size, micro-batch size, accumulation, loader processes and restarts do not enter, so a run goes on with the
same batches wherever it is resumed, and any batch is found at once.

With C windows a chunk, G chunks a group and L lanes (L divides B), row j of batch k is place i = k*b + j % b of lane
l = j // b, where b = B / L. A source of W samples has n = W // C chunks, c = n // L of them in each lane.

    mixture    i' = i + l*P//L;  s = T[i' % P];  o = (i'//P)*n_s + prefix_s[i' % P] - prefix_s[l*P//L]
    epoch      e, q = divmod(o, c*C)
    group      g = q // (G*C);  m = min(G, c - g*G);  r = Phi[seed, s, e, l, g](q - g*G*C; m*C)
    window     (phase + Pi[seed, s, e](l*c + g*G + r//C; n)*C + r % C) mod W

T is the quota table of the mixture (see `quota_table`), Phi and Pi are keyed bijections. Three points need saying:

- Each lane reads T from its own place, l*P//L. Were all lanes at the same place, the rows of a batch would come from
  one source wherever b is small. Each lane still holds exactly n_s samples of s in any P places running.
- `phase` is drawn for each source and epoch where C does not divide W, else 0. Without it the last W % C windows
  would never be seen; with it the W - L*c*C windows that an epoch leaves out are different ones each time.
- With C = 1 the shuffle within a group adds nothing to Pi and is left out, so L = C = 1 is one plain bijection.

L = C = 1 suits local disks. For object stores raise C to chunks of megabytes and L to tens of lanes: each lane then
reads whole chunks one after the other. Given up are at most L*C - 1 windows an epoch, and any shuffle beyond the L
groups of G*C windows that are open at a time.

`shuffle: false` is the written order: each lane walks its own stretch of W // L samples.
A source without end (a generator) gives its samples in order: o*L + l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.config.source import OrderConfig
from pretrain.data.bijection import U64Array, as_keys, derive, permute, stream_key
from pretrain.errors import ConfigError

I64Array = NDArray[np.int64]

CACHE_POSITIONS = 16_384
"""Positions computed at once; numpy's cost a call is spread over them."""


def quota_table(weights: Sequence[float], period: int) -> NDArray[np.int32]:
    """[period] source of each place, in proportion to `weights` by largest remainder and evenly interleaved.

    Raises ConfigError for a weight above 0 so small that its source would have no place.
    """
    total = sum(weights)
    exact = [weight / total * period for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda s: (counts[s] - exact[s], s))
    for s in by_remainder[:period - sum(counts)]:
        counts[s] += 1
    for s, count in enumerate(counts):
        if count == 0 and weights[s]:
            raise ConfigError(f"data.source.parts.{s}.weight", f"{weights[s]:g} of {total:g} is less than a place in a "
                              f"period of {period}; raise data.source.period to {int(total / weights[s]) + 1} or more")
    # The j-th of n_s places stands at the middle of the j-th of n_s equal stretches of the period.
    middle = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return source[np.lexsort((source, middle))]


class Order(Protocol):
    """What the loader asks of an order."""

    global_batch_size: int
    n_sources: int

    @property
    def epoch_samples(self) -> int | None:
        """Samples of one epoch; None where there are no epochs."""

    def positions(self, k: int, start: int, stop: int) -> tuple[I64Array, I64Array]:
        """Source number [n] and sample id in that source [n] of rows [start, stop) of batch k."""

    def epochs(self, k: int, start: int, stop: int) -> I64Array:
        """Epoch [n] in which those rows are served, of their own source."""


class SourceOrder:
    """Order of the samples of one source: place o of lane l -> sample id. Independent of the batch size."""

    def __init__(self, size: int | None, *, seed: int, number: int, order: OrderConfig) -> None:
        """`size` is the number of samples, None where there is no end; `number` the source's place in the mixture.

        Raises ConfigError where the source is too small for one chunk in each lane.
        """
        self._size, self._lanes, self._shuffle = size, order.lanes, order.shuffle
        self._chunk = order.chunk_windows if order.shuffle else 1
        if size is None:
            return
        self._chunks = size // self._chunk
        self._lane_chunks = self._chunks // order.lanes
        if self._lane_chunks == 0:
            raise ConfigError("data.order", f"source {number} has {size} samples, less than lanes x chunk_windows = "
                              f"{order.lanes} x {self._chunk}; lower one of them, data.seq_len or data.stride")
        self._group = min(order.group_chunks or self._lane_chunks, self._lane_chunks)
        self._chunk_key = as_keys(stream_key("order/chunks", seed, number))
        self._group_key = as_keys(stream_key("order/groups", seed, number))
        self._phase_key = as_keys(stream_key("order/phase", seed, number))

    @property
    def epoch_samples(self) -> int | None:
        """Samples served in an epoch, over all lanes; None for a source without end."""
        return None if self._size is None else self._lanes * self._lane_chunks * self._chunk

    def epochs(self, places: I64Array) -> I64Array:
        """Passes over the source [N] that were over before `places` [N] of their lanes; 0 for a source without end."""
        return np.zeros_like(places) if self._size is None else places // (self._lane_chunks * self._chunk)

    def samples(self, places: I64Array, lanes: I64Array) -> I64Array:
        """Sample ids [N] of `places` [N] (o) in `lanes` [N] (l)."""
        if self._size is None:
            return places * self._lanes + lanes
        lane_samples = self._lane_chunks * self._chunk
        if not self._shuffle:
            return lanes * lane_samples + places % lane_samples
        epochs, within = np.divmod(places.astype(np.uint64), np.uint64(lane_samples))
        lane_start = lanes.astype(np.uint64) * np.uint64(self._lane_chunks)
        # All positions of a call mostly lie in one epoch: one key then does for all.
        epochs = epochs[:1] if epochs.size and epochs.min() == epochs.max() else epochs
        chunk_keys = derive(self._chunk_key, epochs)
        if self._chunk == 1:
            return permute(lane_start + within, self._chunks, chunk_keys).astype(np.int64)
        chunk_windows = np.uint64(self._chunk)
        shuffled = self._within_groups(within, epochs, lanes)
        chunk, inside = np.divmod(shuffled, chunk_windows)
        window = permute(lane_start + chunk, self._chunks, chunk_keys) * chunk_windows + inside
        if self._size % self._chunk:
            window = (window + derive(self._phase_key, epochs) % np.uint64(self._size)) % np.uint64(self._size)
        return window.astype(np.int64)

    def _within_groups(self, within: U64Array, epochs: U64Array, lanes: I64Array) -> U64Array:
        """Shuffle places of a lane's epoch inside their groups: q -> g*G*C + r."""
        full = self._group * self._chunk
        group = within // np.uint64(full)
        start = group * np.uint64(full)
        keys = derive(derive(derive(self._group_key, epochs), lanes.astype(np.uint64)), group)
        whole_groups, rest = divmod(self._lane_chunks, self._group)
        in_last = group >= np.uint64(whole_groups)
        if not in_last.any():
            return start + permute(within - start, full, keys)
        shuffled = np.empty_like(within)
        for chosen, size in ((~in_last, full), (in_last, rest * self._chunk)):
            if chosen.any():
                shuffled[chosen] = start[chosen] + permute((within - start)[chosen], size, keys[chosen])
        return shuffled


class GlobalOrder:
    """Which samples stand in batch k of a run."""

    def __init__(self, source_sizes: Sequence[int | None], *, global_batch_size: int, seed: int, order: OrderConfig,
                 weights: Sequence[float] = (1.0,), period: int = 1) -> None:
        """`source_sizes`: samples of each source, None without end; `weights` and `period` of the quota table.

        Raises ConfigError where the lanes do not divide the batch, or a source is too small.
        """
        if global_batch_size % order.lanes:
            raise ConfigError("data.order.lanes", f"{order.lanes} does not divide the global batch of "
                              f"{global_batch_size}")
        self.global_batch_size, self.n_sources = global_batch_size, len(source_sizes)
        self._lanes = order.lanes
        self._sources = [SourceOrder(size, seed=seed, number=s, order=order) for s, size in enumerate(source_sizes)]
        self._table = quota_table(weights, period)
        self._counts = np.bincount(self._table, minlength=len(self._sources))
        self._rank_in_table = np.empty(period, np.int64)  # prefix_s[p] for s = T[p]
        self._before_lane = np.zeros((len(self._sources), order.lanes), np.int64)  # prefix_s[l*P//L]
        self._lane_offset = np.arange(order.lanes, dtype=np.int64) * period // order.lanes
        for s in range(len(self._sources)):
            places = np.flatnonzero(self._table == s)
            self._rank_in_table[places] = np.arange(len(places))
            self._before_lane[s] = np.searchsorted(places, self._lane_offset)
        self._cached: tuple[int, int, int] | None = None
        self._cache: tuple[I64Array, I64Array, I64Array] | None = None

    @property
    def epoch_samples(self) -> int | None:
        """Samples of one epoch; None for mixtures and sources without end."""
        return self._sources[0].epoch_samples if len(self._sources) == 1 else None

    def positions(self, k: int, start: int, stop: int) -> tuple[I64Array, I64Array]:
        """Source number [n] and sample id in that source [n] of rows [start, stop) of batch k.

        Batches around k are computed together and kept; the cost does not depend on k.
        """
        sources, samples, _ = self._served(k, start, stop)
        return sources, samples

    def epochs(self, k: int, start: int, stop: int) -> I64Array:
        """How often each of rows [start, stop) of batch k was served before by its source, [n]."""
        return self._served(k, start, stop)[2]

    def _served(self, k: int, start: int, stop: int) -> tuple[I64Array, I64Array, I64Array]:
        """Sources, samples and epochs."""
        rows = stop - start
        batches = max(1, CACHE_POSITIONS // max(1, rows))
        first = k - k % batches
        if self._cache is None or self._cached != (first, start, stop):
            self._cache = self._compute(first, batches, start, stop)
            self._cached = (first, start, stop)
        at = (k - first) * rows
        sources, samples, epochs = (column[at:at + rows] for column in self._cache)
        return sources, samples, epochs

    def _compute(self, first: int, batches: int, start: int, stop: int) -> tuple[I64Array, I64Array, I64Array]:
        """Sources, samples and epochs of rows [start, stop) of batches [first, first + batches), batch by batch."""
        lane_rows = self.global_batch_size // self._lanes
        row = np.arange(start, stop, dtype=np.int64)
        lanes = np.tile(row // lane_rows, batches)
        batch = np.arange(first, first + batches, dtype=np.int64)
        places = (batch[:, None] * lane_rows + row % lane_rows).ravel()
        if len(self._sources) == 1:
            return np.zeros_like(places), self._sources[0].samples(places, lanes), self._sources[0].epochs(places)
        period, place = np.divmod(places + self._lane_offset[lanes], len(self._table))
        source = self._table[place].astype(np.int64)
        within = period * self._counts[source] + self._rank_in_table[place] - self._before_lane[source, lanes]
        samples, epochs = np.empty_like(within), np.empty_like(within)
        for s, order in enumerate(self._sources):
            chosen = source == s
            samples[chosen] = order.samples(within[chosen], lanes[chosen])
            epochs[chosen] = order.epochs(within[chosen])
        return source, samples, epochs
