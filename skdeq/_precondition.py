r"""Location and scale that put rows of any units on the footing the encoder is trained on.

Training sees :math:`\tilde x = ((x - \mu) / s, \beta)`: centred rows of mean squared norm
``SQUARED_NORM`` whatever the units and the number of features, and a constant input whose weight
is the bias. One learning rate then serves all data, and what was learned is folded back into
weights and bias for ``x`` itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skdeq._chunks import sum_chunks
from skdeq._host_data import fetched, is_away
from skdeq._observations import CompressedRows, Observations

__all__ = [
    "SQUARED_NORM",
    "Preconditioner",
    "RowBatches",
    "fit_preconditioner",
]

# Mean squared norm of the centred rows. The published learning rates are those of MNIST with
# pixels in [0, 1], whose rows have a mean squared norm of 88, or 53 once centred.
SQUARED_NORM = 100.0
# Squared size of the constant input. With 1 the bias lags behind the weights, and half as many
# activations again are non-zero (MNIST, 64 components, 10 epochs: 0.34 instead of 0.24); with 40
# components begin to die.
_SQUARED_CONSTANT = 13.0
_CHUNK_ENTRIES = 2**20
# Scales that float32 can divide by.
_SCALES = (1e-35, 1e35)
_SHIFT_ROWS = 1024


@dataclass(frozen=True)
class Preconditioner:
    """Location and scale of training rows.

    Attributes
    ----------
    location : Tensor of shape (p,), float64
        Mean of each feature; of one that does not vary the very value it has.
    scale : float
        Positive; what the centred rows are divided by.
    varying : Tensor of shape (p,), bool
        Features that are not the same in all rows.
    constant : float
        The input whose weight is the bias.
    farthest, its_share : int, float
        The row farthest from where the first ones are, and its share of all squared distances.
    """

    location: Tensor
    scale: float
    varying: Tensor
    constant: float = _SQUARED_CONSTANT**0.5
    farthest: int = 0
    its_share: float = 0.0

    def fold(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (K, p) and bias (K,), float64, for rows as they came from trained (K, p + 1)."""
        weights = weights.double().cpu()
        components = weights[:, :-1] / self.scale
        bias = self.constant * weights[:, -1] - components @ self.location
        return components, bias

    def unfold(self, components: Tensor, bias: Tensor) -> Tensor:
        """Weights (K, p + 1) for preconditioned rows; the inverse of :meth:`fold`."""
        components = components.double()
        constant = (bias.double() + components @ self.location) / self.constant
        return torch.cat([components * self.scale, constant.unsqueeze(1)], dim=1)


