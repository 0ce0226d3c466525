"""
=====================================================
A stream on disk: one batch at a time, in flat memory
=====================================================

``partial_fit`` updates a model by one batch and forgets it. Here 100,000 rows of counts lie in a
file, and :class:`~skdeq.ExpFamilyDEQ` goes through it once in batches, watched by the likelihood
of rows it never sees. How near does one pass come to a fit of everything, what does it cost in
memory, and what happens when the stream changes half-way?
"""

# %%
# The file
# --------
# The counts have five latents. They are written to a temporary directory as unsigned bytes, batch
# by batch, so that the whole is never in memory, and read back through a memory map.

import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import psutil
from sklearn.base import clone
from sklearn.decomposition import IncrementalPCA
from sklearn.linear_model import LinearRegression

from skdeq import ExpFamilyDEQ, ImplicitEMEncoder

n_rows, n_features, n_latents, batch_size = 100_000, 100, 5, 500
rng = np.random.default_rng(0)
loadings = 0.4 * rng.normal(size=(n_latents, n_features))
intercept = rng.normal(size=n_features)


def draw(n, loadings=loadings):
    """Counts and the latents behind them."""
    latents = rng.normal(size=(n, n_latents))
    return np.minimum(rng.poisson(np.exp(latents @ loadings + intercept)), 255), latents


folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "counts.npy"
shape = (n_rows, n_features)
file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
for start in range(0, n_rows, batch_size):
    file[start : start + batch_size] = draw(batch_size)[0]
file.flush()
stream = np.load(path, mmap_mode="r")
print(
    f"file: {path.stat().st_size / 1e6:.0f} MB of bytes; as float64 {stream.size * 8 / 1e6:.0f} MB"
)
held_out, held_out_latents = draw(1000)

# %%
# One pass
# --------
# A batch becomes floats only when it is read. The first one starts the model by a fit of its own;
# every other is one step of Adam. For comparison there are fits of the first tenth and of all
# rows at once, and for all of them the greatest memory on top of what the process had before. In
# that of the stream are the pages of the file itself, which the operating system may take back at
# any time.


@contextmanager
def measured(record):
    """Record seconds and the peak of the additional memory in MB."""
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = [before]

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        record["seconds"] = time.perf_counter() - start
        done.set()
        watcher.join()
        record["megabytes"] = (peak[0] - before) / 1e6


def batches(stream):
    """Batches of a stream as floats."""
    for start in range(0, len(stream), batch_size):
        yield np.asarray(stream[start : start + batch_size], dtype=np.float32)


def go_through(model, stream, watched):
    """Update by every batch; rows seen and score of the watched rows, now and then."""
    seen, scores = [], []
    for number, batch in enumerate(batches(stream), start=1):
        model.partial_fit(batch)
        if number < 5 or number % 10 == 0:
            seen.append(number * batch_size)
            scores.append(model.score(watched))
    return np.array(seen), np.array(scores)


model = ExpFamilyDEQ(n_latents, family="poisson", random_state=0)
for batch in batches(stream[: 4 * batch_size]):
    clone(model).partial_fit(batch).partial_fit(batch)  # loads what any first call loads

costs = {name: {} for name in ("stream", "all rows", "a tenth")}
streamed = clone(model)
with measured(costs["stream"]):
    seen, scores = go_through(streamed, stream, held_out)
