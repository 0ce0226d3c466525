"""Counts that stay on disk: one pass of partial_fit, in memory that does not grow with them."""

from functools import partial

import numpy as np
from sklearn.decomposition import IncrementalPCA
from sklearn.linear_model import LinearRegression

from benchmarks import _common as common
from benchmarks._figures import trade_off
from benchmarks._suite import Case, Result, Settings, Target, Trial, Workload
from skdeq import ExpFamilyDEQ

N_FEATURES, RANK = 200, 5
BATCH = 1_000
N_TEST = 2_000
SUBSAMPLE = 20_000
STREAM, FULL = "ExpFamilyDEQ, partial_fit", "ExpFamilyDEQ, fit to {:,} rows in memory"
MOST_MEMORY = 100.0  # MB above imports
CLOSE = 0.005  # relative distance of the held-out log-likelihoods


def n_rows(settings):
    """Return how many rows there are on disk."""
    if settings.quick:
        return 3_000
    return 5_000_000 if settings.large else 200_000


def subsample_rows(settings):
    """Return how many of them the full-batch fit sees."""
    return 1_000 if settings.quick else SUBSAMPLE


def draw(generator, loadings, n):
    """Return (counts as uint8, the latents that made them)."""
    latents = generator.normal(size=(n, RANK))
    counts = generator.poisson(np.exp(latents @ loadings))
    return np.minimum(counts, 255).astype(np.uint8), latents


def loadings():
    """Return the loadings that made the counts."""
    return np.random.default_rng(0).normal(scale=0.35, size=(RANK, N_FEATURES))


def write_counts(settings: Settings) -> None:
    """Write the counts to disk, a block at a time."""
    generator, W = np.random.default_rng(1), loadings()
    with open(settings.scratch / "counts.uint8", "wb") as file:
        for start in range(0, n_rows(settings), 50_000):
            block = min(50_000, n_rows(settings) - start)
            file.write(draw(generator, W, block)[0].tobytes())


def rows_on_disk(settings, start, stop):
    """Return rows as float32, through a map of their own.

    The pages of a map that stays open are counted as resident memory of the process, though the
    system takes them back whenever it needs them; those of one that is closed are not.
    """
    file, shape = settings.scratch / "counts.uint8", (n_rows(settings), N_FEATURES)
    return np.asarray(np.memmap(file, np.uint8, "r", shape=shape)[start:stop], np.float32)


def stream(model, settings):
    """Pass over the file once."""
    for start in range(0, n_rows(settings), BATCH):
        model.partial_fit(rows_on_disk(settings, start, min(start + BATCH, n_rows(settings))))
    return model


def fit_in_memory(model, settings):
    """Fit to the first rows of the file."""
    return model.fit(rows_on_disk(settings, 0, subsample_rows(settings)))


def methods(settings):
    """Return {method: (unfitted model, function that fits it)}."""
    deq = partial(ExpFamilyDEQ, RANK, family="poisson", device=settings.device, random_state=0)
    return {
        STREAM: (deq(), stream),
        FULL.format(subsample_rows(settings)): (deq(), fit_in_memory),
        "IncrementalPCA, partial_fit": (IncrementalPCA(RANK), stream),
    }


def prepare(settings: Settings, method: str) -> Trial:
    """Make a method ready."""
    generator = np.random.default_rng(2)
    X_test, latents = draw(generator, loadings(), N_TEST)
    X_test = X_test.astype(np.float32)
    few, _ = methods(settings)[method]
    few.partial_fit(X_test[:100]).partial_fit(X_test[100:200]).transform(X_test[:100])

    def run():
        # Anew in each repetition: partial_fit goes on with what there is.
        model, fit = methods(settings)[method]
        _, seconds = common.seconds_of(fit, model, settings)
        size = n_rows(settings) if fit is stream else subsample_rows(settings)
        return {"fit": seconds, "data_memory": size * N_FEATURES / 2**20}, model

    def judge(model):
        codes = model.transform(X_test)
        values = {"latent_r2": LinearRegression().fit(codes, latents).score(codes, latents)}
        if isinstance(model, ExpFamilyDEQ):
            values["held_out_log_likelihood"] = model.score(X_test)
        return values

    return Trial(run, judge)


def cases(settings: Settings) -> list[Case]:
    """Return the streams and the fit in memory."""
    data = f"{n_rows(settings):,} x {N_FEATURES} counts on disk"
    return [Case(data, method, prepare, (method,)) for method in methods(settings)]


def targets(results: list[Result]) -> list[Target]:
    """Judge the memory of the stream, and its likelihood against the fit in memory."""
    streamed, full = results[0], results[1]
    if streamed.failure or full.failure:
        return []
    memory = streamed.median("extra_memory")
    ours, theirs = (one.median("held_out_log_likelihood") for one in (streamed, full))
    gap = (theirs - ours) / abs(theirs)
    return [
        Target(
            f"{STREAM}: peak memory above imports, {streamed.data}",
            f"at most {MOST_MEMORY:g} MB",
            f"{memory:.0f} MB",
            memory <= MOST_MEMORY,
        ),
        Target(
            f"{STREAM}: held-out log-likelihood against that of the fit in memory",
            f"at most {100 * CLOSE:g} % worse",
            f"{100 * gap:.2f} % worse" if gap > 0 else f"{-100 * gap:.2f} % better",
            gap <= CLOSE,
        ),
    ]


WORKLOAD = Workload(
    name="out_of_core",
    title="Counts that stay on disk",
    note=(
        f"Poisson counts of rank {RANK} as uint8 in one file, 200,000 rows, or 5,000,000 with "
        f"--large; one pass in batches of {BATCH:,} through np.memmap. Held out are {N_TEST:,} "
        "further rows; R2 is that of a linear regression of the true latents on the scores."
    ),
    cases=cases,
    minutes=1,
    setup=write_counts,
    targets=targets,
    figure=partial(trade_off, quality="latent_r2"),
)
