"""Size factors of rows from their totals, on tensors alone."""

import torch
from torch import Tensor

__all__ = ["log_exposure"]

# Log exposure of a row without any count: finite, with expected counts below rounding.
_OF_NOTHING = -40.0
# Share of a mean row that entries are expected to have at least: where training saw none of them
# it says nothing of the size of a row that has.
_LEAST_EXPECTED = 1e-6


def log_exposure(total: Tensor, expected: Tensor, whole: Tensor) -> Tensor:
    """Log size factors of rows, (n,).

    Parameters
    ----------
    total : Tensor of shape (n,)
        Of the observed entries of each row.
    expected : Tensor of shape (n,) or ()
        Of the same entries of a mean row.
    whole : Tensor of shape ()
        Of all entries of a mean row.
    """
    least = (_LEAST_EXPECTED * whole).clamp_min(torch.finfo(total.dtype).tiny)
    is_empty = total <= 0
    # Not the logarithm of nought, whose gradient is none.
    ratio = torch.where(is_empty, 1.0, total) / torch.maximum(expected, least)
    return torch.where(is_empty, _OF_NOTHING, torch.log(ratio))
