"""Scatters on integers. A scatter holds the jaxpr that combines two elements, which is of one dtype."""

from __future__ import annotations

import math
from typing import Any

from jax import lax

from qcompiler.ir import _compat

_FUNCTIONS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
}


def bind(eqn: _compat.JaxprEqn, operand: Any, indices: Any, updates: Any) -> Any:
    """The scatter of an equation on operands of another dtype."""
    names = ("indices_are_sorted", "unique_indices", "mode")
    chosen = {name: eqn.params[name] for name in names}
    numbers = eqn.params["dimension_numbers"]
    return _FUNCTIONS[eqn.primitive.name](operand, indices, updates, numbers, **chosen)


def most_at_one_place(eqn: _compat.JaxprEqn) -> int:
    """How many updates may land at one element."""
    return 1 if eqn.params["unique_indices"] else math.prod(eqn.invars[1].aval.shape[:-1])
