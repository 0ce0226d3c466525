"""The displays: what their artists show, against what was computed without them."""

import copy
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import sample
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF, PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skdeq import DEQClassifier, DEQRegressor, ExpFamilyDEQ, ImplicitEMEncoder
from skdeq.inspection import (
    ComponentsDisplay,
    ComponentUsageDisplay,
    ConvergenceDisplay,
    ExplainedDevianceDisplay,
    LatentMapDisplay,
)

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = importlib.import_module("matplotlib.pyplot")

DISPLAYS = (
    ComponentsDisplay,
    ComponentUsageDisplay,
    ConvergenceDisplay,
    ExplainedDevianceDisplay,
    LatentMapDisplay,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def counts():
    return sample("poisson", n=120, p=12, k=3)


@pytest.fixture(scope="module")
def model(counts):
    return ExpFamilyDEQ(3, family="poisson", random_state=0).fit(counts)


@pytest.fixture(scope="module")
def digits():
    return load_digits().data[:400]


@pytest.fixture(scope="module")
def encoder(digits):
    return ImplicitEMEncoder(12, lse_weight=2, max_iter=3, random_state=0).fit(digits)


def frame(X):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(X, columns=[f"gene {i}" for i in range(X.shape[1])])


def legend_texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def assert_drawn(display):
    """The figure can be laid out and rendered."""
    display.figure_.canvas.draw()


# ------------------------------------------------------------------------------------ latent map


@pytest.mark.parametrize("pair", [(0, 1), (2, 0)])
def test_the_map_shows_the_scores(model, counts, pair):
    display = LatentMapDisplay.from_estimator(model, counts, component_indices=pair)
    scores = model.transform(counts)
    np.testing.assert_allclose(display.scatter_.get_offsets(), scores[:, pair])
    share = model.explained_deviance_ratio_
    assert display.ax_.get_xlabel() == f"Component {pair[0]} ({share[pair[0]]:.1%} of deviance)"
    assert display.ax_.get_ylabel() == f"Component {pair[1]} ({share[pair[1]]:.1%} of deviance)"
    assert display.legend_ is None and display.colorbar_ is None
    assert display.figure_ is display.ax_.figure
    assert_drawn(display)


def test_labels_have_a_legend_and_one_colour_each(model, counts):
    y = np.array(["b", "a", "c"])[np.arange(len(counts)) % 3]
    display = LatentMapDisplay.from_estimator(model, counts, y, target_name="kind")
    assert legend_texts(display.legend_) == ["a", "b", "c"]
    assert display.legend_.get_title().get_text() == "kind"
    colors = display.scatter_.get_facecolors()
    handles = {
        text.get_text(): matplotlib.colors.to_rgb(handle.get_color())
        for text, handle in zip(
            display.legend_.get_texts(), display.legend_.legend_handles, strict=True
        )
    }
    assert len(set(handles.values())) == 3
    for label, color in zip(y, colors, strict=True):
        np.testing.assert_allclose(color[:3], handles[label])
    paths = display.scatter_.get_paths()
    assert len(paths) == len(y)
    first = {label: paths[list(y).index(label)] for label in "abc"}
    for label, path in zip(y, paths, strict=True):
        np.testing.assert_array_equal(path.vertices, first[label].vertices)
    assert len({path.vertices.tobytes() for path in first.values()}) == 3


def test_shapes_have_one_area():
    y = np.arange(10).repeat(2)
    display = LatentMapDisplay.from_predictions(np.random.default_rng(0).normal(size=(20, 2)), y)
    for path in display.scatter_.get_paths()[::2]:
        # Finely enough for the circle.
        (corners,) = path.transformed(matplotlib.transforms.Affine2D().scale(100)).to_polygons()
        x, height = corners.T
        area = abs(np.sum(x[:-1] * height[1:] - x[1:] * height[:-1])) / 2
        assert area == pytest.approx(np.pi / 4 * 1e4, rel=2e-3)


def test_every_label_has_its_own_colour_and_shape():
    y = np.arange(100)
    display = LatentMapDisplay.from_predictions(
        np.column_stack([y, y]), [f"label {i:02d}" for i in y]
    )
    looks = {
        (color.tobytes(), path.vertices.tobytes())
        for color, path in zip(
            display.scatter_.get_facecolors(), display.scatter_.get_paths(), strict=True
        )
    }
    assert len(looks) == 100
    assert len(legend_texts(display.legend_)) == 100


def test_numbers_have_a_colour_bar(model, counts):
    y = counts.sum(axis=1) + 0.5
    display = LatentMapDisplay.from_estimator(model, counts, y, target_name="total")
    np.testing.assert_array_equal(display.scatter_.get_array(), y)
    assert display.colorbar_.ax.get_ylabel() == "total"
    assert display.legend_ is None
    assert display.scatter_.get_cmap().name == "viridis"
    display = LatentMapDisplay.from_estimator(model, counts, y, colors="magma")
    assert display.scatter_.get_cmap().name == "magma"
    assert_drawn(display)


@pytest.mark.parametrize(
    ("y", "categorical"),
    [
        (np.arange(40) % 20, True),
        (np.arange(40) % 21, False),
        ((np.arange(40) % 3).astype(float), True),
        ((np.arange(40) % 3) + 0.5, False),
        (np.arange(40) % 2 == 0, True),
        (np.array([f"{i}" for i in range(40)]), True),
    ],
)
def test_labels_are_told_from_numbers(y, categorical):
    scores = np.random.default_rng(0).normal(size=(40, 2))
    display = LatentMapDisplay.from_predictions(scores, y)
    assert (display.legend_ is not None) == categorical
    assert (display.colorbar_ is not None) != categorical
    if categorical:
        assert legend_texts(display.legend_) == [str(label) for label in np.unique(y)]


def test_the_target_type_can_be_told():
    scores, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40)
    display = LatentMapDisplay.from_predictions(scores, y, target_type="categorical")
    assert len(legend_texts(display.legend_)) == 40
    display = LatentMapDisplay.from_predictions(scores, y % 2, target_type="continuous")
    assert display.colorbar_ is not None


