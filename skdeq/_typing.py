"""Types that the signatures of the estimators share."""

from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["MatrixLike", "Output", "RandomState", "VectorLike"]

# Rows: anything that numpy can read, data frames among it, sparse matrices, and tensors.
MatrixLike: TypeAlias = ArrayLike | sp.spmatrix | sp.sparray | Tensor
# Targets and weights.
VectorLike: TypeAlias = ArrayLike | Tensor
# An ndarray for what numpy reads, a tensor for a tensor, a data frame where `set_output` asks
# for one: which of them, no type of the input alone can tell.
Output: TypeAlias = Any
RandomState: TypeAlias = int | np.random.RandomState | None
