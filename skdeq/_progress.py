"""Lines of progress for long fits."""

import time
from collections.abc import Callable

__all__ = ["reporter"]


def reporter(name: str, unit: str, verbose: int) -> Callable[[int, float], None] | None:
    """Return a function that prints number, objective and seconds, or None unless `verbose`."""
    if not verbose:
        return None
    begin = time.perf_counter()

    def report(number: int, objective: float) -> None:
        seconds = time.perf_counter() - begin
        print(
            f"[{name}] {unit} {number:4d}  objective {objective:.8g}  {seconds:.1f} s", flush=True
        )

    return report
