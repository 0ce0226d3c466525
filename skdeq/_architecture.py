"""The dictionary between statistics and architecture: what layer a model is."""

from dataclasses import dataclass

from skdeq.families import CANONICAL_MAPS, FAMILIES, CanonicalMap, Family, Identity, LogLink

__all__ = ["Architecture", "correspondence_table", "describe"]


@dataclass(frozen=True)
class Architecture:
    """The equilibrium layer that a model amounts to, as text.

    With one layer of latents ``z = f(z) = W^T [m * mask * (T(x) - activation)] / alpha`` with
    ``zeta = W z + b + o``, and m = 0 where an entry is missing; `equilibrium` has the equations
    of hidden layers, too.

    Attributes
    ----------
    family, canonical_map : str
    sufficient_statistic : str
        T(x).
    log_partition : str
        A as a function of eta.
    canonical_parameter : str
        eta as a function of zeta.
    activation : str
        A'(eta), the mean of T(x), as a function of zeta.
    mask : str
        R'(zeta), which multiplies data and activation.
    loadings : str
        What W is: dense, or the convolution with which kernels.
    hidden_layer_sizes : tuple of int
        Latents of the layers below the top, from the data upwards.
    hidden_activation, hidden_mask : str
        R_h(zeta), the mean of latents given those above, and its derivative; empty without
        hidden layers.
    """

    family: str
    canonical_map: str
    sufficient_statistic: str
    log_partition: str
    canonical_parameter: str
    activation: str
    mask: str
    loadings: str = "dense"
    hidden_layer_sizes: tuple[int, ...] = ()
    hidden_activation: str = ""
    hidden_mask: str = ""

    @property
    def equilibrium(self) -> tuple[str, ...]:
        """The equations that latents and linear predictors solve together."""
        top = len(self.hidden_layer_sizes) + 1
        data = "[m * mask * (T(x) - activation)] / alpha"
        if top == 1:
            return f"z = W^T {data}", "zeta = W z + b + o"
        equations = [f"z1 = R_h(zeta2) + W1^T {data}"]
        for layer in range(2, top + 1):
            above = f"R_h(zeta{layer + 1}) + " if layer < top else ""
            inner = f"R_h'(zeta{layer}) * (z{layer - 1} - R_h(zeta{layer}))"
            equations.append(f"z{layer} = {above}W{layer}^T [{inner}]")
        equations.append("zeta1 = zeta = W1 z1 + b1 + o")
        equations += [f"zeta{layer} = W{layer} z{layer} + b{layer}" for layer in range(2, top + 1)]
        return tuple(equations)

    def __str__(self) -> str:
        lines = {
            "family": self.family,
            "statistic": f"T(x) = {self.sufficient_statistic}",
            "log-partition": f"A(eta) = {self.log_partition}",
            "canonical map": f"eta = {self.canonical_parameter}",
            "activation": self.activation,
            "mask": self.mask,
            "loadings": self.loadings,
        }
        if self.hidden_layer_sizes:
            lines["hidden layers"] = ", ".join(map(str, self.hidden_layer_sizes))
            lines["hidden map"] = f"R_h(zeta) = {self.hidden_activation}"
            lines["hidden mask"] = f"R_h'(zeta) = {self.hidden_mask}"
        written = [f"{name:<22} {value}" for name, value in lines.items()]
        titles = ["equilibrium"] + [""] * (len(self.equilibrium) - 1)
        written += [
            f"{title:<22} {equation}"
            for title, equation in zip(titles, self.equilibrium, strict=True)
        ]
        return "\n".join(written)


def describe(
    family: Family,
    canonical_map: CanonicalMap,
    *,
    loadings: str = "dense",
    hidden_layer_sizes: tuple[int, ...] = (),
    hidden_map: CanonicalMap | None = None,
) -> Architecture:
    """Describe the layer of a family and a canonical map, and the hidden layers above it.

    Examples
    --------
    >>> from skdeq._architecture import describe
    >>> from skdeq.families import Gaussian, ReLU
    >>> describe(Gaussian(), ReLU()).activation
    'max(zeta, 0)'
    """
    of_family = canonical_map.of(family)
    hidden = ("", "")
    if hidden_map is not None and hidden_layer_sizes:
        hidden = hidden_map.formula, hidden_map.derivative_formula
    return Architecture(
        family=repr(family),
        canonical_map=repr(canonical_map),
        sufficient_statistic=family.sufficient_formula,
        log_partition=family.log_partition_formula.format(eta="eta"),
        canonical_parameter=of_family.formula,
        activation=of_family.mean_formula or family.mean_formula.format(eta=of_family.formula),
        mask=of_family.derivative_formula,
        loadings=loadings,
        hidden_layer_sizes=hidden_layer_sizes,
        hidden_activation=hidden[0],
        hidden_mask=hidden[1],
    )


def correspondence_table() -> str:
    """Return families with the identity and the log link, the Gaussian with all maps, as reST."""
    pairs: list[tuple[Family, CanonicalMap]] = [
        (family(), Identity()) for family in FAMILIES.values()
    ]
    gaussian = FAMILIES["gaussian"]()
    pairs += [(gaussian, law()) for name, law in CANONICAL_MAPS.items() if name != "identity"]
    pairs += [
        (law(), LogLink())
        for law in FAMILIES.values()
        if law().log_link() not in (None, Identity())
    ]
    lines = [
        ".. list-table:: From statistics to architecture",
        "   :header-rows: 1",
        "   :widths: 26 24 28 22",
        "",
    ]
    rows = [("Family, canonical map", "Log-partition A(eta)", "Activation", "Mask")]
    for family, canonical_map in pairs:
        layer = describe(family, canonical_map)
        title = family.name if canonical_map == Identity() else f"{family.name}, {canonical_map}"
        rows.append(
            (title, f"``{layer.log_partition}``", f"``{layer.activation}``", f"``{layer.mask}``")
        )
    for row in rows:
        lines += [f"   {'*' if cell is row[0] else ' '} - {cell}" for cell in row]
    return "\n".join(lines) + "\n"
