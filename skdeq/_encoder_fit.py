"""Training of the implicit-EM encoder: epochs of minibatches with closed-form gradients."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skdeq._chunks import one_ahead, parallel_chunks
from skdeq._encoder_course import Course
from skdeq._optimiser_state import (
    OptimiserState,
    forget_steps,
    restore_state,
    saved_state,
)
from skdeq._precondition import SQUARED_NORM, RowBatches
from skdeq._progress import Progress
from skdeq._replay import Capture, StepRunner, capture_graph
from skdeq.objectives import (
    ACTIVATIONS,
    Activation,
    BatchObjective,
    ObjectiveWeights,
    weight_redundancy,
)

__all__ = [
    "DEAD_VARIANCE",
    "OPTIMISERS",
    "EncoderOptions",
    "EncoderTrace",
    "EncoderTrainer",
    "start_weights",
]

# A component whose distance varies less than this over the rows is dead, as the paper counts them.
DEAD_VARIANCE = 0.01
# Standard deviation of the first pre-activations, if rows vary alike in all directions.
_START = 0.2
# Bound on the gradient of one component over a batch. On MNIST the longest in a thousand is 10; it
# is met by components of next to no variance, and without it 64 components of four features end
# up with distances in the thousands.
_LONGEST = 10.0
# Entries of the batches that are gathered at a time, by another thread: rows lie far apart in
# memory.
_GATHERED_ENTRIES = 2**20
# Products of a step below which one thread is as good as two, that wait for each other dozens of
# times a step, and ten times faster where another process wants a core (6e6 on MNIST).
_LEAST_THREADED = 2**24
# Batches of the first epoch that the loss before training is taken from: of fewer than there are
# it has an error, by which a fit that begins near its end would be told to go back.
_FIRST_BATCHES = 64


@dataclass(frozen=True)
class EncoderOptions:
    """Options of a fit, as the estimator documents them."""

    activation: Activation
    weights: ObjectiveWeights
    solver: str
    learning_rate: float
    momentum: float
    batch_size: int
    max_iter: int
    tol: float
    revive_dead: bool


@dataclass
class EncoderTrace:
    """What a fit leaves behind beside the weights."""

    loss_curve: list[float] = field(default_factory=list)
    n_iter: int = 0
    # Epochs that went astray and were undone.
    undone: int = 0


def start_weights(n_components: int, varying: Tensor, generator: torch.Generator) -> Tensor:
    """Random orthogonal weights (K, p + 1) for preconditioned rows, float64.

    As many as there are inputs are orthogonal to each other; from directions that overlap at
    random the probe accuracy on MNIST varies twice as much from seed to seed.

    Parameters
    ----------
    n_components : int
    varying : Tensor of shape (p,), bool
        Features that are not the same in all rows; the others get no weight.
    generator : torch.Generator
    """
    n_inputs = len(varying) + 1
    weights = torch.empty(n_components, n_inputs, dtype=torch.float64, device="cpu")
    torch.nn.init.orthogonal_(weights, generator=generator)
    length = _START * (n_inputs / SQUARED_NORM) ** 0.5
    weights = torch.nn.functional.normalize(weights, dim=1) * length
    # The weight of a feature that is zero once centred has no gradient and would stay as drawn:
    # an offset of the rows as they come that the bias takes off again, with all the digits that
    # a large value costs.
    weights[:, :-1] *= varying
    return weights


def _adam(weights: Tensor, options: EncoderOptions) -> torch.optim.Optimizer:
    # On a card the steps are counted where a captured step can go on counting.
    on_card = weights.device.type == "cuda"
    adam = torch.optim.Adam([weights], lr=options.learning_rate, fused=True, capturable=on_card)
    # The steps before the capture are no oversight.
    adam._warned_capturable_if_run_uncaptured = True
    return adam


def _sgd(weights: Tensor, options: EncoderOptions) -> torch.optim.Optimizer:
    rate, momentum = options.learning_rate, options.momentum
    return torch.optim.SGD([weights], lr=rate, momentum=momentum, fused=True)


class Optimiser(NamedTuple):
    """A way to take steps.

    Attributes
    ----------
    make : callable
        Makes the optimiser of weights (K, p + 1) from the options of the fit.
    kept : set of str
        Names of what it keeps of each parameter from step to step.
    """

    make: Callable[[Tensor, EncoderOptions], torch.optim.Optimizer]
    kept: set[str]


OPTIMISERS = {
    "sgd": Optimiser(_sgd, {"momentum_buffer"}),
    "adam": Optimiser(_adam, {"step", "exp_avg", "exp_avg_sq"}),
}


class EncoderTrainer:
    """Weights in training, with the buffers and the state of the solver.

    Parameters
    ----------
    weights : Tensor of shape (K, p + 1)
        Where to start; trained in place.
    options : EncoderOptions
    rows : RowBatches
        What to train on.
    capture : callable, optional
        See :class:`StepRunner`; by default a CUDA graph on a card and nothing elsewhere.
    """

    def __init__(
        self,
        weights: Tensor,
        options: EncoderOptions,
        rows: RowBatches,
        capture: Capture | None = None,
    ):
        self.weights, self.options, self.rows = weights, options, rows
        # An activation of the user's own may do what cannot be captured.
        if weights.device.type == "cuda" and options.activation in ACTIVATIONS.values():
            capture = capture or capture_graph
        # Each would keep the other, and the rows on a card, until the collector comes by.
        me: Any = weakref.ref(self)
        self.run = StepRunner(lambda *inputs: me().step(*inputs), capture)
        # A plain step needs neither an optimiser, whose import alone takes torch two seconds,
        # nor a gradient of its own: the product that would form it moves the weights.
        plain = (
            options.solver == "sgd"
            and options.momentum == 0
            and options.weights.weight_redundancy == 0
        )
        self.optimiser = None if plain else OPTIMISERS[options.solver].make(weights, options)
        self.learning_rate = options.learning_rate
        self._slope: Tensor | Any = None if plain else torch.empty_like(weights)
        self._buffers: dict[int, tuple[Tensor, Tensor, BatchObjective]] = {}
        # Sums over the batches of an epoch: the terms of the objective, without their weights.
        self._terms = weights.new_zeros(4)
        self._batch_terms, self._redundancy = self._terms[:3], self._terms[3]
        self.variance = weights.new_zeros(len(weights))

    def _buffers_for(self, m: int) -> tuple[Tensor, Tensor, BatchObjective]:
        if m not in self._buffers:
            k = len(self.weights)
            self._buffers[m] = (
                self.weights.new_empty(m, k),
                self.weights.new_empty(m, k),
                BatchObjective(self.options.weights, m, k, self.weights, _LONGEST),
            )
        return self._buffers[m]

    def _evaluate(
        self, batch: Tensor, sample_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, BatchObjective, Tensor]:
        """Pre-activations, distances, objective and its gradient in the distances of a batch."""
        preactivation, distance, objective = self._buffers_for(len(batch))
        self.rows.project(batch, self.weights, preactivation)
        self.options.activation.value_into(preactivation, distance)
        return preactivation, distance, objective, objective(distance, sample_weight)

    def step(
        self,
        batch: Tensor,
        sample_weight: Tensor | None = None,
        share: Tensor | None = None,
    ) -> None:
        """Take one step along the gradient of a batch.

        Parameters
        ----------
        batch : Tensor of shape (m, p + 1)
            Preconditioned rows.
        sample_weight : Tensor of shape (m,), optional
            Their weights.
        share : Tensor, a scalar, optional
            Weight of the batch relative to the mean batch.
        """
        weights, options, rows = self.weights, self.options, self.rows
        preactivation, distance, objective, gradient = self._evaluate(batch, sample_weight)
        options.activation.multiply_derivative_(gradient, preactivation, distance)
        self._batch_terms += objective.terms if share is None else objective.terms * share
        if options.revive_dead:
            self.variance += objective.variance
        if share is not None:
            gradient *= share
        if self.optimiser is None:
            rows.pull_back_(gradient, batch, weights, beta=1, alpha=-self.learning_rate)
            return
        rows.pull_back_(gradient, batch, self._slope, beta=0, alpha=1)
        if options.weights.weight_redundancy:
            value, slope = weight_redundancy(weights[:, :-1])
            self._redundancy += value
            self._slope[:, :-1].add_(slope, alpha=options.weights.weight_redundancy)
        weights.grad = self._slope
        self.optimiser.step()

    def epoch(self, sample_weight: Tensor | None, order: Tensor) -> float:
        """Go once through the rows in the order given; return the mean loss of the batches."""
        rows, device = self.rows, self.weights.device
        count = -(-len(order) // self.options.batch_size)
        mean_weight: Any = None if sample_weight is None else sample_weight.mean().to(device)
        self._terms.zero_()
        self.variance.zero_()
        # Batches of equal size, give or take a row: a short last one would be a noisy one.
        indices = order.tensor_split(count)
        together = max(1, _GATHERED_ENTRIES // (len(indices[0]) * rows.p))
        groups = [indices[first : first + together] for first in range(0, count, together)]
        # The thread that gathers has a device and a stream of its own unless it is told.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def gather(group: tuple[Tensor, ...], slot: int) -> Tensor:
            with torch.cuda.stream(stream):
                return rows.gather(torch.cat(group), slot)

        ahead = one_ahead(gather, ((group, place % 2) for place, group in enumerate(groups)))
        for group, gathered in zip(groups, ahead, strict=True):
            batches = gathered.split([len(index) for index in group])
            for index, batch in zip(group, batches, strict=True):
                if sample_weight is None:
                    self.run(batch, None, None)
                else:
                    weight = sample_weight[index].to(device)
                    self.run(batch, weight, weight.mean() / mean_weight)
        self.variance /= count
        return float(self._terms.double().cpu() @ self.options.weights.vector) / count

    def fit(
        self, sample_weight: Tensor | None, generator: torch.Generator, progress: Progress
    ) -> EncoderTrace:
        """Train for at most `max_iter` epochs, until the loss stops falling or is lost."""
        with self._threads():
            return self._fit(sample_weight, generator, progress)

    def _fit(
        self, sample_weight: Tensor | None, generator: torch.Generator, progress: Progress
    ) -> EncoderTrace:
        options, rows, trace = self.options, self.rows, EncoderTrace()
        # Of its own: what orders draw depends on the number of rows, repeated or weighted.
        for_new = torch.Generator("cpu")
        if options.revive_dead:
            for_new.manual_seed(int(torch.randint(2**62, (), generator=generator, device="cpu")))
        # The weights with the lowest loss so far, the first ones to begin with.
        kept, course = self.weights.clone(), None
        for left in reversed(range(options.max_iter)):
            progress.begin()
            order = torch.randperm(rows.n_rows, generator=generator, device="cpu").to(rows.home)
            if course is None:
                n_batches = -(-rows.n_rows // options.batch_size)
                started = self.loss_of(sample_weight, order)
                course = Course(started, options.max_iter, options.tol, n_batches)
            loss = self.epoch(sample_weight, order)
            trace.loss_curve.append(loss)
            trace.n_iter += 1
            astray = course.record(loss, trace.n_iter, is_last=not left) or self._is_lost(loss)
            if astray:
                self._set_back(kept, trace, course.n_kept)
                course.begin_again()
            elif course.keep(loss, trace.n_iter):
                kept.copy_(self.weights)
            if progress.end(loss, lambda: trace) or course.at_rest:
                break
            if options.revive_dead and not astray and trace.n_iter < options.max_iter:
                self.revive(for_new)
        if trace.undone and course is not None and course.n_kept < trace.n_iter:
            # Where steps were too long once, the last are not the best.
            self.weights.copy_(kept)
        return trace

    def fit_once(self, sample_weight: Tensor | None, trace: EncoderTrace) -> EncoderTrace:
        """Go on from `trace` by one pass over the rows as they come."""
        order = torch.arange(self.rows.n_rows, device=self.rows.home)
        before = self.weights.clone()
        with self._threads():
            loss = self.epoch(sample_weight, order)
        trace.loss_curve.append(loss)
        trace.n_iter += 1
        if self._is_lost(loss):
            self._set_back(before, trace, trace.n_iter - 1)
        return trace

    def _threads(self) -> AbstractContextManager[None]:
        """Where a step is small, one thread for it and another to fetch rows."""
        batch = min(self.options.batch_size, self.rows.n_rows)
        small = batch * self.weights.numel() < _LEAST_THREADED
        return parallel_chunks() if small else nullcontext()

    def loss_of(self, sample_weight: Tensor | None, order: Tensor) -> float:
        """Return the mean loss of some batches of the rows, without a step."""
        terms = torch.zeros_like(self._terms)
        count = -(-len(order) // self.options.batch_size)
        indices = order.tensor_split(count)[:_FIRST_BATCHES]
        mean_weight: Any = None if sample_weight is None else sample_weight.mean().to(terms)
        for index in indices:
            weight = None if sample_weight is None else sample_weight[index].to(terms.device)
            _, _, objective, _ = self._evaluate(self.rows.gather(index), weight)
            share = 1.0 if weight is None else weight.mean() / mean_weight
            terms[:3] += objective.terms * share / len(indices)
        if self.options.weights.weight_redundancy:
            terms[3], _ = weight_redundancy(self.weights[:, :-1])
        return float(terms.double().cpu() @ self.options.weights.vector)

    def _is_lost(self, loss: float) -> bool:
        """Whether an epoch has left the finite numbers."""
        return not (np.isfinite(loss) and bool(torch.isfinite(self.weights).all()))

    def _set_back(self, weights: Tensor, trace: EncoderTrace, n_iter: int) -> None:
        """Go back to what the weights were, and make the following steps a tenth as long."""
        self.weights.copy_(weights)
        trace.undone += trace.n_iter - n_iter
        trace.n_iter = n_iter
        del trace.loss_curve[n_iter:]
        self.learning_rate *= 0.1
        if self.optimiser is not None:
            forget_steps(self.optimiser, 0.1)
        # A captured step has the old rate in it.
        self.run.forget()

    def revive(self, generator: torch.Generator) -> None:
        """Give the components that were dead in the last epoch new weights, at random."""
        dead = (self.variance < DEAD_VARIANCE).nonzero().squeeze(1)
        if not len(dead):
            return
        start = start_weights(len(dead), self.rows.varying, generator)
        self.weights[dead] = start.to(self.weights)
        known = {} if self.optimiser is None else self.optimiser.state[self.weights]
        for value in known.values():
            if value is not None and value.shape == self.weights.shape:
                value[dead] = 0

    def state(self) -> OptimiserState:
        """State of the optimiser to go on from."""
        return [] if self.optimiser is None else saved_state(self.optimiser)

    def load_state(self, state: OptimiserState) -> None:
        """Take over a state, unless it is that of another optimiser."""
        expected = [OPTIMISERS[self.options.solver].kept]
        if self.optimiser is not None and [set(known) for known in state] == expected:
            restore_state(self.optimiser, state)
            self.run.forget()
