"""Epochs of a head and its backbone: which to keep, to undo, and when to end."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from skdeq._head_training import HeadTrainer
from skdeq._progress import Progress

__all__ = ["train_head"]

# Times the loss of outputs of zero that the mean loss of an epoch may be.
_ASTRAY = 2.0
# Share of that loss above which training has come to nothing, and how often it begins again then.
_NOTHING, _ATTEMPTS = 0.99, 2

# What epochs are compared by: the score and, as that of few rows moves in leaps, of equal ones the
# mean loss with its sign changed.
_Merit = tuple[float, float]


@dataclass
class _Best:
    """The best epoch so far.

    Attributes
    ----------
    merit : tuple of float
    quiet : int
        Epochs in a row since one made progress.
    parameters : list of Tensor or None
        What to go back to in the end, if not the last.
    """

    merit: _Merit = (-np.inf, -np.inf)
    quiet: int = 0
    parameters: list[Tensor] | None = None

    def record(self, merit: _Merit, tol: float) -> bool:
        """Take in the merit of an epoch; return whether it is the best so far."""
        gained = merit[0] > self.merit[0] + tol
        gained |= merit[0] >= self.merit[0] and merit[1] > self.merit[1] + tol
        self.quiet = 0 if gained else self.quiet + 1
        better = merit > self.merit
        if better:
            self.merit = merit
        return better


@torch.enable_grad()
def train_head(
    trainer: HeadTrainer,
    rows: np.ndarray,
    progress: Progress,
    score: Callable[[], _Merit] | None = None,
    going_on: bool = False,
) -> bool:
    """Train until the loss, or else the score, makes no more progress; return whether it did.

    Parameters
    ----------
    trainer : HeadTrainer
    rows : ndarray of int
        Rows to train on.
    progress : Progress
        Is told of each epoch.
    score : callable, optional
        Score on other rows, and their mean loss with its sign changed; the parameters of the
        best epoch are kept.
    going_on : bool
        Whether this is not the first fit.

    Returns
    -------
    bool
    """
    options = trainer.options
    best = _Best()
    places = torch.from_numpy(rows)
    astray = nothing = trainer.loss_of_nothing(places.to(trainer.rows.device))
    if going_on:
        # What was learned from other targets may be worse, and yet what to go on from.
        astray = max(astray, trainer.mean_loss(trainer.outputs(rows), rows))
    astray *= _ASTRAY
    safe = first = trainer.copied()
    least = np.inf
    for _ in range(options.max_iter):
        progress.begin()
        before = trainer.copied()
        loss = trainer.epoch(_shuffled(trainer, places))
        trainer.loss_curve.append(loss)
        if astray < loss < np.inf:
            trainer.undo(safe)
        elif loss < least:
            # The loss is that of the steps of the epoch, of which the last may be astray.
            least, safe = loss, before
        merit = (-loss, 0.0) if score is None else _scored(trainer, score, best.merit)
        if best.record(merit, options.tol) and score is not None:
            best.parameters = trainer.copied()
        stop = progress.end(
            loss,
            partial(trainer.ended, best.parameters),
            score=None if score is None else merit[0],
        )
        blind = options.fine_tune and least > _NOTHING * nothing
        if blind and best.quiet >= options.n_iter_no_change and trainer.undone < _ATTEMPTS:
            # Steps that are too long may leave features that tell nothing of the rows.
            trainer.undo(first)
            best = _Best()
        if stop or best.quiet >= options.n_iter_no_change:
            break
    trainer.end(best.parameters)
    return best.quiet >= options.n_iter_no_change


def _shuffled(trainer: HeadTrainer, places: Tensor) -> Tensor:
    """Rows in the order of the next epoch; one minibatch has no order."""
    if len(places) > trainer.options.batch_size:
        drawn = torch.randperm(len(places), generator=trainer.generator, device="cpu")
        places = places[drawn]
    return places.to(trainer.rows.device)


def _scored(trainer: HeadTrainer, score: Callable[[], _Merit], best: _Merit) -> _Merit:
    """Score of the parameters as they are, which is recorded."""
    merit = score()
    # Only the next gradient shows whether the last step went astray, and what did is not to be
    # kept, however high it scores.
    if merit > best and not trainer.check_last_step():
        merit = score()
    trainer.scores.append(merit[0])
    return merit
