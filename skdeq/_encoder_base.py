"""How ImplicitEMEncoder is trained, behind its public methods: validate, to tensors, store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from skdeq._base import (
    numpy_dtype,
    resolve_device,
    seeded_generator,
    to_numpy,
    to_tensor,
    torch_dtype,
)
from skdeq._data import to_rows
from skdeq._encoder_fit import (
    DEAD_VARIANCE,
    EncoderOptions,
    EncoderTrace,
    EncoderTrainer,
    start_weights,
)
from skdeq._encoding import distance_variances, encode
from skdeq._precondition import Preconditioner, RowBatches, fit_preconditioner
from skdeq._progress import Progress
from skdeq._validation import (
    check_rows,
    check_stream_type,
    refuse_changes,
    refuse_other_law,
    weighted_rows,
)
from skdeq._warn import warn, warn_of_convergence
from skdeq.objectives import ACTIVATIONS, Activation, ObjectiveWeights, PairActivation

__all__ = ["EncoderBase"]

# Share of the variance of all rows above which one row decides about their scale, where there are
# enough of them for that to be out of the ordinary.
_MOST_OF_ONE, _LEAST_ROWS = 0.5, 20


class EncoderBase(BaseEstimator):
    """Private methods of :class:`~skdeq.ImplicitEMEncoder`, in the order of a fit."""

    def _activation(self) -> Activation:
        return _activation_of(self.activation)

    def _changes(self) -> dict[str, tuple[Any, Any]]:
        """Parameters that ask for other components than there are: what they are, and were."""
        changes = self._changed_law()
        if self.n_components != len(self.components_):
            changes["n_components"] = (self.n_components, len(self.components_))
        return changes

    def _changed_law(self) -> dict[str, tuple[Any, Any]]:
        if self._activation() == _activation_of(self._trained_activation):
            return {}
        return {"activation": (self.activation, self._trained_activation)}

    def _objective_weights(self) -> ObjectiveWeights:
        return ObjectiveWeights(
            lse=float(self.lse_weight),
            variance=float(self.variance_weight),
            decorrelation=float(self.decorrelation_weight),
            weight_redundancy=float(self.weight_redundancy),
        )

    def _training(self, X, sample_weight, *, reset: bool, least: int = 2):
        """Validate training rows and their weights."""
        self._activation()
        X = check_rows(self, X, reset=reset, min_rows=least)
        return self._weighted(X, sample_weight, least)

    def _weighted(self, X, sample_weight, least: int = 2):
        """Validate the weights of validated rows; rows of no weight are left out."""
        n_given = X.shape[0]
        sample_weight, X = weighted_rows(sample_weight, X)
        if sample_weight is None:
            return X, None
        if len(sample_weight) < least:
            raise ValueError(
                f"sample_weight is positive for {len(sample_weight)} of {n_given} rows; "
                f"{type(self).__name__} needs at least {least}."
            )
        if bool((sample_weight == 1).all()):
            return X, None
        # Counts of repeated rows stay as they are; shares get the mean of counts of one.
        mean = sample_weight.mean(dtype=np.float64)
        if mean < 1:
            sample_weight = (sample_weight / mean).astype(sample_weight.dtype)
        return X, sample_weight

    def _brought(self, X, weights) -> tuple:
        """Device to compute on, and validated rows and their weights where they are kept."""
        device = resolve_device(self.device, X)
        rows = to_rows(X, device)
        return device, rows, None if weights is None else to_tensor(weights, rows.device)

    def _preconditioner(self, rows, weight) -> Preconditioner:
        """Location and scale of the training rows; warn if one of them decides."""
        preconditioner = fit_preconditioner(rows, weight)
        share = preconditioner.its_share
        if share > _MOST_OF_ONE and rows.shape[0] >= _LEAST_ROWS:
            warn(
                f"Row {preconditioner.farthest} of {rows.shape[0]} (those of positive weight) has "
                f"{100 * share:.0f} % of their variance: to {type(self).__name__} the others are "
                "next to alike. Leave such rows out, clip them, or transform X (a logarithm of "
                "amounts).",
                UserWarning,
            )
        return preconditioner

    def _fit(self, X, sample_weight, progress: Progress) -> None:
        X, weights = self._training(X, sample_weight, reset=True)
        generator = seeded_generator(self.random_state)
        device, rows, weight = self._brought(X, weights)
        preconditioner = self._preconditioner(rows, weight)
        shape = (self.n_components, X.shape[1])
        if self.warm_start and getattr(self, "components_", np.empty(0)).shape == shape:
            start = preconditioner.unfold(to_tensor(self.components_), to_tensor(self.intercept_))
        else:
            start = start_weights(int(self.n_components), preconditioner.varying, generator)
        dtype = numpy_dtype(X)
        trainer = self._trainer(rows, device, preconditioner, start, dtype)

        def store(estimator: EncoderBase, trace: EncoderTrace) -> None:
            estimator._store(rows, weight, preconditioner, trainer, trace, dtype)
            estimator._n_batches = 0

        progress.store = store
        trace = trainer.fit(weight, generator, progress)
        store(self, trace)
        self._warn_of([*self._undone(trainer, trace), *self._dead()])

    def _undone(self, trainer: EncoderTrainer, trace: EncoderTrace) -> list[str]:
        """Say which epochs were taken back, if any were."""
        if not trace.undone:
            return []
        what = (
            f"{trace.undone} epochs of {type(self).__name__} led nowhere or diverged and "
            "were undone; the others took smaller steps, in the end with "
            f"{trainer.learning_rate:g} in place of learning_rate={self.learning_rate:g}"
        )
        if not trace.n_iter:
            what = (
                f"No epoch of {type(self).__name__} was kept: with learning_rate="
                f"{self.learning_rate:g} all of them diverged or led nowhere, and the components "
                "are those of the start"
            )
        advice = f" or momentum={self.momentum:g}" if self.momentum else ""
        return [f"{what}: lower it{advice}."]

    def _update(self, X, sample_weight) -> None:
        """Learn from a batch of a stream."""
        first = getattr(self, "components_", None) is None
        X, weights = self._training(X, sample_weight, reset=first, least=2 if first else 1)
        device, rows, weight = self._brought(X, weights)
        if first:
            preconditioner = self._preconditioner(rows, weight)
            if not bool(preconditioner.varying.any()):
                raise ValueError(
                    f"All {X.shape[0]} rows of the first batch are the same, but they settle "
                    f"location and scale of the stream for {type(self).__name__}: begin with "
                    "rows that differ."
                )
            generator = seeded_generator(self.random_state)
            start = start_weights(int(self.n_components), preconditioner.varying, generator)
            past, state = EncoderTrace(), []
        else:
            check_stream_type(X, self.components_)
            refuse_changes(self._changes())
            if X.shape[0] == 1:
                warn(
                    "One row has no variance to learn from: the batch was left out by "
                    f"{type(self).__name__}.",
                    UserWarning,
                )
                return
            start = to_tensor(self._weights)
            preconditioner = Preconditioner(
                to_tensor(self._location), self._scale, start[:, :-1].any(0)
            )
            past = EncoderTrace(list(self.loss_curve_), self.n_iter_)
            state = self._solver_state
        trainer = self._trainer(rows, device, preconditioner, start, numpy_dtype(X))
        trainer.load_state(state)
        trace = trainer.fit_once(weight, past)
        self._store(rows, weight, preconditioner, trainer, trace, numpy_dtype(X))
        left_out = (
            f"These rows made {type(self).__name__} diverge and were left out: lower "
            f"learning_rate={self.learning_rate:g}."
        )
        self._warn_of([left_out] * bool(trace.undone) + self._dead())

    def _trainer(self, rows, device, preconditioner, start, dtype) -> EncoderTrainer:
        options = EncoderOptions(
            activation=self._activation(),
            weights=self._objective_weights(),
            solver=self.solver,
            learning_rate=float(self.learning_rate),
            momentum=float(self.momentum),
            batch_size=int(self.batch_size),
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            revive_dead=bool(self.revive_dead),
        )
        working = torch_dtype(np.result_type(dtype, np.float32))
        batches = RowBatches(rows, preconditioner, working, device)
        return EncoderTrainer(start.to(batches.device, working).clone(), options, batches)

    def _store(self, rows, weight, preconditioner, trainer, trace, dtype) -> None:
        """Fold location and scale back and keep everything as numpy."""
        dtype = np.result_type(dtype, np.float32)
        components, intercept = preconditioner.fold(trainer.weights)
        self.components_ = to_numpy(components, dtype)
        self.intercept_ = to_numpy(intercept, dtype)
        self.loss_curve_ = list(trace.loss_curve)
        self.n_iter_ = trace.n_iter
        self._trained_activation = self.activation
        self._weights = to_numpy(trainer.weights)
        self._location, self._scale = to_numpy(preconditioner.location), preconditioner.scale
        self._solver_state = trainer.state()
        kept = to_tensor(self.components_), to_tensor(self.intercept_)
        device = trainer.weights.device
        variance = distance_variances(rows, weight, *kept, self._activation(), device)
        self.dead_components_ = np.flatnonzero(to_numpy(variance) < DEAD_VARIANCE)

    def _dead(self) -> list[str]:
        """Say that no component is alive, if none is."""
        if len(self.dead_components_) < len(self.components_):
            return []
        return [
            f"All {len(self.components_)} components of {type(self).__name__} are dead: their "
            f"distances vary by less than {DEAD_VARIANCE:g} over the rows. Raise "
            f"variance_weight={self.variance_weight:g}, lower lse_weight={self.lse_weight:g}, "
            "or check that the rows differ."
        ]

    def _warn_of(self, sentences: list[str]) -> None:
        """Warn once of all that went wrong."""
        if sentences:
            warn_of_convergence(" ".join(sentences))

    def _encode(self, rows, device: torch.device) -> torch.Tensor:
        refuse_other_law(self, self._changed_law())
        components, intercept = to_tensor(self.components_), to_tensor(self.intercept_)
        return encode(rows, components, intercept, self._activation(), device)

    def _distances(self, X) -> torch.Tensor:
        check_is_fitted(self)
        X = check_rows(self, X, reset=False)
        device = resolve_device(self.device, X)
        return self._encode(to_rows(X, device), device)


def _activation_of(given: str | Activation | tuple[Callable, Callable]) -> Activation:
    if isinstance(given, str):
        return ACTIVATIONS[given]
    if isinstance(given, PairActivation):
        given.check()
    if isinstance(given, Activation):
        return given
    if len(given) != 2 or not all(map(callable, given)):
        raise ValueError(
            "activation must be one of "
            f"{sorted(ACTIVATIONS)} or a pair (function, derivative) of callables; got {given!r}."
        )
    activation = PairActivation(*given)
    activation.check()
    return activation