@pytest.mark.parametrize("missing", [None, np.nan])
def test_missing_labels_are_grey(missing):
    y = np.array(["a", "b", missing, "b"], dtype=object)
    display = LatentMapDisplay.from_predictions(np.eye(4), y)
    assert legend_texts(display.legend_) == ["a", "b", "missing"]
    red, green, blue, _ = display.scatter_.get_facecolors()[2]
    assert red == green == blue
    assert display.legend_.legend_handles[2].get_color() == "#d0d0d0"


def test_missing_numbers_are_grey():
    y = np.array([0.5, np.nan, 2.5, np.inf])
    display = LatentMapDisplay.from_predictions(np.eye(4), y)
    assert_drawn(display)
    np.testing.assert_array_equal(
        np.ma.getmaskarray(display.scatter_.get_array()), [False, True, False, True]
    )
    colors = display.scatter_.get_facecolors()
    np.testing.assert_allclose(colors[1, :3], matplotlib.colors.to_rgb("#d0d0d0"))
    np.testing.assert_array_equal(colors[1], colors[3])
    assert display.scatter_.get_clim() == (0.5, 2.5)


def test_a_pandas_target_brings_its_name_and_its_order(model, counts):
    pandas = pytest.importorskip("pandas")
    stage = pandas.Series(["late", "early", "never"] * 40, name="stage", index=range(5, 125))
    display = LatentMapDisplay.from_estimator(model, counts, stage)
    assert display.legend_.get_title().get_text() == "stage"
    assert legend_texts(display.legend_) == ["early", "late", "never"]
    ordered = stage.astype(pandas.CategoricalDtype(["never", "early", "unseen", "late"]))
    display = LatentMapDisplay.from_estimator(model, counts, ordered)
    assert legend_texts(display.legend_) == ["never", "early", "late"]
    gaps = pandas.Series([1, 2, None] * 40, dtype="Int64")
    display = LatentMapDisplay.from_estimator(model, counts, gaps, target_type="categorical")
    assert legend_texts(display.legend_)[-1] == "missing"


def test_colours_can_be_chosen():
    scores, y = np.eye(3), ["a", "b", "c"]
    display = LatentMapDisplay.from_predictions(scores, y, colors=["k", "r", "b"])
    np.testing.assert_allclose(
        display.scatter_.get_facecolors()[:, :3], [[0, 0, 0], [1, 0, 0], [0, 0, 1]]
    )
    display = LatentMapDisplay.from_predictions(scores, y, colors="tab10")
    np.testing.assert_allclose(
        display.scatter_.get_facecolors()[:, :3], matplotlib.colormaps["tab10"].colors[:3]
    )
    display = LatentMapDisplay.from_predictions(scores, y, colors="viridis")
    np.testing.assert_allclose(
        display.scatter_.get_facecolors()[[0, 2], :3],
        matplotlib.colormaps["viridis"]([0.0, 1.0])[:, :3],
    )
    display = LatentMapDisplay.from_predictions(scores, scatter_kwargs={"c": "k", "s": 7})
    np.testing.assert_allclose(display.scatter_.get_facecolors()[0, :3], 0)
    assert display.scatter_.get_sizes().tolist() == [7]


def test_artists_take_keywords():
    display = LatentMapDisplay.from_predictions(
        np.eye(3),
        ["a", "b", "c"],
        scatter_kwargs={"marker": "x", "linewidths": 2, "alpha": 0.5},
        legend_kwargs={"loc": "upper left", "title": "T"},
    )
    assert len(display.scatter_.get_paths()) == 1
    assert display.scatter_.get_linewidths().tolist() == [2]
    assert display.scatter_.get_alpha() == 0.5
    assert display.legend_.get_title().get_text() == "T"
    assert {handle.get_marker() for handle in display.legend_.legend_handles} == {"x"}


def test_the_legend_is_beside_the_points_where_there_is_room():
    scores, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 3
    display = LatentMapDisplay.from_predictions(scores, y)
    assert_drawn(display)
    legend, axes = display.legend_.get_window_extent(), display.ax_.get_window_extent()
    assert axes.x1 <= legend.x0 and legend.x1 <= display.figure_.bbox.x1
    _, ax = plt.subplots()
    display = LatentMapDisplay.from_predictions(scores, y, ax=ax)
    assert_drawn(display)
    assert display.legend_.get_window_extent().x1 <= ax.get_window_extent().x1


