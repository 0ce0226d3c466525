"""scikit-learn's own checks, and those that check_estimator leaves out."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.base import TransformerMixin, clone
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder

ESTIMATORS = [
    ExpFamilyDEQ(),
    ExpFamilyDEQ(family="poisson"),
    ExpFamilyDEQ(family="poisson", exposure="total", whiten=True),
    ExpFamilyDEQ(canonical_map="softplus"),
    ImplicitEMEncoder(),
    ImplicitEMEncoder(
        8, activation="softplus", solver="adam", learning_rate=0.001, output="responsibilities"
    ),
    DEQClassifier(),
    DEQRegressor(),
]


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


CHECKS = [
    "check_param_validation",
    "check_dataframe_column_names_consistency",
    "check_f_contiguous_array_estimator",
    "check_inplace_ensure_writeable",
    "check_all_zero_sample_weights_error",
]
TRANSFORMER_CHECKS = [
    "check_get_feature_names_out_error",
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
]


@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        (estimator, check)
        for estimator in ESTIMATORS
        for check in CHECKS + TRANSFORMER_CHECKS * isinstance(estimator, TransformerMixin)
    ],
)
def test_checks_left_out(estimator, check):
    if "pandas" in check or "polars" in check:
        pytest.importorskip("polars" if "polars" in check else "pandas")
    if not hasattr(estimator_checks, check):
        pytest.skip("of a later scikit-learn")
    getattr(estimator_checks, check)(type(estimator).__name__, clone(estimator))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("estimator", [ESTIMATORS[place] for place in (0, 4, 6, 7)])
def test_polars_frames_are_frames(estimator):
    polars = pytest.importorskip("polars")
    X, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 2
    names = [f"gene {j}" for j in range(4)]
    frame = polars.DataFrame(X, schema=names)
    fitted = clone(estimator).set_params(max_iter=3, random_state=0).fit(frame, y)
    assert fitted.feature_names_in_.tolist() == names
    method = fitted.transform if isinstance(estimator, TransformerMixin) else fitted.predict
    again = clone(fitted).fit(X, y)
    assert again.loss_curve_ == fitted.loss_curve_
    with pytest.raises(ValueError, match="feature names should match"):
        method(frame.select(names[::-1]))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        method(X)
    if isinstance(estimator, TransformerMixin):
        codes = fitted.set_output(transform="polars").transform(frame)
        assert isinstance(codes, polars.DataFrame)
        assert codes.columns == fitted.get_feature_names_out().tolist()


@pytest.mark.parametrize("estimator", [ESTIMATORS[place] for place in (0, 4, 6, 7)])
def test_says_where_an_entry_is_no_number(estimator):
    pandas = pytest.importorskip("pandas")
    X, y = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 2
    frame = pandas.DataFrame(X).astype(object)
    frame.iloc[3, 1] = pandas.NA
    with pytest.raises(TypeError, match="objects of type NAType: row 3, column 1 of X is <NA>"):
        clone(estimator).fit(frame, y)
    frame.iloc[3, 1] = "seven"
    with pytest.raises(ValueError, match="and not text: row 3, column 1 of X is 'seven'"):
        clone(estimator).fit(frame, y)
    frame = pandas.DataFrame(X).assign(day=pandas.date_range("2020-01-01", periods=40))
    with pytest.raises(TypeError, match="objects of type Timestamp: row 0, column 4 of X"):
        clone(estimator).fit(frame, y)


@pytest.mark.parametrize("estimator", [ESTIMATORS[place] for place in (0, 4, 6, 7)])
def test_html_links_to_the_documentation(estimator):
    name = type(estimator).__name__
    page = f"generated/skdeq.{name}.html"
    assert f'href="https://skdeq.github.io/skdeq/{page}"' in estimator._repr_html_()
    # Autosummary makes that page of an entry below "currentmodule:: skdeq".
    entries = (Path(__file__).parents[1] / "doc" / "api.rst").read_text()
    listed = entries.partition(".. currentmodule:: skdeq\n")[2].partition("currentmodule")[0]
    assert f"\n   {name}\n" in listed
