"""Run a function over chunks of rows, in parallel on the CPU, with results in a fixed order."""

import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

from skdeq._warn import warn

__all__ = [
    "chunk_bounds",
    "chunks_in_turn",
    "free_memory",
    "map_chunks",
    "one_ahead",
    "out_of_inference_mode",
    "parallel_chunks",
    "sum_chunks",
    "tile_entries",
    "working_entries",
]

# Share of the free memory of a device that one working array of a chunk may take: about eight of
# its size are alive at once.
_WORKING_SHARE = 1 / 16
# Entries of a tile: small enough for the cache of a core, where it is filled, transformed and
# reduced (full-size temporaries are 5-10 times slower), and large enough that Python, whose lock
# the threads share, is a small part of the work.
_TILE_ENTRIES = 2**20
# The same on a card: all that keeps it busy, less where its memory is short.
_TILE_ENTRIES_CUDA = 2**26
_LEAST_ENTRIES_CUDA = 2**20

Result = TypeVar("Result")

# Sums that `sum_chunks` holds at a time, and so the most threads that it keeps busy.
_MOST_SUMS = 16


class _PerThread(threading.local):
    """What a thread is in the middle of: nothing, but within :func:`parallel_chunks`."""

    inside = False
    pool: ThreadPoolExecutor | None = None
    # How often chunks were halved, for want of memory.
    halvings = 0
    # Entries of the tiles of devices and types.
    tiles: dict[tuple[torch.device, int], int] | None = None


_local = _PerThread()
_lock = threading.Lock()
_shared = {"inside": 0, "threads": 1}


def _begin_anew_after_fork() -> None:
    """Forget the threads of the parent, which a forked process has not.

    Torch's OpenMP threads are gone, too, but the runtime waits for them all the same: whatever is
    split in a child hangs if anything was in its parent. One thread is what torch itself gives its
    own forked workers; who knows better may call ``torch.set_num_threads``.
    """
    global _lock
    _lock = threading.Lock()
    _shared["inside"] = 0
    vars(_local).clear()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew_after_fork)


@cache
def _keep_freed_memory() -> None:
    """Let glibc's allocator keep freed temporaries of up to 32 MiB for the next ones.

    It gives back to the system what is above a threshold, page by page zeroed when asked for
    again: up to a third of the time of a pass over tiles that two threads share. The threshold
    rises to the size of a block that is freed; this one is never touched and so takes no memory.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")


def chunk_bounds(n_rows: int, size: int) -> list[tuple[int, int]]:
    """First and last-plus-one row of each chunk."""
    return [(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


@contextmanager
def out_of_inference_mode() -> Iterator[None]:
    """Work on tensors that may have gradients, though the caller wants none.

    Threads of a pool do not inherit the mode, and may not write to tensors of it.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


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
    if _local.inside:
        yield
        return
    _keep_freed_memory()
    pool, threads, counted = None, 1, False
    try:
        with _lock:
            if _shared["inside"] == 0:
                _shared["threads"] = torch.get_num_threads()
            _shared["inside"] += 1
            counted = True
            alone = _shared["inside"] == 1
            threads = _shared["threads"]
        if alone and threads > 1:
            pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        torch.set_num_threads(1)
        _local.inside, _local.pool, _local.tiles = True, pool, {}
        with out_of_inference_mode():
            yield
    finally:
        vars(_local).clear()
        try:
            _end(pool)
        finally:
            if counted:
                with _lock:
                    # Below zero in a process that was forked in here, which began to count anew.
                    _shared["inside"] = max(0, _shared["inside"] - 1)
                    # Torch has one number per thread and one for threads to come; this sets both.
                    torch.set_num_threads(threads)


def _end(pool: ThreadPoolExecutor | None) -> None:
    """Wait for the threads of a pool to end, also if the wait itself is interrupted."""
    if pool is None:
        return
    try:
        pool.shutdown(wait=True, cancel_futures=True)
    except BaseException:
        # Ctrl-C while waiting; the threads finish their chunk and no more.
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def map_chunks(
    function: Callable[[int, int], Result], n_rows: int, size: int, device: torch.device
) -> list[Result]:
    """Apply ``function(start, stop)`` to every chunk; results come in the order of the rows.

    The chunks do not depend on the number of threads, and neither do the results. Where a device
    runs out of memory the chunk is halved and tried again, and chunks are no larger from then on,
    within one :func:`parallel_chunks`; ``function`` must therefore bear being called twice.
    """
    pool = _local.pool
    if pool is None or device.type != "cpu" or n_rows <= size:
        return list(chunks_in_turn(function, n_rows, size, device))
    return list(pool.map(lambda bound: function(*bound), chunk_bounds(n_rows, size)))


