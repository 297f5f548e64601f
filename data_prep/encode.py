"""Tokenizing in worker processes, in order and with a bounded amount of text under way."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.tokenizer import encode, load_tokenizer

CHUNK_BYTES = 1 << 20
"""Text sent to a worker at once: large against the cost of a message, small against memory."""
CHUNKS_A_WORKER = 3
"""Chunks under way for each worker, so that none waits while results are written."""
Ids = npt.NDArray[Any]
Encoded = tuple[Ids, npt.NDArray[np.int64]]

_tokenizer: tuple[Tokenizer, int | None]
"""Of a worker process, set once when it starts: a pool offers no other place."""


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(path: Path, eos: int | None) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us in order
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    _tokenizer = load_tokenizer(path), eos
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """Leave when the parent is gone: a killed parent closes no queue, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _encode_chunk(texts: list[bytes]) -> Encoded:
    tokenizer, eos = _tokenizer
    return encode(tokenizer, [text.decode() for text in texts], eos)


class HasTexts(Protocol):
    """What texts are taken from: a document has one, a pair two and more."""

    @property
    def texts(self) -> list[bytes]:
        """UTF-8, each encoded by itself."""


Item = TypeVar("Item", bound=HasTexts)


def encode_items(kept: Iterable[Item], tokenizer_path: Path, eos: int | None,
                 workers: int) -> Generator[tuple[Item, list[Ids]]]:
    """(item, ids of each of its texts, with `eos` at the end unless it is None) in the order of `kept`.

    The number of workers does not show. Memory: at most workers * CHUNKS_A_WORKER chunks and the largest items under
    way.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads in whatever state they are
    under_way: deque[tuple[list[Item], Future[Encoded]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker,
                             initargs=(tokenizer_path, eos)) as pool:
        try:
            for chunk in _chunks(kept):
                under_way.append((chunk, pool.submit(_encode_chunk, [text for item in chunk for text in item.texts])))
                if len(under_way) > workers * CHUNKS_A_WORKER:
                    yield from _unpack(*under_way.popleft())
            while under_way:
                yield from _unpack(*under_way.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(kept: Iterable[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    size = 0
    for item in kept:
        chunk.append(item)
        size += sum(map(len, item.texts))
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _unpack(chunk: list[Item], future: Future[Encoded]) -> Iterator[tuple[Item, list[Ids]]]:
    tokens, lengths = future.result()
    texts = iter(np.split(tokens, np.cumsum(lengths)[:-1]))
    for item in chunk:
        yield item, [next(texts) for _ in item.texts]
