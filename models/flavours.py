"""Carries weights from an nnx model to its linen twin."""

from typing import Any

import jax
from flax import nnx, traverse_util


def linen_variables(model: nnx.Module) -> dict[str, Any]:
    """The weights of an nnx model of this package as the `variables` of its linen twin.

    Args:
      model: for example a `ResNet` or an `MLP`.

    Returns:
      `{"params": ..., "batch_stats": ...}`, nested dicts of arrays (the same arrays, not copies); `batch_stats` is
      there only if the model has any. List indices join the name before them (`blocks/0` becomes `blocks_0`), as
      linen names submodules kept in a list.
    """
    collections = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    variables = {}
    for name, kind in collections.items():
        flat: dict[tuple[str, ...], jax.Array] = {}
        for path, variable in nnx.to_flat_state(nnx.state(model, kind)):
            names: list[str] = []
            for part in path:
                if isinstance(part, int):
                    names[-1] += f"_{part}"
                else:
                    names.append(str(part))
            flat[tuple(names)] = variable.get_value()
        if flat:
            variables[name] = traverse_util.unflatten_dict(flat)
    return variables