def sum_chunks(
    function: Callable[[int, int], torch.Tensor], n_rows: int, size: int, device: torch.device
) -> torch.Tensor:
    """Add up ``function(start, stop)`` over every chunk, with no more than a few sums at hand.

    As :func:`map_chunks`, whose results would all be there at once: of wide data, where chunks
    have few rows, many times the data.
    """

    def work(first: int, last: int) -> torch.Tensor:
        parts = chunks_in_turn(
            lambda start, stop: function(first + start, first + stop), last - first, size, device
        )
        # Not what the function has returned: it may be a view, or expanded.
        total = next(parts).clone()
        for part in parts:
            total += part
        return total

    together = size * max(1, -(-n_rows // (size * _MOST_SUMS)))
    return torch.stack(map_chunks(work, n_rows, together, device)).sum(0)


def chunks_in_turn(
    function: Callable[[int, int], Result], n_rows: int, size: int, device: torch.device
) -> Iterator[Result]:
    """Yield ``function(start, stop)`` of one chunk after the other.

    As :func:`map_chunks`, halving included, but a result can be let go before the next is made.
    """
    start, halvings = 0, _local.halvings
    while start < n_rows:
        rows = min(max(1, size >> halvings), n_rows - start)
        result = _unless_out_of_memory(function, start, start + rows)
        if result is None:
            if rows == 1:
                # Nothing left to halve: the error itself says how much was wanted.
                yield function(start, start + 1)
                start += 1
                continue
            if halvings == 0:
                _warn_of_memory(rows, device)
            # The last chunk may be smaller than the others.
            while size >> halvings >= rows:
                halvings += 1
            if _local.inside:
                _local.halvings = halvings
            # Not while the error is handled, which keeps alive what the failed call had made.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield result[0]
        start += rows


def _unless_out_of_memory(function: Callable, start: int, stop: int) -> tuple | None:
    """Return the result of a function in a tuple, or None if a device had not the memory."""
    try:
        return (function(start, stop),)
    # The name that all supported versions of torch have.
    except torch.cuda.OutOfMemoryError:
        return None


def _warn_of_memory(rows: int, device: torch.device) -> None:
    warn(
        f"{rows} rows at a time were too many for the memory of {device}; going on with half of "
        "them or fewer, with the same results in more time.",
        RuntimeWarning,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a CUDA device has free, with those that torch keeps but does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def working_entries(device: torch.device, most: int, least: int, itemsize: int) -> int:
    """Entries of a working array on a device other than the CPU, from the memory it has free.

    A power of two between ``least`` and ``most``, so that it depends on the device and not on
    what little more or less is in use: the same chunks give the same results.
    """
    entries = int(free_memory(device) * _WORKING_SHARE / itemsize)
    return max(least, min(most, 1 << max(entries, 1).bit_length() - 1))


def tile_entries(like: torch.Tensor) -> int:
    """Entries of a tile on the device of a tensor, in its type."""
    if like.device.type == "cpu":
        return _TILE_ENTRIES
    # To ask for the free memory takes as long as launching dozens of kernels.
    known = {} if _local.tiles is None else _local.tiles
    key = like.device, like.element_size()
    if key not in known:
        known[key] = working_entries(
            like.device, _TILE_ENTRIES_CUDA, _LEAST_ENTRIES_CUDA, like.element_size()
        )
    return known[key]


def one_ahead(function: Callable[..., Result], arguments: Iterable[tuple]) -> Iterator[Result]:
    """Yield ``function(*one)`` for each of the arguments, the next being worked on meanwhile.

    A result must stay valid until the one after the next is asked for. Without the pool of
    :func:`parallel_chunks` each is computed when it is asked for.
    """
    pool = _local.pool
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
