"""Use an installed skdeq once, and make sure that it is the one in the folder given."""

import sys
import warnings
from importlib.metadata import metadata
from pathlib import Path

import numpy as np

import skdeq

assert Path(skdeq.__file__).is_relative_to(Path(sys.argv[1]).resolve()), skdeq.__file__
assert metadata("skdeq")["Version"] == skdeq.__version__

warnings.simplefilter("ignore")
X = np.random.default_rng(0).poisson(2.0, size=(60, 8))
y = np.arange(60) % 2
deq = skdeq.ExpFamilyDEQ(2, family="poisson", random_state=0)
assert deq.fit_transform(X).shape == (60, 2)
assert deq.map_latents(X).converged.all()
assert skdeq.ImplicitEMEncoder(4, max_iter=2).fit(X).transform(X).shape == (60, 4)
for network in (skdeq.DEQClassifier, skdeq.DEQRegressor):
    assert network(deq, max_iter=2).fit(X, y).predict(X).shape == (60,)
print(f"skdeq {skdeq.__version__} works from {Path(skdeq.__file__).parent}")
