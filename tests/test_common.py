"""scikit-learn's own checks, and those that check_estimator leaves out."""

import pytest
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


@pytest.mark.parametrize(
    "check",
    [
        "check_param_validation",
        "check_set_output_transform",
        "check_set_output_transform_pandas",
        "check_global_output_transform_pandas",
        "check_dataframe_column_names_consistency",
        "check_transformer_get_feature_names_out",
        "check_transformer_get_feature_names_out_pandas",
        "check_f_contiguous_array_estimator",
        "check_global_set_output_transform_polars",
        "check_set_output_transform_polars",
    ],
)
@pytest.mark.parametrize("estimator", [*ESTIMATORS[:2], ImplicitEMEncoder()])
def test_checks_left_out(estimator, check):
    getattr(estimator_checks, check)(type(estimator).__name__, estimator)