def fit_preconditioner(
    values: Tensor | CompressedRows, sample_weight: Tensor | None
) -> Preconditioner:
    """Location and scale of rows in one pass, chunk by chunk, with sums in float64.

    Raises
    ------
    ValueError
        If the scale is beyond what can be computed with.
    """
    n, p = values.shape
    size = max(1, _CHUNK_ENTRIES // p)
    # Sums of squares about a point among the data lose no digits to a distant origin.
    head = Observations(values).dense_rows(0, min(n, _SHIFT_ROWS, size))
    shift = head.double().mean(0)
    sums, farthest, its_distance = _sums_about(shift, values, sample_weight, size)
    total = float(n) if sample_weight is None else float(sample_weight.double().sum())
    first, second = sums / total
    variance = (second - first.square()).clamp_min(0)
    # The point is off a constant column by the rounding of a mean, a few eps of its value, and
    # nearly all of the square of that is subtracted again: what is left is less than the square
    # of one eps. What varies by no more than that is the rounding of whoever made the data. Each
    # column has a bound of its own, since a far one says nothing about the others.
    limit = torch.finfo(torch.float64).eps * (shift + first).abs()
    constant = variance.sqrt() <= limit
    # Not the mean, whose rounding would be an input that never changes.
    location = torch.where(constant, head[0].double(), shift + first).cpu()
    too_small = not bool(variance.any()) and bool((head != head[:1]).any())
    scale = _scale_of(variance[~constant], too_small=too_small)
    share = its_distance / float(sums[1].sum().clamp_min(torch.finfo(torch.float64).tiny))
    return Preconditioner(location, scale, ~constant.cpu(), farthest=farthest, its_share=share)


def _sums_about(
    shift: Tensor, values: Tensor | CompressedRows, sample_weight: Tensor | None, size: int
) -> tuple[Tensor, int, float]:
    """Add up rows and their squares (2, p) about a point, by chunks of so many rows.

    Also the row that is farthest from there, and its squared distance.
    """
    n, _ = values.shape
    dense_rows = Observations(values).dense_rows
    farthest = shift.new_zeros(2, -(-n // size))

    def work(start: int, stop: int) -> Tensor:
        rows = torch.sub(dense_rows(start, stop), shift)
        weight = rows.new_ones(len(rows))
        if sample_weight is not None:
            weight = sample_weight[start:stop].double()
        first = weight @ rows
        second = weight @ rows.square_()
        # A weight stands for so many rows, of which this is one.
        distance, place = torch.where(weight > 0, rows.sum(1), 0.0).max(0)
        # By chunk, of which there may be halves.
        so_far = farthest[:, start // size]
        here = torch.stack([distance, (place + start).to(distance)])
        farthest[:, start // size] = torch.where(distance > so_far[0], here, so_far)
        return torch.stack([first, second])

    sums = sum_chunks(work, n, size, shift.device)
    at = int(farthest[0].argmax())
    return sums, int(farthest[1, at]), float(farthest[0, at])


def _scale_of(variance: Tensor, *, too_small: bool) -> float:
    """Say what rows are divided by, from the variances of the features that vary.

    ``too_small`` says that there are such, but that the squares are below the least number.
    """
    spread = float(variance.sum())
    scale = (spread / SQUARED_NORM) ** 0.5 if len(variance) else 1.0
    if too_small or not _SCALES[0] < scale < _SCALES[1]:
        distance = f"of {spread**0.5:.1e}" if math.isfinite(spread) else "beyond all numbers"
        raise ValueError(
            f"The rows of X have a root mean square distance {distance} from their mean, too far "
            "from one to compute with; rescale X."
        )
    return scale


class RowBatches:
    """Batches of preconditioned rows; the data are never copied or densified as a whole.

    A batch is held centred but in the units of the data, next to the constant input; the products
    with it divide by the scale, which costs nothing there. Data that are too large for a card stay
    on the host, in their own type, and each batch is fetched while the one before is worked on.

    Parameters
    ----------
    values : Tensor of shape (n, p), of any real type, or CompressedRows
    preconditioner : Preconditioner
    dtype : torch.dtype
        Floating point type to work in.
    device : torch.device
        Device of the batches.

    Attributes
    ----------
    home : torch.device
        Where the data lie, and where indices into them are wanted.
    varying : Tensor of shape (p,), bool
        Features that are not the same in all rows, on the host.
    """

    def __init__(
        self,
        values: Tensor | CompressedRows,
        preconditioner: Preconditioner,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.values: Any = values
        self.sparse = isinstance(values, CompressedRows)
        self.n_rows, self.p = values.shape
        self.varying = preconditioner.varying
        self.device, self.home = device, values.device
        self._away = is_away(values, device)
        self._location = preconditioner.location.to(self.device, dtype)
        self._inverse = 1 / preconditioner.scale
        self._constant = preconditioner.constant * preconditioner.scale
        self._dtype = dtype
        self._buffers: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor | Any]] = {}
        self._none = torch.zeros(1, dtype=dtype, device=self.device)

    def _buffers_for(self, m: int, slot: int) -> tuple[Tensor, Tensor, Tensor | Any]:
        """Batch of m rows, its part without the constant input, and the rows as they came."""
        if (m, slot) not in self._buffers:
            batch = torch.empty(m, self.p + 1, dtype=self._dtype, device=self.device)
            batch[:, -1] = self._constant
            raw = None
            if not (self.sparse or self._away):
                raw = self.values.new_empty(m, self.p)
            self._buffers[m, slot] = (batch, batch[:, :-1], raw)
        return self._buffers[m, slot]

    def gather(self, index: Tensor, slot: int = 0) -> Tensor:
        """Return rows as a batch (m, p + 1), a buffer that the next call for a slot overwrites."""
        batch, rows, raw = self._buffers_for(len(index), slot)
        if self.sparse:
            some = self.values.take(index)
            if self._away:
                some = fetched(some, self.device)
            some.to_dense(out=rows)
            rows.sub_(self._location)
            return batch
        if self._away:
            raw = fetched(torch.index_select(self.values, 0, index), self.device)
        else:
            torch.index_select(self.values, 0, index, out=raw)
        torch.sub(raw, self._location, out=rows)
        return batch

    def project(self, batch: Tensor, weights: Tensor, out: Tensor) -> None:
        """Write the pre-activations (m, K) under weights (K, p + 1)."""
        torch.addmm(self._none, batch, weights.T, beta=0, alpha=self._inverse, out=out)

    def pull_back_(
        self, gradient: Tensor, batch: Tensor, out: Tensor, *, beta: float, alpha: float
    ) -> None:
        """Set ``out`` (K, p + 1) to ``beta out + alpha dL/dW`` from dL/da (m, K)."""
        out.addmm_(gradient.T, batch, beta=beta, alpha=alpha * self._inverse)
