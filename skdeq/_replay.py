"""Repeat a step of training without the cost of launching its kernels one by one."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Capture", "StepRunner", "capture_graph"]

# Calls with inputs of one shape before they are captured: the first ones allocate buffers and
# choose kernels, and none of that belongs into a graph; and a capture, which waits for the device,
# is not worth it for a batch of a stream that has hardly more.
_WARM_UP = 16

Step = Callable[..., None]
Capture = Callable[[Callable[[], None], torch.device], Callable[[], None]]


def capture_graph(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record what a function launches on a CUDA device, without running it; return its replay."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        # Torch's own stream belongs to the first device ever captured on; and another thread may
        # be fetching rows meanwhile.
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
    return graph.replay


class StepRunner:
    """Calls a step; on a card, captures it once for each shape of its inputs and replays that.

    A small step is a few dozen kernels that each take less time than their launch. A graph is
    one launch for all of them, and reads and writes where the captured call did. Therefore the
    inputs are copied to a place of their own before a replay, and everything else the step
    works on must stay where it is until :meth:`forget` is called.

    Parameters
    ----------
    step : callable
        Works in place on what it holds, and on tensors given to it, any of which may be None. It
        must not wait for the device.
    capture : callable, optional
        ``capture(function, device)`` gives what repeats a function without arguments; without it
        steps are called as they are.
    """

    def __init__(self, step: Step, capture: Capture | None = None):
        self._step, self._capture = step, capture
        self._calls: dict[tuple, int] = {}
        self._replays: dict[tuple, tuple[list[Tensor | None], Callable[[], None]]] = {}

    def __call__(self, *inputs: Tensor | None) -> None:
        """Run the step on tensors."""
        if self._capture is None:
            self._step(*inputs)
            return
        key = tuple(None if one is None else tuple(one.shape) for one in inputs)
        if key in self._replays:
            places, replay = self._replays[key]
            self._fill(places, inputs)
            replay()
            return
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= _WARM_UP:
            self._step(*inputs)
            return
        places = [None if one is None else one.clone() for one in inputs]
        device = next(one.device for one in places if one is not None)
        self._replays[key] = (places, self._capture(lambda: self._step(*places), device))
        self._replays[key][1]()

    @staticmethod
    def _fill(places: list[Tensor | None], inputs: tuple[Tensor | None, ...]) -> None:
        for place, one in zip(places, inputs, strict=True):
            if place is not None and one is not None:
                place.copy_(one)

    def forget(self) -> None:
        """Give up what was captured, because what the step works on has moved."""
        self._calls.clear()
        self._replays.clear()
