"""Timing contenders fairly on a noisy machine: in turn, round after round, compared pair by pair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int = 30) -> dict[str, list[float]]:
    """Seconds per call of each contender, taken in turn so that a drift of the machine meets all alike.

    Each is called once before, to compile. Results are waited for.
    """
    for call in contenders.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return times


def speedup(base: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast `other` is: the median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(base, other, strict=True))
