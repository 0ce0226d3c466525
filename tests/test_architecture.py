"""The text that describes a layer says what the layer computes."""

import numpy as np
import pytest
from conftest import FAMILY_OBJECTS, sample

from skdeq import ExpFamilyDEQ, _architecture
from skdeq.families import CANONICAL_MAPS, LINKS, ReLU, get_canonical_map, get_family

NAMES = {
    "exp": np.exp,
    "log": np.log,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "max": np.maximum,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
}


def evaluate(text, family, **values):
    """Value of a formula of the text, whose products are written without a sign."""
    law = get_family(family)
    constants = {
        "N": getattr(law, "n_trials", 0),
        "r": 1 / getattr(law, "dispersion", 1.0),
        "shape": getattr(law, "shape", 1.0),
    }
    for name in ("N", "r", "shape"):
        for function in ("log", "sigmoid", "exp"):
            text = text.replace(f"{name} {function}", f"{name} * {function}")
    text = text.replace("2 cosh", "2 * cosh").replace("^", "**").replace("1[zeta > 0]", "(zeta>0)")
    return eval(text, {}, {**NAMES, **constants, **values})  # noqa: S307


@pytest.mark.parametrize("canonical_map", [*CANONICAL_MAPS, *LINKS])
@pytest.mark.parametrize("family", FAMILY_OBJECTS, ids=str)
def test_formulas_are_what_is_computed(family, canonical_map):
    import torch

    law = get_family(family)
    if canonical_map in LINKS and law.log_link() is None:
        with pytest.raises(ValueError, match="has no log link"):
            ExpFamilyDEQ(family=family, canonical_map=canonical_map).architecture()
        return
    mapping = get_canonical_map(canonical_map).of(law)
    model = ExpFamilyDEQ(family=family, canonical_map=canonical_map)
    negative = law.domain.high <= 0
    if negative and canonical_map in ("relu", "softplus"):
        with pytest.raises(ValueError, match="gives canonical parameters in"):
            model.architecture()
        return
    layer = model.architecture()
    zeta = torch.tensor([-1.7, -0.4, -2.9] + ([] if negative else [0.6, 2.2]), dtype=torch.float64)
    eta = mapping.value(zeta)
    with np.errstate(divide="ignore", invalid="ignore"):
        written = evaluate(layer.canonical_parameter, family, zeta=zeta.numpy())
        np.testing.assert_allclose(written, eta, rtol=1e-12)
        mask = evaluate(layer.mask, family, zeta=zeta.numpy())
        np.testing.assert_allclose(np.broadcast_to(mask, len(zeta)), mapping.derivative(zeta))
        activation = evaluate(layer.activation, family, zeta=zeta.numpy())
        partition = evaluate(layer.log_partition, family, eta=eta.numpy())
    # The formulas of the continuous Bernoulli have a gap at 0, which the ReLU hits.
    known = np.isfinite(activation)
    np.testing.assert_allclose(activation[known], law.mean(eta)[known], rtol=1e-10, atol=1e-15)
    known = np.isfinite(partition)
    np.testing.assert_allclose(partition[known], law.log_partition(eta)[known], rtol=1e-10)


def test_table_and_text():
    table = _architecture.correspondence_table()
    assert table.count("* -") == 1 + 8 + 3 + 2
    assert "``sigmoid(zeta)``" in table
    assert ExpFamilyDEQ(canonical_map=ReLU("off")).architecture().mask == "1"
    text = str(ExpFamilyDEQ(family="poisson").architecture())
    assert "activation             exp(zeta)" in text


@pytest.mark.parametrize("sizes", [(5,), (5, 3)])
def test_equations_of_hidden_layers_hold_at_their_equilibrium(sizes):
    X = sample("poisson")
    model = ExpFamilyDEQ(
        2, family="poisson", hidden_layer_sizes=sizes, alpha=1.3, max_iter=3, fixed_point_tol=1e-10
    ).fit(X)
    layer, parts = model.architecture(), model.map_latents(X).layers
    assert layer.hidden_layer_sizes == sizes

    def formula(text, **values):
        return eval(text.replace("^2", "**2"), {}, {**NAMES, **values})  # noqa: S307

    values = {"x": X[4], "alpha": 1.3, "m": 1.0, "o": 0.0, "T": lambda x: x}
    pairs = [(model.loadings_, model.intercept_)]
    pairs += zip(model.hidden_loadings_, model.hidden_intercepts_, strict=True)
    for at, ((W, b), part) in enumerate(zip(pairs, parts, strict=True), 1):
        values |= {f"W{at}": W, f"b{at}": b, f"z{at}": part[4], f"zeta{at}": W @ part[4] + b}
    for name in ("activation", "mask"):
        values[name] = formula(getattr(layer, name), zeta=values["zeta1"])
    values["R_h"] = lambda zeta: formula(layer.hidden_activation, zeta=zeta)
    values["slope"] = lambda zeta: formula(layer.hidden_mask, zeta=zeta)
    for equation in layer.equilibrium:
        left, *_, right = equation.split(" = ")
        for at in range(1, len(sizes) + 2):
            right = right.replace(f"W{at}^T ", f"W{at}.T @ ").replace(f"W{at} z", f"W{at} @ z")
        right = right.replace("R_h'", "slope").replace("[", "(").replace("]", ")")
        np.testing.assert_allclose(formula(right, **values), values[left], atol=1e-7)
    assert "R_h(zeta) = tanh(zeta)" in str(layer)
