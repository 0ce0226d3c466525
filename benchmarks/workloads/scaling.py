"""How time and memory grow with rows, features and components."""

import numpy as np
from sklearn.decomposition import PCA

from benchmarks import _common as common
from benchmarks._figures import curves
from benchmarks._suite import Case, Result, Settings, Target, Trial, Workload
from skdeq import ExpFamilyDEQ, ImplicitEMEncoder

# What an axis varies, and what stands still: rows, features and components.
AXES = {
    "n": {"n": (10_000, 30_000, 100_000, 300_000, 1_000_000), "p": 50, "k": 5},
    "p": {"n": 5_000, "p": (50, 150, 500, 1_500, 5_000), "k": 5},
    "k": {"n": 10_000, "p": 200, "k": (2, 4, 8, 16, 32, 64)},
}
QUICK_AXES = {
    "n": {"n": (200, 600), "p": 20, "k": 2},
    "p": {"n": 200, "p": (20, 60), "k": 2},
    "k": {"n": 200, "p": 30, "k": (2, 4)},
}
ITERATIONS, EPOCHS = 5, 2
LINEAR = (0.9, 1.1)  # slope in n
FLAT = 0.25  # most that extra memory for each byte of data may differ from 1e5 rows upwards


def models(k, device):
    """Return {method: unfitted model}, each with a fixed number of iterations."""
    return {
        "PCA": PCA(k, svd_solver="covariance_eigh"),
        f"ExpFamilyDEQ, Poisson, {ITERATIONS} iterations": ExpFamilyDEQ(
            k, family="poisson", max_iter=ITERATIONS, tol=0.0, device=device, random_state=0
        ),
        f"ImplicitEMEncoder, {EPOCHS} epochs": ImplicitEMEncoder(
            k, max_iter=EPOCHS, tol=0.0, device=device, random_state=0
        ),
    }


def counts(n, p, rank=5):
    """Draw Poisson counts of low rank as float32, a block of rows at a time."""
    generator = np.random.default_rng(0)
    loadings = generator.normal(scale=0.4, size=(rank, p))
    X = np.empty((n, p), dtype=np.float32)
    for start in range(0, n, 10_000):
        latents = generator.normal(size=(len(X[start : start + 10_000]), rank))
        X[start : start + 10_000] = generator.poisson(np.exp(latents @ loadings))
    return X


def prepare(settings: Settings, method: str, n: int, p: int, k: int) -> Trial:
    """Make a method ready for one size."""
    X = counts(n, p)
    model = models(k, settings.device)[method]
    models(2, settings.device)[method].fit(X[:200]).transform(X[:200])

    def run():
        with common.without_convergence_warnings():
            _, fit = common.seconds_of(model.fit, X)
            _, transform = common.seconds_of(model.transform, X)
        return {"fit": fit, "transform": transform, "data_memory": X.nbytes / 2**20}, None

    return Trial(run)


def label(axis, size):
    return f"{axis} = {size:,}"


def cases(settings: Settings) -> list[Case]:
    """Return every method at every size; the sizes of an axis take turns."""
    made = []
    for axis, sizes in (QUICK_AXES if settings.quick else AXES).items():
        for size in sizes[axis]:
            shape = tuple({**sizes, axis: size}[name] for name in ("n", "p", "k"))
            made += [
                Case(label(axis, size), method, prepare, (method, *shape), group=axis)
                for method in models(1, settings.device)
            ]
    return made


# --- what the sizes say together ----------------------------------------------------------------


def by_axis(results: list[Result], quantity: str):
    """Return {(axis, method): (sizes, medians)}."""
    found = {}
    for result in results:
        axis, size = result.data.split(" = ")
        value = result.median(quantity)
        if np.isfinite(value):
            sizes, values = found.setdefault((axis, result.method), ([], []))
            sizes.append(int(size.replace(",", "")))
            values.append(value)
    return {key: (np.array(sizes), np.array(values)) for key, (sizes, values) in found.items()}


def slope(sizes, values):
    """Return the slope of a line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def targets(results: list[Result]) -> list[Target]:
    """Judge that time is linear in rows, and memory beyond the data as flat as the data."""
    made = []
    ours = {result.method for result in results if result.method != "PCA"}
    for quantity in ("fit", "transform"):
        for (axis, method), (sizes, seconds) in by_axis(results, quantity).items():
            if axis != "n" or method not in ours or len(sizes) < 2:
                continue
            found = slope(sizes, seconds)
            made.append(
                Target(
                    f"{method}: slope of {quantity} in n, {sizes[0]:,} to {sizes[-1]:,} rows",
                    f"{LINEAR[0]} to {LINEAR[1]}",
                    f"{found:.2f}",
                    bool(LINEAR[0] <= found <= LINEAR[1]),
                )
            )
    extra, data = by_axis(results, "extra_memory"), by_axis(results, "data_memory")
    for (axis, method), (sizes, megabytes) in extra.items():
        large = sizes >= 100_000
        if axis != "n" or method not in ours or large.sum() < 2:
            continue
        share = megabytes[large] / data[axis, method][1][large]
        made.append(
            Target(
                f"{method}: memory beyond the data, in units of the data, from 100,000 rows on",
                f"the last at most {FLAT} more than the first",
                " to ".join(f"{one:.2f}" for one in share[[0, -1]]),
                bool(share[-1] <= share[0] + FLAT),
            )
        )
    return made


def figure(results: list[Result]):
    """Draw the curves, with their slopes in the legend."""
    panels = {}
    for quantity in ("fit", "transform"):
        for (axis, method), (sizes, seconds) in by_axis(results, quantity).items():
            name = f"{method} ({slope(sizes, seconds):.2f})" if len(sizes) > 1 else method
            panels.setdefault((quantity, axis), {})[name] = (sizes, seconds)
    return curves(panels)


WORKLOAD = Workload(
    name="scaling",
    title="Scaling",
    note=(
        f"Poisson counts of rank 5 as float32, made for the purpose; {ITERATIONS} iterations or "
        f"{EPOCHS} epochs whatever the size, transform of the same rows. Rows are varied at 50 "
        "features and 5 components, features at 5,000 rows and 5 components, components at 10,000 "
        "rows and 200 features. In the figure the slope of the line through the logarithms is "
        "given in brackets. In k it is no power law: up to 16 components, or where it is cheap, "
        "ExpFamilyDEQ takes steps with a Hessian for each row, and beyond that one for all."
    ),
    cases=cases,
    minutes=4,
    targets=targets,
    figure=figure,
)
