"""The same fits on the CPU and on a CUDA device."""

import numpy as np
import torch

from benchmarks import _common as common
from benchmarks._suite import Case, Settings, Trial, Workload
from benchmarks.workloads.scaling import counts
from skdeq import ExpFamilyDEQ, ImplicitEMEncoder

COMMAND = "python -m benchmarks --only cuda --device cuda --output DIR"
# Method: family, components, iterations; the encoder has no family.
FITS = {
    "ExpFamilyDEQ, Poisson, k = 10": ("poisson", 10, 10),
    "ExpFamilyDEQ, Bernoulli, k = 50": ("bernoulli", 50, 20),
    "ImplicitEMEncoder, K = 64": (None, 64, 5),
}


def make(method, device):
    """Return the unfitted model, with a fixed number of iterations."""
    family, k, iterations = FITS[method]
    common_options = {"max_iter": iterations, "tol": 0.0, "device": device, "random_state": 0}
    if family is None:
        return ImplicitEMEncoder(k, **common_options)
    return ExpFamilyDEQ(k, family=family, **common_options)


def prepare(settings: Settings, method: str, device: str) -> Trial:
    """Make a model ready on a device; a small fit there builds its context."""
    X = counts(*((500, 70) if settings.quick else (60_000, 784)))
    if method.startswith("ExpFamilyDEQ, Bernoulli"):
        X = (X > 0).astype(np.float32)
    model = make(method, device)
    make(method, device).fit(X[:400]).transform(X[:400])

    def run():
        on_device = device.startswith("cuda")
        if on_device:
            torch.cuda.reset_peak_memory_stats(device)
        with common.without_convergence_warnings():
            _, fit = common.seconds_of(model.fit, X)
            _, transform = common.seconds_of(model.transform, X)
        values = {"fit": fit, "transform": transform}
        if on_device:
            values["device_memory"] = torch.cuda.max_memory_allocated(device) / 2**20
        return values, None

    return Trial(run, lambda _: {"objective": model.loss_curve_[-1]})


def cases(settings: Settings) -> list[Case]:
    """Return each fit on both."""
    device = settings.device if settings.device.startswith("cuda") else "cuda"
    size = "500 x 70" if settings.quick else "60,000 x 784"
    return [
        Case(f"{size} counts, {method}", where, prepare, (method, where))
        for method in FITS
        for where in ("cpu", device)
    ]


def unavailable(settings: Settings) -> str | None:
    """Say that there is no device."""
    if torch.cuda.is_available():
        return None
    return f"Skipped: no CUDA device was there. With one: `{COMMAND}`."


WORKLOAD = Workload(
    name="cuda",
    title="CUDA against CPU",
    note=(
        "Counts made for the purpose, as float32 in main memory: the way to the device and back "
        "is part of the time. A fixed number of iterations, or epochs; transform of the same "
        "rows. The training objectives show that both did the same."
    ),
    cases=cases,
    minutes=3,
    unavailable=unavailable,
)
