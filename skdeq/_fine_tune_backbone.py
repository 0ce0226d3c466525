"""The backbone of DEQClassifier and DEQRegressor: which it is, pretrained, and its latents."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted

from skdeq._base import to_numpy
from skdeq._chunks import parallel_chunks
from skdeq._expfam_deq import ExpFamilyDEQ
from skdeq._expfam_fitted import narrowed
from skdeq._expfam_layout import changed_parameters
from skdeq._progress import Progress

__all__ = ["WithBackbone"]

# Components of the default backbone, where there are as many features and enough rows. Of the
# labels of digits (three folds) two components get 0.77 right, 4 0.92, 8 0.97, 16 0.98 and 32
# 0.98; on wine, breast cancer and iris all that is from 4 on is within 0.02. Of 40 labelled digits
# (pixels / 4, stratified, train_size=40, random_state 0 to 3 of split and classifier) 2 lead to
# 0.53 right elsewhere, 4 to 0.69, 10 to 0.80 and 16 to 0.81.
_COMPONENTS = 16
_ROWS_OF_EACH = 4
_LEAST_COMPONENTS = 2


def _default_components(X, sample_weight) -> int:
    """Components of the default backbone, by how many rows there are, repetitions included."""
    n, p = X.shape
    total = n if sample_weight is None else max(n, int(sample_weight.sum()))
    enough = max(_LEAST_COMPONENTS, total // _ROWS_OF_EACH)
    return min(_COMPONENTS, enough, n, p)


def _unfrozen(backbone):
    """Return what is in a `FrozenEstimator`, or in several; all else as it is."""
    while isinstance(backbone, FrozenEstimator):
        backbone = backbone.estimator
    return backbone


class WithBackbone(BaseEstimator):
    """Private methods of an estimator that has an `ExpFamilyDEQ` below its head."""

    def _changes(self) -> dict[str, tuple[Any, Any]]:
        """Parameters that ask for another model than is fitted: what they are, and were."""
        asked = self._backbone().get_params(deep=False)
        there = self.backbone_.get_params(deep=False)
        if self.backbone is None:
            asked["n_components"] = there["n_components"]
        changes = {
            f"backbone__{name}": pair for name, pair in changed_parameters(asked, there).items()
        }
        sizes = tuple(self.head_layer_sizes), tuple(coef.shape[1] for coef in self.coefs_[:-1])
        if sizes[0] != sizes[1]:
            changes["head_layer_sizes"] = sizes
        return changes

    def _backbone(self) -> ExpFamilyDEQ:
        backbone = _unfrozen(self.backbone)
        return backbone if isinstance(backbone, ExpFamilyDEQ) else ExpFamilyDEQ()

    def _is_pretrained(self) -> bool:
        """Whether the backbone is fitted, and as what its parameters ask for."""
        backbone = self._backbone()
        is_fitted = hasattr(backbone, "components_")
        is_frozen = isinstance(self.backbone, FrozenEstimator)
        if is_frozen or not is_fitted or backbone._fitted_as is None:
            return is_fitted
        asked = backbone.get_params(deep=False)
        return not changed_parameters(asked, backbone._fitted_as, optimum=True)

    def _check_backbone(self) -> None:
        # One that is fitted is not fitted again, but used with the parameters that it has.
        self._backbone()._validate_params()
        if not isinstance(self.backbone, FrozenEstimator):
            return
        frozen = _unfrozen(self.backbone)
        if not isinstance(frozen, ExpFamilyDEQ):
            raise ValueError(
                "backbone must be an ExpFamilyDEQ, or a FrozenEstimator of one; got a "
                f"FrozenEstimator of {type(frozen).__name__}."
            )
        check_is_fitted(frozen)

    def _pretrained(self, X, sample_weight, progress: Progress, seed: int) -> ExpFamilyDEQ:
        """Copy of the backbone, fitted."""
        backbone = self._backbone()
        if self._is_pretrained():
            if backbone.n_features_in_ != X.shape[1]:
                raise ValueError(
                    f"X has {X.shape[1]} features, but the backbone was fitted on "
                    f"{backbone.n_features_in_}."
                )
            names = getattr(backbone, "feature_names_in_", None)
            seen = getattr(self, "feature_names_in_", None)
            if names is not None and seen is not None and not np.array_equal(names, seen):
                raise ValueError(
                    "The feature names of X are not those that the backbone was fitted with, or "
                    f"in another order: {seen.tolist()} instead of {names.tolist()}."
                )
            return copy.deepcopy(backbone)
        backbone = clone(backbone)
        if self.backbone is None:
            backbone.set_params(n_components=_default_components(X, sample_weight))
        if backbone.random_state is None:
            backbone.set_params(random_state=seed)
        if self.device != "auto":
            backbone.set_params(device=self.device)
        with progress.part("pretrain", backbone):
            backbone.fit(X, sample_weight=sample_weight)
        if hasattr(self, "feature_names_in_"):
            # X was a data frame before it was validated.
            backbone.feature_names_in_ = self.feature_names_in_
        return backbone

    def _latents(self, X, *, checked: bool = False) -> np.ndarray:
        """MAP latents of validated rows, in the top layer."""
        backbone = copy.copy(self.backbone_)
        # Not the one it was pretrained on, which may not be there any more.
        backbone.device = self._backbone().device if self.device == "auto" else self.device
        with parallel_chunks():
            result, setting = backbone._solve_moved(backbone._moved(X))
        if checked:
            backbone._warned_of(result)
        return to_numpy(narrowed(result, setting).layers[-1])
