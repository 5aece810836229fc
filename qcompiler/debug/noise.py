"""How far rounding of floats may move a region: what its integers may differ from it by, and one step more.

Monte Carlo arithmetic (Parker 1997, "Monte Carlo arithmetic: exploiting randomness in floating-point arithmetic"):
each result of the body is moved by half a unit in its last place, up or down by chance, that of a function that XLA
approximates by several. A difference of nearly equal values shows what it has lost that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference.wide import wide
from qcompiler.ir import _compat, classes, replay

#: Half a unit in the last place of float32, relative to the smallest mantissa; and what functions are off by.
_HALF_UNIT = 2.0**-24
_OF_FUNCTIONS = 2.0**-21
#: What the operations of `numerics.soft_float` and the functions of `numerics.soft_functions` are off by.
_OF_SOFT_FLOATS = 2.0**-28
_OF_SOFT_FUNCTIONS = 2.0**-24
_FUNCTIONS = classes.ELEMENTWISE - classes.AFFINE - classes.CLAMP - classes.IDENTITY - {"select_n", "abs", "sign"}
_RUNS = 16


def simulation_noise(eqn: _compat.JaxprEqn, operands: Sequence[Any], seed: int = 0) -> list[np.ndarray]:
    """Steps by which float32 moves each result of a region's body at most, element by element, in a few runs.

    Args:
      eqn: a fused region.
      operands: its operands, as the program has them.
      seed: of the directions in which results are moved.
    """
    generator = np.random.default_rng(seed)

    def rule(inner: _compat.JaxprEqn, values: list[Any]) -> list[Any]:
        results = _compat.bind(inner, values)
        size = _OF_FUNCTIONS if inner.primitive.name in _FUNCTIONS else _HALF_UNIT
        pairs = zip(inner.outvars, results, strict=True)
        return [_moved(r, size, generator) if classes.is_float(v) else r for v, r in pairs]

    return _spread(lambda: replay.evaluate(eqn.params["body"], list(operands), rule, keep_source=False))


def soft_noise(eqn: _compat.JaxprEqn, operands: Sequence[Any], seed: int = 0) -> list[np.ndarray]:
    """The same for the integer backend's software floating point, of a wide region in float64."""
    generator = np.random.default_rng(seed)

    def disturb(inner: _compat.JaxprEqn, result: np.ndarray) -> np.ndarray:
        size = _OF_SOFT_FUNCTIONS if inner.primitive.name in _FUNCTIONS else _OF_SOFT_FLOATS
        return _moved(result, size, generator)

    return _spread(lambda: wide(_compat.open_jaxpr(eqn.params["body"]), operands, disturb))


def _spread(run: Callable[[], Sequence[Any]]) -> list[np.ndarray]:
    """How far each element of each result differs between a few runs."""
    runs = [run() for _ in range(_RUNS)]
    columns = [np.stack([np.asarray(r).astype(np.int64) for r in column]) for column in zip(*runs, strict=True)]
    # A few runs see about half of what is possible.
    return [2 * (column.max(axis=0) - column.min(axis=0)) for column in columns]


def _moved(x: Any, size: float, generator: np.random.Generator) -> np.ndarray:
    x = np.asarray(x)
    direction = generator.choice(np.array([-size, size]), x.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return (x.astype(np.float64) * (1 + direction)).astype(x.dtype)
