"""What torch's optimisers know of past steps, as numpy arrays that pickle without a device."""

from typing import Any

import numpy as np
import torch

from skdeq._base import to_numpy

__all__ = ["OptimiserState", "forget_steps", "restore_state", "saved_state"]

# One entry for each parameter, in the optimiser's order: name to array, empty before its first
# step.
OptimiserState = list[dict[str, np.ndarray]]


def saved_state(optimiser: torch.optim.Optimizer) -> OptimiserState:
    """Copy what an optimiser knows of each of its parameters."""
    known = optimiser.state_dict()["state"]
    count = sum(len(group["params"]) for group in optimiser.param_groups)
    return [
        # The momentum of plain steps is None.
        {name: to_numpy(value) for name, value in known.get(at, {}).items() if value is not None}
        for at in range(count)
    ]


def restore_state(optimiser: torch.optim.Optimizer, state: OptimiserState) -> None:
    """Let an optimiser, with its own options, go on from a state."""
    given: dict[str, Any] = optimiser.state_dict()
    given["state"] = {
        # Copies: optimisers work in place, and the state may be wanted as it was.
        at: {name: torch.tensor(value, device="cpu") for name, value in known.items()}
        for at, known in enumerate(state)
        if known
    }
    optimiser.load_state_dict(given)


def forget_steps(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Begin anew with steps so many times as long, after some that went astray."""
    optimiser.state.clear()
    for group in optimiser.param_groups:
        group["lr"] *= factor
