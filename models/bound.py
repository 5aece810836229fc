"""Parameters of plain functions as an nnx module: what trains and caches nnx modules then does so for them."""

from typing import Any

import jax
from flax import nnx


class Bound(nnx.Module):
    """Holds a tree of parameters; a subclass says what calling it does with them.

    Args:
      params: nested dicts and lists of arrays.
    """

    def __init__(self, params: Any):
        self._variables = nnx.data(jax.tree.map(nnx.Param, params))

    @property
    def params(self) -> Any:
        """The arrays, nested as they were given."""
        return jax.tree.map(
            lambda variable: variable.get_value(), self._variables, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
