"""The processes that do the work of a stage, and what they report."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, TypeVar

from data_prep.workfolder import WorkKept
from pretrain.errors import DataCorruption, PretrainError, UserError

AHEAD = 2
"""Tasks that wait for each worker, so that none is idle between two."""
POLL_SECONDS = 0.5
_PARALLELISM = "TOKENIZERS_PARALLELISM"
R = TypeVar("R")
Advance = Callable[[int], None]
"""Told of bytes done."""
Stage = Callable[[Any, Advance], R]
"""Does one task in any process."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """An error with a meaning, on its way from a worker: its class and its one line."""

    kind: type[PretrainError]
    line: str


_stage: Stage[Any]
_done: Any
"""Of a worker process, set once when it starts: a pool offers no other place."""


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_stage(make: Callable[[], Stage[R]], tasks: Iterable[Any], workers: int, advance: Advance) -> Iterator[R]:
    """Results of all tasks, in their order, from `workers` processes; one worker is this very process.

    `make` (a function of a module, or a partial of one) gives the stage, once in each process. Raises what the stage
    raises of PretrainError as its one line, WorkKept where a process was killed.
    """
    if workers == 1:
        stage = make()
        for task in tasks:
            with _one_core():
                found = stage(task, advance)
            yield found
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the caller's threads in whatever state they are
    done = spawn.Value("q", 0)
    told = 0

    def tell() -> None:
        nonlocal told
        advance(done.value - told)
        told = done.value
    under_way: deque[Future[Any]] = deque()
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(make, done)) as pool:
        try:
            for task in tasks:
                under_way.append(pool.submit(_work, task))
                if len(under_way) > workers * AHEAD:
                    yield _result(under_way.popleft(), tell)
            while under_way:
                yield _result(under_way.popleft(), tell)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep the tokenizer library from threads of its own: one worker is one core."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


def _result(future: Future[Any], tell: Callable[[], None]) -> Any:
    while True:
        try:
            found = future.result(timeout=POLL_SECONDS)
        except TimeoutError:
            tell()
            continue
        except BrokenProcessPool:
            raise WorkKept("a worker process was killed, most likely for want of memory; use fewer workers or a "
                            "smaller max_document_bytes, and run again: finished work is kept") from None
        tell()
        if isinstance(found, _Failure):
            raise found.kind(found.line)
        return found


def _start_worker(make: Callable[[], Stage[Any]], done: Any) -> None:
    global _stage, _done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us in order
    os.environ[_PARALLELISM] = "false"  # one process, one core
    threading.Thread(target=_follow_parent, daemon=True).start()
    _stage, _done = make(), done


def _follow_parent() -> None:
    """Leave when the parent is gone: a killed parent closes no queue, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _advance(size: int) -> None:
    with _done.get_lock():
        _done.value += size


def _work(task: Any) -> Any:
    try:
        return _stage(task, _advance)
    except PretrainError as error:
        # Through a process boundary only class and text would survive, wrapped in a traceback.
        kinds: tuple[type[PretrainError], ...] = (DataCorruption, UserError, PretrainError)
        return _Failure(next(kind for kind in kinds if isinstance(error, kind)), str(error))
