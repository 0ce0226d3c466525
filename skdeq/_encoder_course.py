"""What the losses of a fit of the encoder say: whether it goes on, goes back or is at rest."""

from dataclasses import dataclass

import torch

__all__ = ["Course"]

# Epochs in a row without progress that end a fit.
_PATIENCE = 5
# Loss of an epoch above the best one, as a share of that, which sends the fit back to it, unless
# it has come down from that of the epoch before by this share: with few rows the way from random
# weights to good ones leads over much higher ones.
_ASTRAY = 1.0
_COMING_DOWN = 0.1
# Steps since the best epoch from which on a fit is sent back to it.
_LEAST_STEPS = 6
# Share of a loss that may be rounding.
_ROUNDING = 1e-6


@dataclass
class Course:
    """Losses of a fit so far.

    Attributes
    ----------
    started : float
        Loss of the first weights.
    max_iter : int
        Epochs at most.
    tol : float
        Least progress, as a share of the loss; with 0 a fit never is at rest.
    n_batches : int
        Steps of an epoch.
    n_kept : int
        After how many epochs the loss was lowest; 0 is before the first.
    at_rest : bool
        Whether the last epochs have not made progress.
    """

    started: float
    max_iter: int
    tol: float
    n_batches: int
    n_kept: int = 0
    at_rest: bool = False

    def __post_init__(self) -> None:
        self._lowest = self.started
        self.begin_again()

    def begin_again(self) -> None:
        """Forget the epochs since the best one, which were undone."""
        self._best = self._last = torch.inf
        self._quiet, self.at_rest = 0, False

    def record(self, loss: float, n_iter: int, *, is_last: bool) -> bool:
        """Take in the loss of an epoch.

        Parameters
        ----------
        loss : float
        n_iter : int
            Epochs so far that were not undone, with this one.
        is_last : bool
            Whether there is no other to come.

        Returns
        -------
        bool
            Whether steps are too long, so that the fit has to go back to the best epoch.
        """
        size = max(abs(self._lowest), 1.0)
        rounding = _ROUNDING * size
        fell = self._last - loss
        coming_down = fell > _COMING_DOWN * (self._last - self._lowest) or self._last == torch.inf
        self._last = loss
        # Steps that are too long do not get below where they came from, by more than rounding: the
        # loss of an only batch is that of the weights before.
        nowhere = not self.n_kept and loss >= self._lowest - rounding
        nowhere &= n_iter >= _PATIENCE and not is_last
        astray = (nowhere or loss - self._lowest > _ASTRAY * size) and not coming_down
        astray |= nowhere and n_iter >= self.max_iter // 2
        # Of few rows an epoch is a step or two, after which nothing can be said.
        astray &= (n_iter - self.n_kept) * self.n_batches >= _LEAST_STEPS
        # The objective may pass through zero, where its change has no scale.
        gained = self._best - loss > self.tol * max(abs(loss), 1.0)
        self._best, self._quiet = min(self._best, loss), 0 if gained else self._quiet + 1
        self.at_rest = self.tol > 0 and self._quiet >= _PATIENCE
        # They come to rest above where they came from, too.
        return astray or (self.at_rest and loss - self.started > rounding and not is_last)

    def keep(self, loss: float, n_iter: int) -> bool:
        """Keep an epoch; return whether it is the best, with which the next ones are compared."""
        lower = loss < self._lowest - _ROUNDING * max(abs(self._lowest), 1.0)
        if lower:
            self._lowest, self.n_kept = loss, n_iter
        return lower
