"""Run a function over chunks of rows, in parallel on the CPU, with results in a fixed order."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["chunk_bounds", "map_chunks", "one_ahead", "parallel_chunks"]

Result = TypeVar("Result")

_local = threading.local()
_lock = threading.Lock()
_shared = {"inside": 0, "threads": 1}


def chunk_bounds(n_rows: int, size: int) -> list[tuple[int, int]]:
    """First and last-plus-one row of each chunk."""
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


@contextmanager
def parallel_chunks() -> Iterator[None]:
    """Let the calls of :func:`map_chunks` inside share one pool of threads.

    The pool has as many threads as torch would use, and inside torch itself uses one: whole
    chunks are worked on side by side, instead of every small operation being split. A chunk in
    cache is too small to be worth splitting, and where another process wants a core the barriers
    of split operations cost tens of times the work. The number of torch's threads is restored on
    leaving. Of several Python threads in here at once, only the first has a pool, so that they do
    not use more cores than torch was given.
    """
    if getattr(_local, "inside", False):
        yield
        return
    with _lock:
        if _shared["inside"] == 0:
            _shared["threads"] = torch.get_num_threads()
        _shared["inside"] += 1
        alone = _shared["inside"] == 1
        threads = _shared["threads"]
    pool = None
    try:
        if alone and threads > 1:
            pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        torch.set_num_threads(1)
        _local.inside, _local.pool = True, pool
        yield
    finally:
        _local.inside, _local.pool = False, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        with _lock:
            _shared["inside"] -= 1
            # Torch keeps one number per thread and one for threads to come; this sets both.
            torch.set_num_threads(threads)


def map_chunks(
    function: Callable[[int, int], Result], n_rows: int, size: int, device: torch.device
) -> list[Result]:
    """Apply ``function(start, stop)`` to every chunk; results come in the order of the rows.

    The chunks do not depend on the number of threads, and neither do the results.
    """
    bounds = chunk_bounds(n_rows, size)
    pool = getattr(_local, "pool", None)
    if pool is None or device.type != "cpu" or len(bounds) < 2:
        return [function(start, stop) for start, stop in bounds]
    return list(pool.map(lambda bound: function(*bound), bounds))


def one_ahead(function: Callable[..., Result], arguments: Iterable[tuple]) -> Iterator[Result]:
    """Yield ``function(*one)`` for each of the arguments, the next being worked on meanwhile.

    A result must stay valid until the one after the next is asked for. Without the pool of
    :func:`parallel_chunks` each is computed when it is asked for.
    """
    pool = getattr(_local, "pool", None)
    if pool is None:
        for one in arguments:
            yield function(*one)
        return
    pending = None
    for one in arguments:
        upcoming = pool.submit(function, *one)
        if pending is not None:
            yield pending.result()
        pending = upcoming
    if pending is not None:
        yield pending.result()
