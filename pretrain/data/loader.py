"""From the global order to whole updates of one rank."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from pretrain.config.run import ResolvedBatch
from pretrain.data.allocator import keep_freed_memory
from pretrain.data.batch import Batch, SampleSource
from pretrain.data.mixture import pack
from pretrain.data.order import Order
from pretrain.data.transfer import HAS_MEMFD, Parcel
from pretrain.errors import DataCorruption, PretrainError, UserError


@dataclass(frozen=True, slots=True)
class Update:
    """What one rank contributes to one optimizer update."""

    k: int
    """Number of the global batch."""
    micro_batches: list[Batch]


def read_rows(source: SampleSource, order: Order, k: int, start: int, stop: int) -> Batch:
    """Rows [start, stop) of global batch k.

    `sample_ids` are positions in the run's order, k * B + row. Beside the source's own tensors there are `source_ids`
    [n] int64, the sample served from its source, and `source_index` [n] int64, which part of a mixture that is.
    """
    parts, samples = order.positions(k, start, stop)
    ids = pack(parts, samples)
    in_epoch = getattr(source, "get_in_epoch", None)  # an EpochSource; asking isinstance takes as long as ten windows
    served = source.get(ids) if in_epoch is None else in_epoch(ids, order.epochs(k, start, stop))
    tensors = dict(served.tensors)
    tensors["source_ids"] = torch.from_numpy(samples.copy())
    if order.n_sources > 1:
        tensors["source_index"] = torch.from_numpy(parts.copy())
    positions = np.arange(start, stop, dtype=np.int64) + k * order.global_batch_size
    return Batch(torch.from_numpy(positions), tensors)


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error with a meaning, on its way from a loader process: its class and its one line."""

    kind: type[PretrainError]
    line: str


_Rows = dict[str, torch.Tensor] | Parcel | _Failure
_IDS = "sample_ids"


class _RankRows(Dataset[_Rows]):
    """k -> the rows of one rank in batch k."""

    def __init__(self, source: SampleSource, order: Order, start: int, stop: int) -> None:
        self.source, self.order, self.start, self.stop = source, order, start, stop

    def __getitem__(self, k: int) -> _Rows:
        try:
            batch = read_rows(self.source, self.order, k, self.start, self.stop)
        except PretrainError as error:
            # Through a process boundary only class and text would survive, wrapped in a traceback.
            kinds: tuple[type[PretrainError], ...] = (DataCorruption, UserError, PretrainError)
            return _Failure(next(kind for kind in kinds if isinstance(error, kind)), str(error))
        tensors = {_IDS: batch.sample_ids, **batch.tensors}
        return Parcel(tensors) if HAS_MEMFD and get_worker_info() else tensors


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def _start_worker(number: int) -> None:
    """Leave stopping to the trainer: signals sent to the whole process group must not take the loader away first."""
    keep_freed_memory()
    for name in _STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)


class UpdateLoader:
    """Iterates over the updates k = start_k, start_k + 1, ... of one rank, without end.

    Rank d takes rows [d*B/D, (d+1)*B/D) of each global batch, its micro-batches are contiguous inside. Any start is
    reached at once. `workers` > 0 reads ahead in that many processes, `prefetch` updates each, and still yields in
    order. Use as a context manager or call `close`.

    Raises, when iterated:
        DataCorruption, UserError: what the source found wrong, as one line.
        PretrainError: a loader process was killed.
    """

    def __init__(self, source: SampleSource, order: Order, batch: ResolvedBatch, *, rank: int, start_k: int = 0,
                 workers: int = 0, prefetch: int = 2, pin_memory: bool = False) -> None:
        if not workers:
            keep_freed_memory()
        share = batch.global_batch_size // batch.data_parallel_size
        self._rank, self._micro_batch_size, self._next_k = rank, batch.micro_batch_size, start_k
        rows = _RankRows(source, order, rank * share, (rank + 1) * share)
        # A generator of its own: the loader would draw its base seed from the global one and change training.
        loader = DataLoader(rows, batch_size=None, sampler=itertools.count(start_k), num_workers=workers,  # type: ignore[arg-type]
                            prefetch_factor=prefetch if workers else None, pin_memory=pin_memory,
                            worker_init_fn=_start_worker, generator=torch.Generator())
        on_child_exit = signal.getsignal(signal.SIGCHLD)
        # Blocked while the processes start, who inherit that: none can be hit before it has learned to ignore.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self._iterator: Iterator[_Rows] | None = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if workers and threading.current_thread() is threading.main_thread():
            # torch installs a handler that raises wherever the trainer happens to be; we look while we wait instead.
            signal.signal(signal.SIGCHLD, on_child_exit)

    def __iter__(self) -> Iterator[Update]:
        return self

    def __next__(self) -> Update:
        """The next update. Blocks until it is read."""
        if self._iterator is None:
            raise StopIteration
        try:
            rows = next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            if all(worker.is_alive() for worker in self._processes()):
                raise
            raise PretrainError(f"rank {self._rank}: a data loader process died before it gave batch {self._next_k} "
                                "(killed, or out of memory); lower data.workers or data.prefetch") from error
        if isinstance(rows, _Failure):
            raise rows.kind(rows.line)
        assert isinstance(rows, dict)  # a parcel arrives as what it holds
        whole = Batch(rows.pop(_IDS), rows)
        size = self._micro_batch_size
        update = Update(self._next_k, [whole.rows(at, at + size) for at in range(0, len(whole), size)])
        self._next_k += 1
        return update

    def _processes(self) -> list[torch.multiprocessing.Process]:
        """Loader processes; torch has no public name for them."""
        return list(getattr(self._iterator, "_workers", ()))

    def close(self) -> None:
        """Stop the loader processes. A second call does nothing."""
        processes = self._processes()
        shut_down = getattr(self._iterator, "_shutdown_workers", None)
        self._iterator = None
        if shut_down is not None:
            shut_down()
        for process in processes:
            if process.is_alive():  # stuck in a read; it ignores SIGTERM
                process.kill()

    def __enter__(self) -> UpdateLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
