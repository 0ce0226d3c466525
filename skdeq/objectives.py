r"""Objective of the implicit-EM encoder: its terms and their gradients, written out by hand.

For distances ``d`` of shape (n, K), low where a component matches a row well,

.. math:: L = \lambda_{lse} \, \overline{\mathrm{LSE}}
          - \lambda_{var} \sum_j \log(\mathrm{Var}_j + \epsilon)
          + \lambda_{dec} \sum_{i \neq j} \mathrm{Corr}_{ij}^2,
          \qquad \mathrm{LSE}(x) = -\log \sum_j e^{-d_j}.

The derivative of the first term in a distance is the responsibility ``softmax(-d)``, exactly:
descending the gradient is expectation-maximisation without its two steps [1]_. The other two keep
every component alive and all of them distinct.

References
----------
.. [1] A. Oursland (2026). Deriving Decoder-Free Sparse Autoencoders from First Principles.
   arXiv:2601.06478.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ACTIVATIONS",
    "VARIANCE_FLOOR",
    "Activation",
    "BatchObjective",
    "ObjectiveWeights",
    "PairActivation",
    "log_sum_exp",
    "responsibilities",
    "weight_redundancy",
]

# The epsilon beside a variance: a component that never varies has a finite loss and no gradient.
VARIANCE_FLOOR = 1e-6
# A weight so small that nothing of its row is left; its reciprocal is still a number.
_LEAST_WEIGHT = 1e-30


class Activation:
    """Elementwise map from the output of the linear layer to a distance.

    A subclass has a `name`, :meth:`value` and :meth:`derivative`; the two methods that work in
    place follow from them and are overridden where one kernel does.
    """

    name: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def value(self, preactivation: Tensor) -> Tensor:
        """Distance, elementwise."""
        raise NotImplementedError

    def derivative(self, preactivation: Tensor) -> Tensor:
        """Return the derivative of the distance, elementwise."""
        raise NotImplementedError

    def value_into(self, preactivation: Tensor, out: Tensor) -> None:
        """Write the distances to ``out``."""
        out.copy_(self.value(preactivation))

    def multiply_derivative_(
        self, gradient: Tensor, preactivation: Tensor, distance: Tensor
    ) -> None:
        """Turn the gradient in the distances into the one in the pre-activations, in place."""
        gradient.mul_(self.derivative(preactivation))


class ReLU(Activation):
    """``max(a, 0)``: a row is at no distance from the half-space a component claims."""

    name = "relu"

    def value(self, preactivation: Tensor) -> Tensor:
        """Distance, elementwise."""
        return preactivation.clamp_min(0)

    def derivative(self, preactivation: Tensor) -> Tensor:
        """Return the derivative, 0 at the kink."""
        return (preactivation > 0).to(preactivation.dtype)

    def value_into(self, preactivation: Tensor, out: Tensor) -> None:
        """Write the distances to ``out``."""
        torch.clamp_min(preactivation, 0, out=out)

    def multiply_derivative_(
        self, gradient: Tensor, preactivation: Tensor, distance: Tensor
    ) -> None:
        """Clear the gradient of what the activation cut off."""
        # The pre-activation is not needed again: as a mask of ones and zeros it saves a boolean
        # array, whose product is several times slower.
        gradient.mul_(torch.sign(distance, out=preactivation))


class Softplus(Activation):
    """``log(1 + exp(a))``: a smooth `relu`, which leaves no component without a gradient."""

    name = "softplus"

    def value(self, preactivation: Tensor) -> Tensor:
        """Distance, elementwise."""
        # Not torch's softplus, which is a straight line beyond a threshold.
        return torch.logaddexp(preactivation, preactivation.new_zeros(()))

    def derivative(self, preactivation: Tensor) -> Tensor:
        """Return the derivative, the logistic function."""
        return torch.sigmoid(preactivation)


class Identity(Activation):
    """``a`` itself, a signed distance; the objective then has no lower bound."""

    name = "identity"

    def value(self, preactivation: Tensor) -> Tensor:
        """Distance, elementwise."""
        return preactivation.clone()

    def derivative(self, preactivation: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(preactivation)

    def multiply_derivative_(
        self, gradient: Tensor, preactivation: Tensor, distance: Tensor
    ) -> None:
        """Leave the gradient as it is."""


class Abs(Activation):
    """``|a|``: Mahalanobis distance along one direction, from a hyperplane."""

    name = "abs"

    def value(self, preactivation: Tensor) -> Tensor:
        """Distance, elementwise."""
        return preactivation.abs()

    def derivative(self, preactivation: Tensor) -> Tensor:
        """Return the derivative, 0 at the kink."""
        return preactivation.sign()

    def value_into(self, preactivation: Tensor, out: Tensor) -> None:
        """Write the distances to ``out``."""
        torch.abs(preactivation, out=out)


class PairActivation(Activation):
    """An activation of the user's own.

    Parameters
    ----------
    value, derivative : callable
        Elementwise functions of a tensor.
    """

    name = "pair"

    def __init__(
        self, value: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]
    ) -> None:
        self._value, self._derivative = value, derivative

    def __repr__(self) -> str:
        return f"PairActivation({self._value!r}, {self._derivative!r})"

    @torch.no_grad()
    def check(self) -> None:
        """Try both functions on a few numbers.

        Raises
        ------
        ValueError
            If one does not return finite numbers in the shape and type of what it is given, or
            changes that.
        """
        for name, function in (("function", self._value), ("derivative", self._derivative)):
            given = torch.tensor([[-1.5, 0.5], [2.0, -0.25], [1.0, 0.125]], device="cpu")
            kept = given.clone()
            found = function(given)
            if not isinstance(found, Tensor):
                what = f"a {type(found).__name__}"
            elif found.shape != given.shape or found.dtype != given.dtype:
                what = f"shape {tuple(found.shape)} and type {found.dtype}"
            elif not bool(torch.isfinite(found).all()):
                what = "numbers that are not finite"
            else:
                what = ""
            if what:
                raise ValueError(
                    f"The {name} of the activation must return a tensor of finite numbers of the "
                    "shape and type of its argument, for any real numbers; of shape "
                    f"{tuple(kept.shape)} and type {kept.dtype} it made {what}."
                )
            if not torch.equal(given, kept):
                raise ValueError(
                    f"The {name} of the activation changes its argument; it must return a new "
                    "tensor."
                )

    def value(self, preactivation: Tensor) -> Tensor:
        """Distance, elementwise."""
        return self._value(preactivation)

    def derivative(self, preactivation: Tensor) -> Tensor:
        """Return the derivative, elementwise."""
        return self._derivative(preactivation)


ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation for activation in (ReLU(), Softplus(), Identity(), Abs())
}


def log_sum_exp(distance: Tensor) -> Tensor:
    """Soft minimum ``-log sum_j exp(-d_j)`` of each row, shape (n,)."""
    return -torch.logsumexp(-distance, dim=1)


def responsibilities(distance: Tensor) -> Tensor:
    """Share ``softmax(-d)`` of each component in a row, shape (n, K); rows sum to one."""
    return torch.softmax(-distance, dim=1)


def weight_redundancy(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Squared Frobenius norm of the cosines between distinct rows, and its gradient.

    Parameters
    ----------
    weights : Tensor of shape (K, p)

    Returns
    -------
    value : Tensor, a scalar
        ``|V V^T - I|^2`` for the rows V of `weights` divided by their norms.
    gradient : Tensor of shape (K, p)
    """
    tiny = torch.finfo(weights.dtype).tiny
    size = weights.square().sum(1, keepdim=True).clamp_min(tiny).rsqrt()
    unit = weights * size
    cosine = unit @ unit.T
    cosine.fill_diagonal_(0)
    slope = 4 * (cosine @ unit)
    slope -= (slope * unit).sum(1, keepdim=True) * unit
    return cosine.square().sum(), slope * size


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the terms, non-negative.

    Attributes
    ----------
    lse, variance, decorrelation, weight_redundancy : float
    """

    lse: float = 128.0
    variance: float = 1.0
    decorrelation: float = 1.0
    weight_redundancy: float = 0.0

    @property
    def vector(self) -> Tensor:
        """The weights in the order of the terms, float64, shape (4,)."""
        return torch.tensor(
            [self.lse, self.variance, self.decorrelation, self.weight_redundancy],
            dtype=torch.float64,
            device="cpu",
        )


class BatchObjective:
    """The terms that depend on the distances, with their gradient, for batches of one shape.

    The buffers of a batch are kept, so that a step allocates next to nothing. With ``C`` the
    centred distances and ``S = C^T C``, variances and correlations are entries of S, and the
    gradients of both terms are one product ``C Q`` with a K x K matrix: no array of the size of
    the batch is made for either.

    Parameters
    ----------
    weights : ObjectiveWeights
    n_rows, n_components : int
        Shape of the distances.
    like : Tensor
        Whose dtype and device the distances have.
    longest : float, default=inf
        Bound on the norm of the gradient of one component over the rows: a component that hardly
        varies is otherwise thrown far out by a single row.

    Attributes
    ----------
    terms : Tensor of shape (3,)
        Terms of the last batch, without their weights: mean log-sum-exp, minus the sum of the
        log variances, sum of the squared correlations, with ``VARIANCE_FLOOR`` in each variance.
    """

    def __init__(
        self,
        weights: ObjectiveWeights,
        n_rows: int,
        n_components: int,
        like: Tensor,
        longest: float = torch.inf,
    ) -> None:
        self.weights = weights
        self._longest = longest
        self.terms = like.new_zeros(3)
        self._terms = [self.terms[place] for place in range(3)]
        self._share = like.new_empty(n_rows, n_components)
        self._centred = like.new_empty(n_rows, n_components)
        self._gradient = like.new_empty(n_rows, n_components)
        self._square = like.new_empty(n_components, n_components)
        self._outer = torch.empty_like(self._square)
        self._diagonal = self._square.diagonal()
        self._mean = like.new_empty(n_components)
        self._scatter = like.new_empty(n_components)
        # Numbers as tensors: torch would make and convert one of each at every step.
        self._freedom = _degrees_of_freedom(like.new_tensor(float(n_rows)))
        self._last_freedom = self._freedom
        self._equal = like.new_full((n_rows,), 1 / n_rows)
        self._ones = like.new_ones(n_rows)
        self._floor = like.new_tensor(VARIANCE_FLOOR)
        self._four = like.new_tensor(4 * weights.decorrelation)
        self._two = like.new_full((n_components,), -2 * weights.variance)

    @property
    def variance(self) -> Tensor:
        """Variance of each component in the last batch, shape (n_components,)."""
        return self._scatter / self._last_freedom - self._floor

    def __call__(self, distance: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Evaluate the terms and return the gradient of their weighted sum.

        Parameters
        ----------
        distance : Tensor of shape (n_rows, n_components)
        sample_weight : Tensor of shape (n_rows,), optional
            Non-negative; integer weights equal repeated rows.

        Returns
        -------
        Tensor of shape (n_rows, n_components)
            A buffer that the next call overwrites.
        """
        weights = self.weights
        share, centred, square = self._share, self._centred, self._square
        equal, scatter, outer = self._equal, self._scatter, self._outer
        freedom = self._freedom
        if sample_weight is not None:
            total = sample_weight.sum()
            freedom = _degrees_of_freedom(total)
            equal = sample_weight / total
        self._last_freedom = freedom
        torch.softmax(torch.neg(distance, out=share), 1, out=share)
        # The largest responsibility is exp(LSE - d) at the smallest distance.
        soft_minimum = share.amax(1).log_().add_(distance.amin(1))
        torch.dot(equal, soft_minimum, out=self._terms[0])
        torch.mv(distance.T, equal, out=self._mean)
        torch.sub(distance, self._mean, out=centred)
        if sample_weight is not None:
            root = sample_weight.sqrt().unsqueeze(1)
            centred.mul_(root)
        torch.mm(centred.T, centred, out=square)
        torch.add(self._diagonal, self._floor * freedom, out=scatter)
        torch.sum((freedom / scatter).log_(), 0, out=self._terms[1])
        scale = scatter.rsqrt()
        square.mul_(torch.outer(scale, scale, out=outer))
        self._diagonal.zero_()
        collinear = torch.mul(square, square).sum(0)
        torch.sum(collinear, 0, out=self._terms[2])
        square.mul_(outer.mul_(self._four))
        # What normalising takes back of the pull of the others, and the pull of the variance.
        torch.add(self._two, collinear, alpha=-4 * weights.decorrelation, out=collinear)
        torch.mul(collinear, scale.mul_(scale), out=self._diagonal)
        gradient = self._gradient
        if sample_weight is None:
            beta = weights.lse / len(distance)
            torch.addmm(share, centred, square, beta=beta, out=gradient)
            repetitions = self._ones
        else:
            torch.mm(centred, square, out=gradient)
            gradient.mul_(root).add_(share.mul_(equal.unsqueeze(1)), alpha=weights.lse)
            repetitions = sample_weight.clamp_min(_LEAST_WEIGHT).reciprocal()
        if self._longest < torch.inf:
            norm = torch.mv(torch.mul(gradient, gradient, out=share).T, repetitions).sqrt_()
            gradient.mul_((self._longest / norm).clamp_max_(1))
        return gradient


def _degrees_of_freedom(total: Tensor) -> Tensor:
    # Weights may be shares that sum to one: the variance must then stay positive.
    return torch.maximum(total - 1, total / 2)
