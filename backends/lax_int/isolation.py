"""A part of a program that XLA compiles by itself, so that what it computes is never computed again in its readers.

XLA:CPU takes integer arithmetic for cheap, and repeats a chain of it in every fusion that reads its end. Residual
streams with norms, each a long chain behind the one before, would be repeated exponentially often in their depth.
An `optimization_barrier` is gone before fusion; a loop that runs once stays, where the compiler cannot know it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def isolated(
    run: Callable[[list[Any]], Sequence[Any]], values: Sequence[Any], varying: Sequence[int], results: Sequence[Any]
) -> list[Any]:
    """`run(values)`, compiled by itself.

    Args:
      run: a function of traced integers to traced integers.
      values: its operands.
      varying: which of them depend on the program's inputs; integers.
      results: shape and dtype of each result.
    """
    moving = [k for k in varying if values[k].size and jnp.issubdtype(values[k].dtype, jnp.integer)]
    if not moving:
        return list(run(list(values)))
    first = values[moving[0]]
    element = lax.reshape(lax.slice(first, (0,) * first.ndim, (1,) * first.ndim), ())
    # Always 1: no number has 64 bits set. Bounds of bit counts are no part of XLA's simplifications.
    more = lax.shift_right_logical(lax.population_count(lax.convert_element_type(element, np.int32)), np.int32(6))
    rounds = lax.add(np.int32(1), more)

    def body(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        # All depends on the round, or it would be moved out of the loop.
        shifted = list(values)
        for k in moving:
            shifted[k] = lax.add(values[k], lax.convert_element_type(state[0], values[k].dtype))
        return lax.add(state[0], np.int32(1)), list(run(shifted))

    start = [lax.full(s.shape, 0, s.dtype) for s in results]
    return lax.while_loop(lambda state: lax.lt(state[0], rounds), body, (jnp.int32(0), start))[1]
