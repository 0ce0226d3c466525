"""What bounds the hot loop of ExpFamilyDEQ, and how near it comes.

The loop is one pass over all rows of the row problem: linear predictors (a matrix product), the
mean function of every entry, the gradient (a second product) and, for Newton's method, the
Hessians (a third). Arithmetic and traffic are counted; the rates of the machine are measured in
the same process, with the same number of threads.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks import _common as common
from benchmarks._figures import roofline
from benchmarks._suite import Case, Settings, Trial, Workload
from skdeq._chunks import map_chunks, parallel_chunks
from skdeq._latent_model import LatentModel
from skdeq._map_problem import MapProblem
from skdeq._observations import Observations
from skdeq._setting import Setting, row_problem
from skdeq.families import get_family

MEANS = {"poisson": torch.exp, "bernoulli": torch.sigmoid}
PASSES = {"value and gradient": "value_and_gradient", "with Hessians": "derivatives"}
CPU = torch.device("cpu")
BYTES = 4  # of a float32
LONG_ENOUGH = 0.2  # seconds


@dataclass(frozen=True)
class Shape:
    """Rows, features and components of a pass, and whether it has Hessians."""

    n: int
    p: int
    k: int
    hessians: bool

    def products(self) -> float:
        """Return the floating point operations of the matrix products."""
        # Predictors from latents and a one for the intercept; the gradient; the upper triangles.
        per_entry = 2 * (self.k + 1) + 2 * self.k
        per_entry += self.k * (self.k + 1) if self.hessians else 0
        return float(self.n * self.p * per_entry)

    def memory_traffic(self) -> float:
        """Return the bytes that have to pass through main memory.

        Not the data: they enter through a product with the loadings that is made once for each
        half of an iteration.
        """
        # Latents and that product in, gradients and objectives out; the loadings in; Hessians out.
        numbers = 3 * self.n * self.k + self.p * (self.k + 1)
        numbers += self.n * self.k**2 if self.hessians else 0
        return float(BYTES * numbers + 8 * self.n)

    def tile_traffic(self) -> float:
        """Return the least bytes between cores and cache: each product reads or writes a tile."""
        per_entry = 4 if self.hessians else 3  # predictors out, mean function in, products in
        return float(BYTES * self.n * self.p * (per_entry + 1))


# --- the pass -----------------------------------------------------------------------------------


def make_problem(family: str, shape: Shape) -> tuple[MapProblem, torch.Tensor]:
    """Return a row problem with the curvature that a fit would give it, and latents."""
    generator = torch.Generator().manual_seed(0)
    latents = 0.3 * torch.randn(shape.n, shape.k, generator=generator)
    loadings = torch.randn(shape.p, shape.k, generator=generator) / shape.k**0.5
    intercept = torch.zeros(shape.p)
    law = get_family(family)
    mean = law.mean(latents @ loadings.T)
    X = torch.poisson(mean, generator) if family == "poisson" else torch.bernoulli(mean)
    setting = Setting(law, Observations(X), alpha=1.0, weight_decay=0.03)
    bound = law.variance_bound
    curvature = None if shape.hessians else torch.full((shape.p,), bound or 1.0)
    model = LatentModel(loadings, intercept)
    problem = row_problem(setting, model, curvature, bound is not None)
    return problem, latents


def one_pass(problem: MapProblem, latents: torch.Tensor, method: str) -> None:
    """Go over all rows as an iteration of a fit does, within its pool of threads."""

    def work(low, high):
        part = problem.chunk(low, high)
        return getattr(part, method)(latents[low:high], torch.arange(high - low))

    map_chunks(work, problem.n_rows, problem.chunk_rows(), CPU)


# --- the machine --------------------------------------------------------------------------------


def best_seconds(task) -> float:
    """Return the shortest of at least three calls, and as many as fit into `LONG_ENOUGH`."""
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < LONG_ENOUGH:
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return min(times)


def gemm_rate(side: int) -> float:
    """Return floating point operations a second of a large square product."""
    left, right, out = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
    return 2 * side**3 / best_seconds(lambda: torch.mm(left, right, out=out))


def bandwidth(megabytes: int) -> float:
    """Return bytes a second of a copy that does not fit into any cache."""
    source = torch.ones(megabytes * 2**20 // BYTES)
    target = torch.empty_like(source)
    return 2 * BYTES * len(source) / best_seconds(lambda: target.copy_(source))


def summed_rate(make_task, amount: float) -> float:
    """Return how much a second all threads do that a fit would use, each on memory of its own."""

    def work(low, high):
        # Allocated once: what a pass loses by asking for memory is not the machine's rate.
        return amount / best_seconds(make_task())

    threads = torch.get_num_threads()
    with parallel_chunks():
        return sum(map_chunks(work, threads, 1, CPU))


def tile_shape(problem: MapProblem) -> tuple[int, int]:
    """Return the rows and columns of the tiles of a pass."""
    rows = min(problem.chunk_rows(), problem.n_rows)
    return rows, problem._design.tile_columns(rows)


def tile_rates(problem: MapProblem, family: str) -> tuple[float, float]:
    """Return (entries a second of the mean function, bytes a second in the cache of a tile)."""
    shape = tile_shape(problem)

    def mean():
        # Not zeros, which would all lie on the one page that the system has for them.
        source, target = torch.ones(shape), torch.ones(shape)
        return lambda: MEANS[family](source, out=target)

    def scaling():
        source = torch.ones(shape)
        return lambda: source.mul_(1.0)

    entries = shape[0] * shape[1]
    return summed_rate(mean, entries), summed_rate(scaling, 2 * BYTES * entries)


def narrow_gemm_rate(problem: MapProblem, shape: Shape) -> float:
    """Return operations a second of the products of a tile and nothing else."""
    rows, columns = tile_shape(problem)
    results = shape.k + (shape.k * (shape.k + 1) // 2 if shape.hessians else 0)

    def products():
        latents, expand = torch.ones(rows, shape.k + 1), torch.ones(shape.k + 1, columns)
        collect, out = torch.ones(results, columns), torch.zeros(rows, columns)
        sums = torch.zeros(results, rows)

        def task():
            torch.mm(latents, expand, out=out)
            torch.mm(collect, out.T, out=sums)

        return task

    return summed_rate(products, Shape(rows, columns, shape.k, shape.hessians).products())


# --- the cases ----------------------------------------------------------------------------------


def prepare(settings: Settings, family: str, n: int, p: int, k: int, kind: str) -> Trial:
    """Make a pass ready and measure what it will be held against."""
    method = PASSES[kind]
    shape = Shape(n, p, k, hessians=method == "derivatives")
    problem, latents = make_problem(family, shape)
    with parallel_chunks():
        one_pass(problem, latents, method)
    # Here, as the arrays that the rates of the machine are measured on are not the pass's.
    with common.PeakMemory() as resident, parallel_chunks():
        one_pass(problem, latents, method)
    peak = common.peak_of_process()

    def run():
        with parallel_chunks():
            seconds = best_seconds(lambda: one_pass(problem, latents, method))
        mean_rate, cache = tile_rates(problem, family)
        square = gemm_rate(256 if settings.quick else 2048)
        narrow = narrow_gemm_rate(problem, shape)
        memory = bandwidth(16 if settings.quick else 256)
        rest = n * p / mean_rate + shape.memory_traffic() / memory
        bound = shape.products() / square + rest
        return {
            "pass": seconds,
            "flops": shape.products() / 1e9,
            "memory_traffic": shape.memory_traffic() / 1e9,
            "tile_traffic": shape.tile_traffic() / 1e9,
            "gemm_rate": square / 1e9,
            "narrow_gemm_rate": narrow / 1e9,
            "mean_rate": mean_rate / 1e9,
            "bandwidth": memory / 1e9,
            "tile_bandwidth": cache / 1e9,
            "bound": bound,
            "share": 100 * bound / seconds,
            "narrow_share": 100 * (shape.products() / narrow + rest) / seconds,
            "extra_memory": resident.extra_mb,
            "peak_memory": peak,
        }, None

    return Trial(run)


def cases(settings: Settings) -> list[Case]:
    """Return both passes for two families and two numbers of components."""
    n, p, ks = (300, 80, (3,)) if settings.quick else (20_000, 1_000, (10, 50))
    return [
        Case(f"{family}, k = {k}", kind, prepare, (family, n, p, k, kind), group="all")
        for family in MEANS
        for k in ks
        for kind in PASSES
    ]


def figure(results):
    """Draw each pass under the ceilings of the machine."""
    points = {
        f"{one.data}, {one.method}": (
            one.median("flops") / one.median("tile_traffic"),
            one.median("flops") / one.median("pass"),
        )
        for one in results
        if not one.failure
    }
    ceilings = {
        name: np.median([one.median(name) for one in results if not one.failure])
        for name in ("gemm_rate", "tile_bandwidth", "bandwidth")
    }
    return roofline(points, ceilings) if points else None


WORKLOAD = Workload(
    name="roofline",
    title="The hot loop under its roofline",
    note=(
        "One pass over 20,000 rows of 1,000 features, dense float32, on the CPU: objective and "
        "gradient of every row, with or without its Hessian, by the chunks and threads of a fit. "
        "Counted are the operations of the matrix products, the bytes that must pass through main "
        "memory (the data are not among them: they enter through one product for each half of an "
        "iteration), and the least bytes between cores and the cache of a tile. Measured in the "
        "same process, the best of several: a square matrix product, the products of the pass in "
        "their own narrow shapes, the mean function and a scaling on tiles, a large copy. The "
        "bound adds the times of the products at the square rate, of one mean function for each "
        "entry, and of the main memory traffic; they use the same units of the same cores, so "
        "that none hides behind another. It leaves out the sums of the objective, for Bernoulli "
        "data with logarithms. The second share takes the products at their own rate."
    ),
    cases=cases,
    minutes=1.5,
    figure=figure,
)