def test_maps_of_other_transformers(digits, encoder, counts):
    pca = PCA(3).fit(digits)
    display = LatentMapDisplay.from_estimator(pca, digits)
    np.testing.assert_allclose(display.scatter_.get_offsets(), pca.transform(digits)[:, :2])
    expected = f"Component 0 ({pca.explained_variance_ratio_[0]:.1%} of variance)"
    assert display.ax_.get_xlabel() == expected
    display = LatentMapDisplay.from_estimator(encoder, digits, component_indices=(4, 7))
    np.testing.assert_allclose(
        display.scatter_.get_offsets(), encoder.transform(digits)[:, [4, 7]]
    )
    assert display.ax_.get_xlabel() == "Activation of component 4"
    whitened = ExpFamilyDEQ(2, family="poisson", whiten=True, random_state=0).fit(counts)
    display = LatentMapDisplay.from_estimator(whitened, counts)
    np.testing.assert_allclose(display.scatter_.get_offsets(), whitened.transform(counts))
    assert display.ax_.get_xlabel() == "Latent 0"
    nmf = NMF(2, max_iter=500).fit(digits)
    display = LatentMapDisplay.from_estimator(nmf, digits)
    assert display.ax_.get_ylabel() == "Component 1"


def test_the_map_of_a_pipeline(digits):
    pipeline = make_pipeline(StandardScaler(), ExpFamilyDEQ(2, random_state=0)).fit(digits)
    display = LatentMapDisplay.from_estimator(pipeline, digits)
    np.testing.assert_allclose(display.scatter_.get_offsets(), pipeline.transform(digits))
    assert "of deviance" in display.ax_.get_xlabel()
    pipeline = clone(pipeline).set_output(transform="pandas").fit(frame(digits))
    display = LatentMapDisplay.from_estimator(pipeline, frame(digits))
    assert display.scatter_.get_offsets().shape == (400, 2)