fits = {"all rows": clone(model), "a tenth": clone(model)}
for name, fit in fits.items():
    with measured(costs[name]):
        fit.fit(np.asarray(stream[: n_rows if name == "all rows" else n_rows // 10], np.float32))
final = {"stream": scores[-1], **{name: fit.score(held_out) for name, fit in fits.items()}}


def recovered(features):
    """Share of the variance of the true latents that features explain linearly."""
    halves = np.split(features, 2), np.split(held_out_latents, 2)
    (train, test), (train_latents, test_latents) = halves
    return LinearRegression().fit(train, train_latents).score(test, test_latents)


print("                held-out likelihood  latents found  seconds  more memory, MB")
print(f"first batch     {scores[0]:19.3f}")
for name, cost in costs.items():
    fitted = streamed if name == "stream" else fits[name]
    share = recovered(fitted.transform(held_out))
    print(f"{name:15s} {final[name]:19.3f} {share:14.3f} {cost['seconds']:8.1f}", end=" ")
    print(f"{cost['megabytes']:16.1f}")
pca = IncrementalPCA(n_latents)
for batch in batches(stream):
    pca.partial_fit(np.log1p(batch))
print(f"IncrementalPCA of logs {recovered(pca.transform(np.log1p(held_out))):27.3f}")

# %%
# When the stream changes
# -----------------------
# Now the loadings of a third of the features change, all at once. One model goes on learning, one
# is left as it was, and one is started anew, since the step of ``partial_fit`` becomes shorter
# with every batch seen. All are scored on rows of the new kind.

changed = loadings.copy()
changed[:, : n_features // 3] = 0.4 * rng.normal(size=(n_latents, n_features // 3))
new_rows = draw(n_rows // 4, changed)[0]
new_held_out = draw(1000, changed)[0]
before = streamed.score(new_held_out)
goes_on = go_through(streamed, new_rows, new_held_out)
anew = go_through(clone(model), new_rows, new_held_out)
best = clone(model).fit(new_rows).score(new_held_out)
print("held-out likelihood under the new law")
print(f"  left as it was     {before:9.2f}")
for name, (new_seen, new_scores) in {"goes on learning": goes_on, "started anew": anew}.items():
    picked = [0, 3, 5, -1]
    shown = ", ".join(f"{new_scores[i]:.2f} ({new_seen[i]:,} rows)" for i in picked)
    print(f"  {name:18s} {shown}")
print(f"  fit of all new rows {best:8.2f}")

# %%
# The encoder streams, too
# ------------------------
# :class:`~skdeq.ImplicitEMEncoder` takes the bytes as they are. One pass of ``partial_fit`` is an
# epoch of ``fit``, but for the order of the rows; its objective on unseen rows is to be low.

encoder = ImplicitEMEncoder(32, random_state=0)
memory = {}
encoder.partial_fit(stream[:1000])
with measured(memory):
    for start in range(1000, n_rows, 1000):
        encoder.partial_fit(stream[start : start + 1000])
whole = ImplicitEMEncoder(32, max_iter=1, random_state=0).fit(stream)
unseen = held_out.astype(np.uint8)
print(f"objective on unseen rows: stream {-encoder.score(unseen):.1f}", end=", ")
print(f"one epoch of fit {-whole.score(unseen):.1f}; seconds {memory['seconds']:.1f}", end=", ")
print(f"more memory {memory['megabytes']:.1f} MB")

# %%
# The figure
# ----------

fig, axes = plt.subplots(1, 3, figsize=(10, 4), layout="constrained", width_ratios=[1, 0.8, 1])
fig.suptitle("One pass over a file of counts, 500 rows at a time")
ax = axes[0]
ax.plot(seen, scores, color="#D55E00", marker="o", ms=3, label="stream")
for name, style in (("all rows", "-"), ("a tenth", "--")):
    ax.axhline(final[name], color="#0072B2", ls=style, label=f"fit of {name}")
ax.set_title("Likelihood of unseen rows")
ax.set_ylabel("log-likelihood of a row")

ax = axes[1]
for row, (name, cost) in enumerate(costs.items()):
    color = "#D55E00" if name == "stream" else "#0072B2"
    ax.barh(row, cost["megabytes"], color=color)
    label = f"{cost['megabytes']:.0f} MB, {cost['seconds']:.1f} s"
    ax.annotate(label, (cost["megabytes"], row), (4, 0), textcoords="offset points", va="center")
ax.set_yticks(range(len(costs)), list(costs))
ax.set_xlim(0, 2.2 * max(cost["megabytes"] for cost in costs.values()))
ax.set_title("Additional memory and time")
ax.set_xlabel("MB")

ax = axes[2]
ax.axhline(before, color="#888888", ls=":", label="left as it was")
ax.plot(*goes_on, color="#D55E00", marker="o", ms=3, label="goes on learning")
ax.plot(*anew, color="#000000", marker="s", ms=3, label="started anew")
ax.axhline(best, color="#0072B2", label="fit of all new rows")
ax.set_title("After the stream has changed")
for ax in (axes[0], axes[2]):
    ax.set_xscale("log")
    ax.set_xlabel("rows seen")
    ax.legend(frameon=False, loc="lower right", fontsize=9)
    ax.grid(color="#dddddd", lw=0.6)
plt.show()

del stream, file  # a folder that is mapped cannot be removed everywhere
folder.cleanup()

# %%
# What it amounts to
# ------------------
# * **Memory is flat:** a few MB for a batch and the pages of the file that were read, however
#   long the stream. A fit of all rows needs them as floats, and more.
# * **One pass comes near a fit of everything,** most of the way from the first batch, and the
#   latents found are as good. It does not arrive: the steps are noisy, and there is one pass
#   only.
# * **It is no short cut.** The pass takes longer than the fit of all rows, and a fit of the
#   first tenth is quicker than either *and better than the stream*. If the law is stable and a
#   sample of the rows fits into memory, fit the sample. Streaming is for rows that cannot be kept.
# * **A changed stream is followed slowly.** Nothing detects the change; here a model started anew
#   has overtaken the one that goes on with its first batch. Going on is for gradual drift, or for
#   when there are too few new rows to start from.
