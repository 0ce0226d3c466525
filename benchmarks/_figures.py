"""Figures of the report."""

import itertools

import numpy as np

from benchmarks._suite import QUANTITIES, Result

MARKERS = "os^DvP*XhdpH<>"


def new_figure(n_rows, n_columns, width=4.2, height=3.6):
    """Return (figure, array of axes)."""
    # The tables need no plotting library.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def legend_below(figure, panels, columns=2):
    """Put one legend of all panels under them."""
    entries = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize="small",
    )


def trade_off(results: list[Result], quality: str):
    """Plot a quality over the seconds to fit, a panel for each data set."""
    kept = [one for one in results if np.isfinite([one.median("fit"), one.median(quality)]).all()]
    if not kept:
        return None
    data_sets = list(dict.fromkeys(one.data for one in kept))
    styles = dict(
        zip(
            dict.fromkeys(one.method for one in kept),
            itertools.product(range(10), MARKERS),
            strict=False,
        )
    )
    figure, panels = new_figure(1, len(data_sets))
    for panel, data in zip(panels[0], data_sets, strict=True):
        for one in kept:
            if one.data != data:
                continue
            seconds, position = one.values["fit"], list(styles).index(one.method)
            middle = one.median("fit")
            panel.errorbar(
                middle,
                one.median(quality),
                xerr=[[middle - min(seconds)], [max(seconds) - middle]],
                color=f"C{position % 10}",
                marker=MARKERS[position % len(MARKERS)],
                linestyle="none",
                label=one.method,
            )
        panel.set(xscale="log", xlabel="seconds to fit", title=data)
        panel.title.set_fontsize("medium")
    quantity = QUANTITIES[quality]
    unit = f", {quantity.unit}" if quantity.unit else ""
    panels[0][0].set_ylabel(quantity.label + unit)
    legend_below(figure, panels[0])
    return figure


def curves(panels: dict):
    """Plot {(quantity, axis): {label: (sizes, values)}} in logarithmic scales."""
    if not panels:
        return None
    quantities = list(dict.fromkeys(quantity for quantity, _ in panels))
    axes = list(dict.fromkeys(axis for _, axis in panels))
    figure, grid = new_figure(len(quantities), len(axes), width=4.6, height=3.8)
    for (quantity, axis), lines in panels.items():
        panel = grid[quantities.index(quantity)][axes.index(axis)]
        for label, (sizes, values) in lines.items():
            panel.plot(sizes, values, marker="o", markersize=4, label=label)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=f"seconds of {quantity}")
        panel.legend(frameon=False, fontsize="x-small")
    return figure


def roofline(points: dict, ceilings: dict):
    """Plot {label: (operations for each byte of cache traffic, GFLOP/s)} under the ceilings."""
    figure, panels = new_figure(1, 1, width=6.4, height=5.2)
    panel = panels[0][0]
    reach = [intensity for intensity, _ in points.values()]
    x = np.geomspace(min(reach) / 4, max(reach) * 4, 50)
    roof = np.full_like(x, ceilings["gemm_rate"])
    panel.plot(x, roof, color="black", label=QUANTITIES["gemm_rate"].label)
    for name, style in (("tile_bandwidth", "--"), ("bandwidth", ":")):
        slope = np.minimum(ceilings[name] * x, roof)
        panel.plot(x, slope, style, color="black", label=QUANTITIES[name].label)
    for position, (label, (intensity, rate)) in enumerate(points.items()):
        marker = MARKERS[position % len(MARKERS)]
        panel.plot(intensity, rate, marker, color=f"C{position % 10}", label=label)
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="operations for each byte between cores and cache",
        ylabel="GFLOP/s of the matrix products",
    )
    legend_below(figure, [panel])
    return figure