def test_the_map_refuses_what_it_cannot_show(model, counts):
    one = ExpFamilyDEQ(1, family="poisson").fit(counts)
    with pytest.raises(ValueError, match="needs two components, and there is 1"):
        LatentMapDisplay.from_estimator(one, counts)
    refused = [
        ({"component_indices": (0, 3)}, "from 0 to 2, as there are 3 components; got (0, 3)"),
        ({"component_indices": (-1, 0)}, "from 0 to 2"),
        ({"component_indices": (0.0, 1.0)}, "must be integers"),
        ({"component_indices": (0, 1, 2)}, "must be a pair"),
        ({"component_indices": 1}, "must be a pair"),
        ({"y": np.zeros(7)}, "one entry for each of the 120 rows; it has 7"),
        ({"y": np.zeros((120, 2))}, "1d array"),
        ({"y": np.zeros(120), "target_type": "ordinal"}, "'auto', 'categorical', 'continuous'"),
        ({"y": ["a"] * 120, "target_type": "continuous"}, "not all of it is numbers"),
        ({"y": [f"{i}" for i in range(120)]}, "120 different labels, and no more than 100"),
        ({"y": ["a"] * 120, "colors": ["r", "b"]}, "each of the 1 labels of y; it has 2"),
        ({"y": np.arange(120) / 7, "colors": ["r"]}, "name of a colour map"),
        ({"y": ["a"] * 120, "scatter_kwargs": {"color": "r"}}, "y sets the colours"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            LatentMapDisplay.from_estimator(model, counts, **options)
    assert not plt.get_fignums()
    for scores, message in [
        (np.zeros(5), "two-dimensional"),
        (np.full((5, 2), np.nan), "finite"),
        (np.array([["a", "b"]]), "numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            LatentMapDisplay.from_predictions(scores)


# ------------------------------------------------------------------------------------ components


def test_images_are_the_components(model):
    display = ComponentsDisplay.from_estimator(model, image_shape=(3, 4))
    assert len(display.images_) == 3 and display.bars_ is None
    for image, component in zip(display.images_, model.components_, strict=True):
        np.testing.assert_array_equal(image.get_array(), component.reshape(3, 4))
        bound = np.abs(model.components_).max()
        assert image.get_clim() == (-bound, bound)
        assert image.get_cmap().name == "RdBu_r"
    titles = [panel.get_title() for panel in display.axes_]
    share = model.explained_deviance_ratio_
    assert titles == [f"Component {index}\n{share[index]:.1%}" for index in range(3)]
    assert display.colorbar_ is not None
    assert_drawn(display)


def test_images_of_some_components_each_with_its_scale(model):
    display = ComponentsDisplay.from_estimator(
        model, component_indices=[2, 0], image_shape=(4, 3), shared_scale=False, n_columns=1
    )
    assert display.colorbar_ is None
    for image, index in zip(display.images_, [2, 0], strict=True):
        bound = np.abs(model.components_[index]).max()
        np.testing.assert_array_equal(image.get_array(), model.components_[index].reshape(4, 3))
        assert image.get_clim() == (-bound, bound)
    assert [panel.get_title()[:11] for panel in display.axes_] == ["Component 2", "Component 0"]
    first, second = (panel.get_position() for panel in display.axes_)
    assert first.x0 == pytest.approx(second.x0) and first.y0 > second.y1


@pytest.mark.parametrize(("sign", "limits"), [(1, (0, 3)), (-1, (-3, 0))])
def test_components_of_one_sign_have_a_map_from_zero(sign, limits):
    components = sign * np.array([[0, 1, 2, 3], [1, 0, 0, 1.0]])
    display = ComponentsDisplay(components=components, image_shape=(2, 2)).plot()
    assert all(image.get_clim() == limits for image in display.images_)
    cmap = display.images_[0].get_cmap()
    assert cmap.name == ("Greys" if sign == 1 else "Greys_r")
    zero = display.images_[1].norm(0.0)
    np.testing.assert_allclose(cmap(float(zero))[:3], 1)


def test_images_take_keywords(model):
    display = ComponentsDisplay.from_estimator(
        model,
        image_shape=(3, 4),
        image_kwargs={"cmap": "PuOr", "norm": matplotlib.colors.CenteredNorm()},
    )
    assert display.images_[0].get_cmap().name == "PuOr"
    assert isinstance(display.images_[0].norm, matplotlib.colors.CenteredNorm)


def test_bars_are_the_largest_entries(counts):
    data = frame(counts)
    model = ExpFamilyDEQ(3, family="poisson", random_state=0).fit(data)
    display = ComponentsDisplay.from_estimator(model, n_top_features=5)
    assert len(display.bars_) == 3 and display.images_ is None
    for bars, panel, component in zip(
        display.bars_, display.axes_, model.components_, strict=True
    ):
        top = sorted(range(12), key=lambda feature: -abs(component[feature]))[:5]
        np.testing.assert_allclose([bar.get_width() for bar in bars], component[top])
        names = [label.get_text() for label in panel.get_yticklabels()]
        assert names == [f"gene {feature}" for feature in top]
        for bar in bars:
            red, _, blue, _ = bar.get_facecolor()
            assert (red > blue) == (bar.get_width() > 0)
        low, high = panel.get_ylim()
        assert low > high
        assert panel.get_xlim() == display.axes_[0].get_xlim()
    assert display.axes_[1].get_title().endswith("% of deviance")
    assert_drawn(display)


def test_names_of_features(counts, digits):
    def names(display):
        return {label.get_text() for label in display.axes_[0].get_yticklabels()}

    model = ExpFamilyDEQ(2, family="poisson", random_state=0).fit(counts)
    display = ComponentsDisplay.from_estimator(model, n_top_features=50)
    assert names(display) == {f"x{i}" for i in range(12)}
    given = [f"word {i}" for i in range(12)]
    display = ComponentsDisplay.from_estimator(model, n_top_features=12, feature_names=given)
    assert names(display) == set(given)
    data = frame(digits)
    pipeline = make_pipeline(StandardScaler(), PCA(2)).fit(data)
    display = ComponentsDisplay.from_estimator(pipeline, n_top_features=64)
    assert names(display) == set(data.columns)
    np.testing.assert_array_equal(display.components, pipeline[-1].components_)


def test_components_of_the_encoder(encoder):
    display = ComponentsDisplay.from_estimator(encoder, image_shape=(8, 8))
    np.testing.assert_array_equal(
        [image.get_array().ravel() for image in display.images_], encoder.components_
    )
    assert display.axes_[11].get_title() == "Component 11"
    display = ComponentsDisplay.from_estimator(encoder, component_indices=11, image_shape=(8, 8))
    assert len(display.images_) == 1
    assert_drawn(display)


def test_components_refuse_what_they_cannot_show(model):
    refused = [
        ({"image_shape": (3, 5)}, "features, 12; got (3, 5), 15 pixels"),
        ({"image_shape": (3, 2, 2)}, "height and a width"),
        ({"image_shape": (-3, -4)}, "height and a width"),
        ({"image_shape": 12}, "height and a width"),
        ({"component_indices": [0, 3]}, "from 0 to 2"),
        ({"component_indices": []}, "from 0 to 2"),
        ({"feature_names": ["a", "b"]}, "each of the 12 features; it has the shape (2,)"),
        ({"n_top_features": 0}, "n_top_features must be an integer of at least 1; got 0"),
        ({"n_top_features": 2.5}, "n_top_features must be an integer of at least 1; got 2.5"),
        ({"n_columns": 0}, "n_columns must be an integer of at least 1; got 0"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            ComponentsDisplay.from_estimator(model, **options)
    assert not plt.get_fignums()
    with pytest.raises(ValueError, match="each of the 3 components; it has 1"):
        ComponentsDisplay(components=model.components_, titles=["one"]).plot()


# ----------------------------------------------------------------------------------- convergence


def test_the_curve_is_the_objective(model, counts):
    display = ConvergenceDisplay.from_estimator(model)
    np.testing.assert_array_equal(display.line_.get_ydata(), model.loss_curve_)
    np.testing.assert_array_equal(
        display.line_.get_xdata(), np.arange(1, len(model.loss_curve_) + 1)
    )
    assert model.converged_
    assert display.end_.get_xydata().tolist() == [[model.n_iter_, model.loss_curve_[-1]]]
    assert legend_texts(display.axes_[0].get_legend()) == ["converged"]
    assert display.axes_[0].get_xlabel() == "Iteration"
    assert display.histogram_ is None and len(display.axes_) == 1
    adam = ExpFamilyDEQ(2, family="poisson", solver="adam", max_iter=3, tol=1, random_state=0)
    display = ConvergenceDisplay.from_estimator(adam.fit(counts))
    assert display.axes_[0].get_xlabel() == "Epoch"


def test_the_gap_is_above_the_lowest_value():
    display = ConvergenceDisplay(loss_curve=[5.0, 2.0, 1.0, 1.5], fit_converged=False)
    display.plot(kind="gap")
    np.testing.assert_array_equal(display.line_.get_xydata(), [[1, 4], [2, 1], [4, 0.5]])
    assert display.axes_[0].get_yscale() == "log"
    assert display.end_.get_xydata().tolist() == [[4, 0.5]]
    assert display.end_.get_markerfacecolor() == "white"
    assert legend_texts(display.axes_[0].get_legend()) == ["stopped before it converged"]
    display = ConvergenceDisplay(loss_curve=[5.0, 2.0, 1.0], fit_converged=True).plot(kind="gap")
    assert display.end_.get_xydata().tolist() == [[3, 0]]
    assert_drawn(display)


def test_residuals_are_on_their_side_of_the_tolerance(model, counts):
    display = ConvergenceDisplay.from_estimator(model, counts)
    result = model.map_latents(counts)
    np.testing.assert_array_equal(display.residuals, result.residual)
    solved, left = display.histogram_
    assert sum(bar.get_height() for bar in solved) == len(counts)
    assert sum(bar.get_height() for bar in left) == 0
    assert max(bar.get_x() for bar in solved if bar.get_height()) < model.fixed_point_tol
    assert display.tolerance_line_.get_xdata()[0] == model.fixed_point_tol
    assert display.unsolved_ is None
    texts = legend_texts(display.axes_[1].get_legend())
    assert texts == ["solved (120 rows)", "tolerance 1e-06"]
    assert_drawn(display)


def test_rows_that_are_not_solved_are_marked():
    residuals = np.array([0.0, 1e-9, 1e-8, 1e-7, 3e-5, 2e-3, np.inf])
    display = ConvergenceDisplay(loss_curve=[1.0], residuals=residuals, tol=1e-6).plot()
    solved, left = display.histogram_
    assert sum(bar.get_height() for bar in solved) == 4
    assert sum(bar.get_height() for bar in left) == 2
    # The bars of the two kinds never share a bin.
    for below, above in zip(solved, left, strict=True):
        assert not (below.get_height() and above.get_height())
    np.testing.assert_allclose(display.unsolved_.get_xdata(), [3e-5, 2e-3])
    texts = legend_texts(display.axes_[1].get_legend())
    assert texts == ["solved (4 rows)", "not solved (3 rows)", "tolerance 1e-06"]
    assert display.axes_[1].get_xscale() == "log"
    assert_drawn(display)


def test_flags_overrule_the_tolerance_and_bins_can_be_chosen():
    residuals = np.geomspace(1e-9, 1e-3, 50)
    flags = np.arange(50) % 2 == 0
    display = ConvergenceDisplay(loss_curve=[1.0], residuals=residuals, converged=flags).plot(
        histogram_kwargs={"bins": [1e-10, 1e-6, 1e-2], "color": ["k", "r"]}
    )
    heights = [[bar.get_height() for bar in container] for container in display.histogram_]
    expected = [np.histogram(residuals[at], [1e-10, 1e-6, 1e-2])[0] for at in (flags, ~flags)]
    np.testing.assert_array_equal(heights, expected)
    assert display.tolerance_line_ is None


@pytest.mark.parametrize(
    "residuals", [np.zeros(4), np.full(4, 1e-8), np.full(4, np.inf), np.full(4, np.nan)]
)
@pytest.mark.parametrize("tol", [0.0, 1e-6])
def test_residuals_without_spread_are_drawn(residuals, tol):
    display = ConvergenceDisplay(loss_curve=[1.0, 0.5], residuals=residuals, tol=tol).plot()
    shown = sum(bar.get_height() for bar in display.histogram_[0])
    assert shown == (4 if residuals[0] <= tol else 0)
    assert_drawn(display)


def test_curves_of_the_other_estimators(encoder, counts):
    display = ConvergenceDisplay.from_estimator(encoder)
    np.testing.assert_array_equal(display.line_.get_ydata(), encoder.loss_curve_)
    assert display.axes_[0].get_xlabel() == "Epoch"
    assert display.end_ is None
    options = {"max_iter": 4, "tol": 10, "n_iter_no_change": 2, "random_state": 0}
    y = np.arange(len(counts)) % 2
    for estimator in (DEQClassifier, DEQRegressor):
        fitted = estimator(ExpFamilyDEQ(2, family="poisson"), **options).fit(counts, y)
        display = ConvergenceDisplay.from_estimator(fitted)
        np.testing.assert_array_equal(display.line_.get_ydata(), fitted.loss_curve_)
        assert display.axes_[0].get_ylabel() == "Mean loss"
    options = {"family": "poisson", "max_iter": 2, "tol": 1.0, "random_state": 0}
    deep = ExpFamilyDEQ(2, hidden_layer_sizes=(3,), **options).fit(counts)
    assert ConvergenceDisplay.from_estimator(deep).axes_[0].get_xlabel() == "Epoch"


def test_convergence_of_a_pipeline(digits):
    pipeline = make_pipeline(StandardScaler(), ExpFamilyDEQ(2, random_state=0)).fit(digits)
    display = ConvergenceDisplay.from_estimator(pipeline, digits, line_kwargs={"c": "k", "lw": 3})
    scaled = pipeline[:-1].transform(digits)
    np.testing.assert_array_equal(display.residuals, pipeline[-1].map_latents(scaled).residual)
    np.testing.assert_array_equal(display.line_.get_ydata(), pipeline[-1].loss_curve_)
    assert display.line_.get_color() == "k" and display.line_.get_linewidth() == 3


def test_convergence_refuses_what_it_cannot_show(encoder, digits, model):
    with pytest.raises(ValueError, match="with X needs a fitted ExpFamilyDEQ.*got Implicit"):
        ConvergenceDisplay.from_estimator(encoder, digits)
    refused = [
        ({"loss_curve": []}, "loss_curve must be one-dimensional"),
        ({"loss_curve": [1.0], "residuals": [1.0]}, "need converged, or a tol"),
        ({"loss_curve": [1.0], "residuals": [1.0], "converged": [True, False]}, "shapes"),
        ({"loss_curve": [1.0], "residuals": [], "tol": 1.0}, "shapes"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            ConvergenceDisplay(**options).plot()
    with pytest.raises(ValueError, match="'objective', 'gap'; got 'log'"):
        ConvergenceDisplay.from_estimator(model, kind="log")
    assert not plt.get_fignums()


# ---------------------------------------------------------------------------- explained deviance


def test_bars_are_shares_and_the_curve_is_their_sum(model):
    display = ExplainedDevianceDisplay.from_estimator(model)
    share = model.explained_deviance_ratio_
    np.testing.assert_allclose([bar.get_height() for bar in display.bars_], share)
    np.testing.assert_allclose(
        display.line_.get_ydata(), [share[0], share[0] + share[1], share.sum()]
    )
    assert legend_texts(display.legend_) == ["each component", "cumulative"]
    assert display.ax_.get_ylabel() == "Share of deviance explained"
    assert display.figure_ is display.ax_.figure
    assert_drawn(display)
    texts = [label.get_text() for label in display.ax_.get_yticklabels()]
    assert all(re.fullmatch(r"[\d.]+%", text) for text in texts)


def test_shares_of_the_variance(digits):
    pipeline = make_pipeline(StandardScaler(), PCA(5)).fit(digits)
    display = ExplainedDevianceDisplay.from_estimator(
        pipeline, bar_kwargs={"fc": "k"}, line_kwargs={"ls": ":"}
    )
    np.testing.assert_allclose(
        [bar.get_height() for bar in display.bars_], pipeline[-1].explained_variance_ratio_
    )
    assert display.ax_.get_ylabel() == "Share of variance explained"
    assert display.bars_[0].get_facecolor() == (0, 0, 0, 1)
    assert display.line_.get_linestyle() == ":"


def test_shares_must_be_a_list():
    with pytest.raises(ValueError, match=re.escape("got an array of shape (2, 2)")):
        ExplainedDevianceDisplay(explained_ratio=np.zeros((2, 2))).plot()
    assert not plt.get_fignums()


# ----------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize("kind", ["mean", "active", "responsibility"])
@pytest.mark.parametrize("output", ["activations", "responsibilities"])
def test_usage_is_that_of_the_activations(digits, encoder, kind, output):
    chosen = clone(encoder).set_params(output=output).fit(digits)
    display = ComponentUsageDisplay.from_estimator(chosen, digits, kind=kind)
    assert chosen.output == output
    distance = encoder.transform(digits)
    expected = {
        "mean": distance.mean(axis=0),
        "active": np.mean(distance > 0, axis=0),
        "responsibility": encoder.responsibilities(digits).mean(axis=0),
    }[kind]
    heights = [bar.get_height() for bar in display.bars_]
    np.testing.assert_allclose(heights, expected, rtol=1e-10)
    np.testing.assert_allclose(
        display.image_.get_array(), np.corrcoef(distance, rowvar=False), atol=1e-12
    )
    assert display.image_.get_clim() == (-1, 1)
    assert display.dead_marks_ is None
    if kind == "responsibility":
        assert display.equal_line_.get_ydata()[0] == 1 / 12
    assert_drawn(display)


def test_active_is_beyond_the_threshold(encoder, digits):
    display = ComponentUsageDisplay.from_estimator(encoder, digits, threshold=0.3)
    expected = np.mean(encoder.transform(digits) > 0.3, axis=0)
    np.testing.assert_allclose(display.active_share, expected)


def test_dead_components_are_marked(digits, encoder):
    dead = np.array([3, 8])
    dying = copy.deepcopy(encoder)
    dying.intercept_[dead] -= 1e6
    dying.dead_components_ = dead
    assert not dying.transform(digits)[:, dead].any()
    display = ComponentUsageDisplay.from_estimator(dying, digits)
    np.testing.assert_array_equal(display.dead_marks_.get_xdata(), dead)
    assert legend_texts(display.axes_[0].get_legend()) == ["dead (2 of 12)"]
    grey = matplotlib.colors.to_rgba("#d0d0d0")
    assert [bar.get_facecolor() == grey for bar in display.bars_] == [
        index in dead for index in range(12)
    ]
    again = ComponentUsageDisplay.from_predictions(dying.transform(digits))
    np.testing.assert_array_equal(again.dead_components, dead)


@pytest.mark.parametrize("dead", [[9], [-1], [0.5], [[1]], [True]])
def test_dead_components_that_are_none_are_refused(dead):
    activations = np.random.default_rng(0).normal(size=(20, 5))
    with pytest.raises(ValueError, match="dead_components must be integers from 0 to 4, as there"):
        ComponentUsageDisplay.from_predictions(activations, dead_components=dead)
    display = ComponentUsageDisplay.from_predictions(activations, dead_components=[])
    assert display.dead_marks_ is None


def test_a_constant_component_has_no_correlation():
    activations = np.random.default_rng(0).random((50, 3))
    activations[:, 1] = 0.1
    display = ComponentUsageDisplay.from_predictions(activations)
    assert display.dead_components.tolist() == [1]
    shown = np.ma.getmaskarray(display.image_.get_array())
    assert shown[1].all() and shown[:, 1].all() and shown.sum() == 5
    np.testing.assert_allclose(
        display.correlation[0, 2], np.corrcoef(activations[:, 0], activations[:, 2])[0, 1]
    )
    np.testing.assert_allclose(display.image_.cmap.get_bad()[:3], 0xD0 / 0xFF)
    single = ComponentUsageDisplay.from_predictions(activations[:, :1])
    np.testing.assert_allclose(single.correlation, [[1]])
    nothing = ComponentUsageDisplay.from_predictions(np.zeros((5, 2)))
    assert np.isnan(nothing.correlation).all()
    assert_drawn(nothing)


def test_usage_of_a_pipeline(digits):
    pipeline = make_pipeline(StandardScaler(), ImplicitEMEncoder(8, max_iter=2, random_state=0))
    pipeline.fit(digits)
    display = ComponentUsageDisplay.from_estimator(
        pipeline, digits, bar_kwargs={"color": "k"}, image_kwargs={"cmap": "PuOr"}
    )
    np.testing.assert_allclose(display.mean_activation, pipeline.transform(digits).mean(axis=0))
    assert display.image_.get_cmap().name == "PuOr"


def test_usage_refuses_what_it_cannot_show(encoder, digits):
    with pytest.raises(ValueError, match="at least two rows; there are 1"):
        ComponentUsageDisplay.from_estimator(encoder, digits[:1])
    message = "'mean', 'active', 'responsibility'; got 'share'"
    with pytest.raises(ValueError, match=message):
        ComponentUsageDisplay.from_estimator(encoder, digits, kind="share")
    with pytest.raises(ValueError, match="finite"):
        ComponentUsageDisplay.from_predictions([[np.nan], [1.0]])
    assert not plt.get_fignums()


# ----------------------------------------------------------------------------------- all of them


def draw(display, model, counts, encoder, digits, **options):
    calls = {
        ComponentsDisplay: (model,),
        ComponentUsageDisplay: (encoder, digits),
        ConvergenceDisplay: (model, counts),
        ExplainedDevianceDisplay: (model,),
        LatentMapDisplay: (model, counts, np.arange(len(counts)) % 3),
    }
    return display.from_estimator(*calls[display], **options)


@pytest.mark.parametrize("display", DISPLAYS)
def test_displays_draw_on_given_axes(display, model, counts, encoder, digits):
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    drawn = draw(display, model, counts, encoder, digits, ax=right)
    assert drawn.figure_ is figure
    assert not left.has_data()
    panels = getattr(drawn, "axes_", None)
    if panels is None:
        assert drawn.ax_ is right
        panels = [right]
    else:
        assert drawn.bounding_ax_ is right and not right.axison
        with pytest.raises(ValueError, match=re.escape("pass ax=display.axes_")):
            drawn.plot(ax=right)
    assert_drawn(drawn)
    for panel in panels:
        assert panel.get_position().x0 > left.get_position().x1


@pytest.mark.parametrize("display", DISPLAYS)
def test_displays_are_drawn_again(display, model, counts, encoder, digits):
    drawn = draw(display, model, counts, encoder, digits)
    first = drawn.figure_
    assert drawn.plot() is drawn
    assert drawn.figure_ is not first
    assert [axes.get_position().bounds for axes in drawn.figure_.axes] == [
        axes.get_position().bounds for axes in first.axes
    ]
    ax = getattr(drawn, "axes_", None)
    second = drawn.figure_
    drawn.plot(ax=drawn.ax_ if ax is None else ax)
    assert drawn.figure_ is second
    assert_drawn(drawn)


@pytest.mark.parametrize("display", [ComponentsDisplay, ComponentUsageDisplay, ConvergenceDisplay])
def test_panels_take_an_array_of_axes(display, model, counts, encoder, digits):
    n_panels = 3 if display is ComponentsDisplay else 2
    _, axes = plt.subplots(1, n_panels)
    drawn = draw(display, model, counts, encoder, digits, ax=axes)
    assert list(drawn.axes_) == list(axes)
    assert drawn.bounding_ax_ is None
    with pytest.raises(ValueError, match=f"array of {n_panels}, one for each panel; got 1"):
        drawn.plot(ax=axes[:1])
    with pytest.raises(ValueError, match="array of"):
        drawn.plot(ax="axes")
    loose = plt.figure().add_axes([0.1, 0.1, 0.8, 0.8])
    with pytest.raises(ValueError, match="not part of a grid of subplots"):
        drawn.plot(ax=loose)


@pytest.mark.parametrize("display", DISPLAYS)
def test_unfitted_estimators_are_refused(display, counts):
    kind = ImplicitEMEncoder if display is ComponentUsageDisplay else ExpFamilyDEQ
    rows = [counts] if display in (ComponentUsageDisplay, LatentMapDisplay) else []
    for estimator in (kind(), make_pipeline(StandardScaler(), kind())):
        with pytest.raises(NotFittedError):
            display.from_estimator(estimator, *rows)
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("display", "accepted"),
    [
        (ComponentsDisplay, "ExpFamilyDEQ, ImplicitEMEncoder or PCA"),
        (ComponentUsageDisplay, "ImplicitEMEncoder"),
        (ConvergenceDisplay, "ExpFamilyDEQ, ImplicitEMEncoder, DEQClassifier or DEQRegressor"),
        (ExplainedDevianceDisplay, "ExpFamilyDEQ or PCA"),
        (LatentMapDisplay, "ExpFamilyDEQ, ImplicitEMEncoder or other transformer"),
    ],
)
def test_wrong_estimators_are_refused_by_name(display, accepted, counts):
    y = np.arange(len(counts)) % 2
    classifier = LogisticRegression().fit(counts, y)
    rows = [counts] if display in (ComponentUsageDisplay, LatentMapDisplay) else []
    for given, name in [
        (classifier, "LogisticRegression, which has no"),
        (make_pipeline(classifier), "Pipeline that ends in LogisticRegression, which has no"),
        (ExpFamilyDEQ, "the class ExpFamilyDEQ, not an instance"),
        (counts, "ndarray, which is no estimator"),
        (None, "NoneType, which is no estimator"),
    ]:
        message = f"{display.__name__} needs a fitted {accepted}, or a pipeline that ends in one; "
        with pytest.raises(ValueError, match=re.escape(f"{message}got {name}")):
            display.from_estimator(given, *rows)
    assert not plt.get_fignums()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_refusal_says_which_part_to_pass(counts):
    y = np.arange(len(counts)) % 2
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0)
    classifier = DEQClassifier(backbone, max_iter=2, random_state=0).fit(counts, y)
    with pytest.raises(ValueError, match="no transform. Pass its backbone_."):
        LatentMapDisplay.from_estimator(classifier, counts)
    LatentMapDisplay.from_estimator(classifier.backbone_, counts)
    search = GridSearchCV(backbone, {"alpha": [1]}, cv=2).fit(counts)
    with pytest.raises(ValueError, match="no components_. Pass its best_estimator_."):
        ComponentsDisplay.from_estimator(search)
    pipeline = make_pipeline(backbone, LogisticRegression()).fit(counts, y)
    with pytest.raises(ValueError, match=re.escape("Pass the steps before it, pipeline[:-1].")):
        LatentMapDisplay.from_estimator(pipeline, counts)
    LatentMapDisplay.from_estimator(pipeline[:-1], counts)


def test_a_refitted_backbone_has_no_share(counts):
    y = np.arange(len(counts)) % 2
    backbone = ExpFamilyDEQ(2, family="poisson", random_state=0)
    options = {"max_iter": 3, "tol": 10, "n_iter_no_change": 1, "random_state": 0}
    classifier = DEQClassifier(backbone, **options).fit(counts, y)
    display = LatentMapDisplay.from_estimator(classifier.backbone_, counts)
    assert display.ax_.get_xlabel() == "Component 0"
    reason = "got ExpFamilyDEQ, which has no explained_deviance.*Fine-tuning changed what"
    with pytest.raises(ValueError, match=reason):
        ExplainedDevianceDisplay.from_estimator(classifier.backbone_)


def test_matplotlib_is_imported_on_use_only():
    code = "import sys, skdeq, skdeq.inspection; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("display", DISPLAYS)
def test_without_matplotlib_the_message_names_it(display, model, counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=f"{display.__name__}.from_estimator requires matpl"):
        draw(display, model, counts, None, None)


def test_components_of_kernels_are_their_places():
    X = (load_digits().data[:150] > 7).astype(float)
    options = {"loadings": "conv2d", "image_shape": (8, 8), "stride": 2, "random_state": 0}
    model = ExpFamilyDEQ(2, family="bernoulli", max_iter=5, tol=1.0, **options).fit(X)
    display = ComponentsDisplay.from_estimator(model, image_shape=(8, 8))
    places = len(model.components_) // 2
    assert len(display.titles) == 2 * places
    network = DEQClassifier(model, max_iter=1, tol=10.0, random_state=0)
    tuned = ComponentsDisplay.from_estimator(
        network.fit(X, load_digits().target[:150]).backbone_, image_shape=(8, 8)
    )
    assert tuned.titles[places] == "Component 1, place 0"
    for kernel, share in enumerate(model.explained_deviance_ratio_):
        for place in (0, places - 1):
            title = display.titles[kernel * places + place]
            assert title == f"Component {kernel}, place {place}\n{share:.1%} at all places"
    # A map of two of them, too.
    chart = LatentMapDisplay.from_estimator(model, X, component_indices=(1, places))
    shares = model.explained_deviance_ratio_
    expected = [
        f"Component {kernel}, place {place} ({shares[kernel]:.1%} of deviance at all places)"
        for kernel, place in ((0, 1), (1, 0))
    ]
    assert [chart.ax_.get_xlabel(), chart.ax_.get_ylabel()] == expected
