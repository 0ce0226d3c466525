"""Steps of a head on the equilibrium layer, and of the layer with it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from skdeq._base import numpy_dtype, to_numpy, to_tensor, torch_dtype
from skdeq._data import brought, rows_of
from skdeq._head import Head, outputs_of
from skdeq._optimiser_state import (
    OptimiserState,
    forget_steps,
    restore_state,
    saved_state,
)
from skdeq._stochastic import shorten

if TYPE_CHECKING:
    from skdeq.nn import EquilibriumLayer

__all__ = ["HeadOptions", "HeadTrainer", "TrainingRows"]


# Scaled residual to which the latents of a minibatch are solved, at least.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class HeadOptions:
    """Options of a fit, as the estimators document them."""

    fine_tune: bool
    dropout: float
    learning_rate: float
    backbone_learning_rate: float
    weight_decay: float
    batch_size: int
    max_iter: int
    tol: float
    n_iter_no_change: int


@dataclass
class TrainingRows:
    """What a fit is given: validated data, targets, weights, and the latents of every row.

    Attributes
    ----------
    X : Tensor or CSR array of shape (n, p)
    targets : ndarray of shape (n,) or (n, n_outputs)
    sample_weight : ndarray of shape (n,) or None
    latents : ndarray of shape (n, k)
        Of the backbone's top layer before training.
    device : torch.device
    """

    X: object
    targets: np.ndarray
    sample_weight: np.ndarray | None
    latents: np.ndarray
    device: torch.device


class HeadTrainer:
    """The head and the equilibrium layer in training.

    Parameters
    ----------
    layer : EquilibriumLayer
    head : Head
    options : HeadOptions
    rows : TrainingRows
    loss : callable
        ``loss(outputs, targets)`` gives the loss of each row.
    generator : torch.Generator
        On the CPU; draws minibatches, and the entries that are left out.
    """

    def __init__(
        self,
        layer: "EquilibriumLayer",
        head: Head,
        options: HeadOptions,
        rows: TrainingRows,
        loss: Callable[[Tensor, Tensor], Tensor],
        generator: torch.Generator,
    ):
        self.options, self.rows, self.loss, self.generator = options, rows, loss, generator
        dtype = torch_dtype(numpy_dtype(rows.X))
        like: dict[str, Any] = {"dtype": dtype, "device": rows.device}
        self.layer = layer.to(**like)
        self.layer.rotation = None
        if layer.family.variance_bound is not None:
            # More digits would drown in the noise of the minibatches. Where the variance has no
            # bound a residual in units of a diagonal Newton step says less about the error.
            self.layer.tol = max(layer.tol, _TOLERANCE)
        self._centre = to_tensor(head.centre).to(**like)
        self._scale = to_tensor(head.scale).to(**like)
        self._weights = [to_tensor(coef).to(**like).clone() for coef in head.coefs]
        self._biases = [to_tensor(bias).to(**like).clone() for bias in head.intercepts]
        self._parameters = [*self._weights, *self._biases]
        groups = [
            {"params": self._weights, "weight_decay": options.weight_decay},
            {"params": self._biases, "weight_decay": 0.0},
        ]
        if options.fine_tune:
            backbone = list(self.layer.parameters())
            rate = options.backbone_learning_rate
            groups.append({"params": backbone, "weight_decay": 0.0, "lr": rate})
            self._parameters += backbone
        for parameter in self._parameters:
            parameter.requires_grad_()
        self.optimiser = torch.optim.AdamW(groups, lr=options.learning_rate)
        targets = to_tensor(rows.targets)
        self._targets = targets.to(rows.device, dtype if targets.is_floating_point() else None)
        self._sample_weight = None
        if rows.sample_weight is not None:
            self._sample_weight = to_tensor(rows.sample_weight).to(**like)
        # Where the rows were at their last visit: a start from which a step or two suffices.
        self._latents = to_tensor(rows.latents).to(**like).clone()
        self._last_good = self.copied()
        self.loss_curve: list[float] = []
        self.scores: list[float] = []
        # Steps that left the domain of the family, or the finite numbers, and were taken back.
        self.taken_back = 0
        # Epochs that were worse than outputs of zero, and trainings that came to nothing, that
        # were undone.
        self.undone = 0

    @cached_property
    def _rows_at_hand(self) -> object:
        # Not before they are asked for: a frozen backbone is trained on its latents alone.
        return brought(self.rows.X, self.rows.device)

    def _features(self, index: Tensor, training: bool) -> Tensor:
        fine_tune, leave_out = self.options.fine_tune, training and self.options.dropout > 0
        if not (fine_tune or leave_out):
            return self._latents[index]
        x = rows_of(self._rows_at_hand, index, self.rows.device)
        if leave_out:
            drawn = torch.rand(x.shape, generator=self.generator, device="cpu")
            x = x.masked_fill((drawn < self.options.dropout).to(x.device), torch.nan)
        # Where a row has several solutions, prediction will find the one from zero.
        start = self._latents[index] if self.layer.is_convex else None
        with torch.set_grad_enabled(fine_tune and torch.is_grad_enabled()):
            # Without a warning of rows that are not solved: here they are solved loosely, and
            # prediction has one of its own.
            latents, result = self.layer._attached(x, start)
        if fine_tune:
            self._latents[index] = latents.detach()
            self._residual = result.residual.amax()
        return latents

    def _network(self, index: Tensor, training: bool = False) -> Tensor:
        latents = self._features(index, training)
        values = (latents - self._centre) / self._scale
        return outputs_of(values, self._weights, self._biases)

    def outputs(self, index: np.ndarray) -> np.ndarray:
        """Compute the outputs of the network for some rows."""
        with torch.no_grad():
            batches = torch.from_numpy(index).to(self.rows.device).split(self._batch_rows())
            return to_numpy(torch.cat([self._network(batch) for batch in batches]))

    def _batch_rows(self) -> int:
        return max(self.options.batch_size, 1024)

    def epoch(self, order: Tensor) -> float:
        """Take one step for each minibatch; return the mean loss of those that were taken."""
        count = -(-len(order) // self.options.batch_size)
        weight = self._sample_weight
        total: Any = float(len(order)) if weight is None else weight[order].sum()
        summed = 0.0
        taken: Any = 0.0
        for index in order.tensor_split(count):
            loss = self._gradient(index, count / total)
            if loss is None:
                self._take_back()
                continue
            for kept, parameter in zip(self._last_good, self._parameters, strict=True):
                kept.copy_(parameter.detach())
            self.optimiser.step()
            self._shorten()
            summed += loss
            taken += len(index) if weight is None else weight[index].sum()
        self._last_batch = index
        # Rows without a loss must not make that of the others look smaller.
        return summed / float(taken) if taken else np.inf

    def _shorten(self) -> None:
        if not self.options.fine_tune:
            return
        layer = self.layer
        tied = parametrize.is_parametrized(layer, "loadings")
        loadings: Any = layer.parametrizations.loadings.original if tied else layer.loadings  # type: ignore[union-attr]
        last = dict(zip(map(id, self._parameters), self._last_good, strict=True))
        of_intercept, of_loadings = ((one, last[id(one)]) for one in (layer.intercept, loadings))
        own, shared = ([], [of_loadings]) if tied else ([of_loadings], [])
        with torch.no_grad():
            shorten(layer.family, of_intercept[1], [of_intercept, *own], shared)

    def check_last_step(self) -> bool:
        """Take the last step of all back if it went astray; return whether it did not."""
        good = self._gradient(self._last_batch, 1.0) is not None
        if not good:
            self._take_back()
        return good

    def _gradient(self, index: Tensor, factor: float) -> float | None:
        """Compute loss and gradients of some rows; return the loss, None if any is no number."""
        self.optimiser.zero_grad(set_to_none=True)
        losses = self.loss(self._network(index, training=True), self._targets[index])
        weight = self._sample_weight
        loss = losses.sum() if weight is None else losses @ weight[index]
        (loss * factor).backward()
        values: list[Any] = [loss.detach(), *(one.grad for one in self._parameters)]
        if self.options.fine_tune:
            # A row beyond the domain has no gradient, and in prediction rows start from zero.
            at_zero = self.layer.family.log_partition(self.layer.intercept.detach())
            values += [self._residual, at_zero]
        finite = torch.stack([torch.isfinite(value).all() for value in values]).all()
        # Read together: each look at the device makes the host wait.
        is_finite, value = torch.stack([finite.to(loss.dtype), values[0]]).tolist()
        return value if is_finite else None

    def _take_back(self) -> None:
        """Undo the last step, and make the following ones half as long."""
        self.taken_back += 1
        self._put(self._last_good)
        self._latents.nan_to_num_(0.0, 0.0, 0.0)
        forget_steps(self.optimiser, 0.5)

    @torch.enable_grad()
    def pass_once(self, rows: np.ndarray) -> None:
        """Go once through rows in the order given."""
        self.loss_curve.append(self.epoch(torch.from_numpy(rows).to(self.rows.device)))
        self.check_last_step()

    def mean_loss(self, outputs: np.ndarray, index: np.ndarray) -> float:
        """Weighted mean loss of outputs (m, n_outputs) for some rows (m,)."""
        at = torch.from_numpy(index).to(self.rows.device)
        return self._mean_loss(to_tensor(outputs).to(self._centre), at)

    def _mean_loss(self, outputs: Tensor, index: Tensor) -> float:
        losses = self.loss(outputs, self._targets[index])
        if self._sample_weight is None:
            return float(losses.mean())
        weight = self._sample_weight[index]
        return float(losses @ weight / weight.sum())

    def loss_of_nothing(self, index: Tensor) -> float:
        """Mean loss of outputs of zero: all classes as likely, or the mean target."""
        return self._mean_loss(
            self._biases[-1].new_zeros(len(index), len(self._biases[-1])), index
        )

    def copied(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def undo(self, safe: list[Tensor]) -> None:
        """Go back to parameters that were better, and go on with a tenth of the steps."""
        self.undone += 1
        self._put(safe)
        forget_steps(self.optimiser, 0.1)

    def end(self, kept: list[Tensor] | None) -> None:
        """End the training, with the parameters that were kept if there are such."""
        self.check_last_step()
        if kept is not None:
            self._put(kept)

    def ended(self, kept: list[Tensor] | None) -> "HeadTrainer":
        """Copy of this trainer whose training has ended here, while that of this one goes on."""
        generator = torch.Generator("cpu")
        generator.set_state(self.generator.get_state())
        # The data are only read; and not every torch can copy a generator.
        at_hand = vars(self).get("_rows_at_hand")
        data = (self.rows, at_hand, self._targets, self._sample_weight)
        ended = copy.deepcopy(
            self, {**{id(one): one for one in data}, id(self.generator): generator}
        )
        ended.end(kept)
        return ended

    def head_arrays(self) -> Head:
        """Return the head as trained."""
        return Head(
            to_numpy(self._centre),
            to_numpy(self._scale),
            [to_numpy(weight) for weight in self._weights],
            [to_numpy(bias) for bias in self._biases],
        )

    def near_latents(self) -> Tensor | None:
        """Return where the rows were last, if solutions may be looked for from there."""
        return self._latents if self.layer.is_convex else None

    def state(self) -> OptimiserState:
        """State of the optimiser to go on from."""
        return saved_state(self.optimiser)

    def load_state(self, state: OptimiserState) -> None:
        """Take over a state, unless it is that of other parameters."""
        if len(state) == len(self._parameters):
            restore_state(self.optimiser, state)
