"""Run a function over chunks of rows, in parallel on the CPU, with results in a fixed order."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["chunk_bounds", "map_chunks"]

Result = TypeVar("Result")


def chunk_bounds(n_rows: int, size: int) -> list[tuple[int, int]]:
    """First and last-plus-one row of each chunk."""
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    # One torch thread per worker: a tile in cache is too small to be worth splitting, and the
    # barriers of the inner threads would cost more than the work. The setting is per thread but
    # also the default of threads to come, hence the restoration.
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(count)


def map_chunks(
    function: Callable[[int, int], Result], n_rows: int, size: int, device: torch.device
) -> list[Result]:
    """Apply ``function(start, stop)`` to every chunk; results come in the order of the rows.

    The chunks do not depend on the number of threads, and neither do the results.
    """
    bounds = chunk_bounds(n_rows, size)
    count = min(torch.get_num_threads(), len(bounds))
    if device.type != "cpu" or count < 2:
        return [function(start, stop) for start, stop in bounds]
    with _workers(torch.get_num_threads()) as pool:
        return list(pool.map(lambda bound: function(*bound), bounds))
