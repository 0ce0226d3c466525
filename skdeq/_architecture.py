"""The dictionary between statistics and architecture: what layer a model is."""

from dataclasses import dataclass

from skdeq.families import CANONICAL_MAPS, FAMILIES, CanonicalMap, Family, Identity

__all__ = ["Architecture", "correspondence_table", "describe"]


@dataclass(frozen=True)
class Architecture:
    """The equilibrium layer that a family and a canonical map amount to, as text.

    ``z = f(z) = W^T [m * mask * (T(x) - activation)] / alpha`` with ``zeta = W z + b + o``, and
    m = 0 where an entry is missing.

    Attributes
    ----------
    family, canonical_map : str
    log_partition : str
        A as a function of eta.
    canonical_parameter : str
        eta as a function of zeta.
    activation : str
        A'(eta), the mean of T(x), as a function of zeta.
    mask : str
        R'(zeta), which multiplies data and activation.
    """

    family: str
    canonical_map: str
    log_partition: str
    canonical_parameter: str
    activation: str
    mask: str

    def __str__(self) -> str:
        lines = [
            f"family                 {self.family}",
            f"log-partition          A(eta) = {self.log_partition}",
            f"canonical map          eta = {self.canonical_parameter}",
            f"activation             {self.activation}",
            f"mask                   {self.mask}",
            "equilibrium            z = W^T [m * mask * (T(x) - activation)] / alpha",
            "linear predictor       zeta = W z + b + o",
        ]
        return "\n".join(lines)


def describe(family: Family, canonical_map: CanonicalMap) -> Architecture:
    """Describe the layer of a family and a canonical map.

    Examples
    --------
    >>> from skdeq._architecture import describe
    >>> from skdeq.families import Gaussian, ReLU
    >>> describe(Gaussian(), ReLU()).activation
    'max(zeta, 0)'
    """
    return Architecture(
        family=repr(family),
        canonical_map=repr(canonical_map),
        log_partition=family.log_partition_formula.format(eta="eta"),
        canonical_parameter=canonical_map.formula,
        activation=family.mean_formula.format(eta=canonical_map.formula),
        mask=canonical_map.derivative_formula,
    )


def correspondence_table() -> str:
    """Return every family with the identity, and the Gaussian with every other map, as reST."""
    pairs: list[tuple[Family, CanonicalMap]] = [
        (family(), Identity()) for family in FAMILIES.values()
    ]
    gaussian = FAMILIES["gaussian"]()
    pairs += [(gaussian, law()) for name, law in CANONICAL_MAPS.items() if name != "identity"]
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
