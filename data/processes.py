"""Work spread over processes, of which any may die: pictures from the internet crash decoders and fill the memory."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_chunks(
    function: Callable[[Item], Result], items: Iterable[Item], chunk_size: int, num_workers: int
) -> Iterator[tuple[list[Item], list[Result | None]]]:
    """Apply a function in other processes; yield the results in order. None is an item that killed its process.

    Raises: OSError when no process can be started.
    """
    stream = iter(items)
    waiting: deque[tuple[list[Item], Future[list[Result]], ProcessPoolExecutor]] = deque()
    pool = _open_pool(num_workers)
    try:
        while True:
            while len(waiting) < 2 * num_workers + 2 and (chunk := list(itertools.islice(stream, chunk_size))):
                try:
                    future = pool.submit(_run_chunk, function, chunk)
                except BrokenProcessPool:
                    pool = _open_pool(num_workers)
                    future = pool.submit(_run_chunk, function, chunk)
                waiting.append((chunk, future, pool))
            if not waiting:
                return
            chunk, future, owner = waiting.popleft()
            results: list[Result | None]
            try:
                results = [*future.result()]
            except BrokenProcessPool:  # one process died, and all that the others held is lost with it
                if owner is pool:
                    pool = _open_pool(num_workers)
                results = _run_alone(function, chunk)
            yield chunk, results
    finally:
        pool.shutdown(cancel_futures=True)


def _run_chunk(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _run_alone(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result | None]:
    """Apply a function to items one at a time, with no process beside, so that it shows which one kills."""
    results: list[Result | None] = []
    pool = _open_pool(1)
    for item in chunk:
        try:
            results.append(pool.submit(function, item).result())
        except BrokenProcessPool:
            results.append(None)
            pool = _open_pool(1)
    pool.shutdown()
    return results


def _open_pool(num_workers: int) -> ProcessPoolExecutor:
    # Forks of a small process of its own, in which what takes long to import is there already: forks of this one would
    # copy all that it holds, and its locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data.packing"])
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker)
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool as error:  # else every item would seem to kill
        raise OSError(
            "processes that read rows and pictures cannot be started: is there memory, are there limits?"
        ) from error
    return pool


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process gets it, too, and stops them
    threading.Thread(target=_stop_with_parent, daemon=True).start()


def _stop_with_parent() -> None:
    """End a worker whose main process was killed: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
