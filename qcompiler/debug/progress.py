"""A progress bar on a terminal; silent everywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields `tick(done)`, which redraws `label` with the count, the rate, and the share where `total` is known."""
    stream = sys.stderr
    shown = stream.isatty()
    start = time.perf_counter()

    def tick(done: int) -> None:
        if not shown:
            return
        rate = done / max(1e-9, time.perf_counter() - start)
        count = f"{done}/{total}" if total else f"{done}"
        stream.write(f"\r{label}: {count} [{rate:.1f}/s]")
        stream.flush()

    try:
        yield tick
    finally:
        if shown:
            stream.write("\n")
