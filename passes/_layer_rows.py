"""A layer as rows: what its weight is multiplied with, what stands beside the product, and what should come out.

Rows of all batches are drawn evenly, the same in every run, and shuffled, so that any stretch of them is a sample.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from qcompiler.passes import _regions
from qcompiler.passes._compiled import compiled
from qcompiler.passes._epilogues import Epilogue
from qcompiler.passes._layerwise import Layer
from qcompiler.passes._row_products import RowProduct

#: Bytes of one layer's rows, at most: with many inputs per result, fewer rows are kept.
_MOST_BYTES = 1 << 27


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRows:
    """Matrices of one layer; float32.

    Attributes:
      product: how weights and results lie.
      epilogue: from the product's rows to those of the target.
      x: [groups, rows, depth]; what the simulation multiplies the weight with.
      sides: of the epilogue: [groups, rows or 1, features], or numbers.
      target: [groups, rows, features]; what the float program has behind the epilogue.
    """

    product: RowProduct
    epilogue: Epilogue
    x: Any
    sides: list[Any]
    target: Any

    def error(self, matrix: Any) -> Any:
        """Sum over rows of the squared error with a weight `[groups, depth, features]`; per group and feature."""
        y = self.epilogue(jnp.matmul(self.x, jnp.asarray(matrix, self.x.dtype)), self.sides)
        return jnp.sum(jnp.square(y.astype(jnp.float32) - self.target.astype(jnp.float32)), axis=1)

    def rounding_error(self, difference: Any) -> Any:
        """Sum over rows of the square of what a change of the weight adds to its product; likewise."""
        return jnp.sum(jnp.square(jnp.matmul(self.x, jnp.asarray(difference, self.x.dtype))), axis=1)


def rows_of(layer: Layer, most: int, seed: int) -> LayerRows | None:
    """The rows of a layer; None where its product is no matrix product of rows.

    Args:
      layer: of a walk.
      most: rows that are kept.
      seed: of what is drawn.
    """
    anchor = layer.anchor
    position = _regions.weight_position(layer.eqn)
    product = RowProduct.of(anchor, position)
    if product is None:
        return None
    epilogue = Epilogue.of(layer.eqn.params["body"], anchor)
    wanted = [anchor.invars[1 - position], *epilogue.sides]
    rng = np.random.default_rng([seed, zlib.crc32(layer.id.encode())])
    count = len(layer.operands)
    key = ("rows", str(anchor), tuple(v.aval.shape for v in anchor.invars), position)
    draw = compiled(key, lambda: lambda x, drawn: product.rows(x)[:, drawn])
    parts: list[tuple[Any, Any, list[Any]]] = []
    for batch in range(count):
        x, *sides = layer.values(wanted, batch, simulated=True)
        (y,) = layer.values([epilogue.result], batch, simulated=False)
        target = product.result_rows(y)
        room = max(1, _MOST_BYTES // max(1, 4 * target.shape[0] * product.depth))
        share = -(-min(most, room) // count)
        drawn = rng.permutation(target.shape[1])[:share]
        pick = lambda array, drawn=drawn: array[:, drawn] if jnp.ndim(array) and array.shape[1] > 1 else array
        parts.append((draw(x, drawn), pick(target), [pick(_side_rows(product, s, y.shape)) for s in sides]))
    order = rng.permutation(sum(p[0].shape[1] for p in parts))
    whole = lambda arrays: jnp.concatenate(arrays, axis=1)[:, order]
    counts = [p[0].shape[1] for p in parts]
    joined = [_joined([p[2][k] for p in parts], counts, whole) for k in range(len(epilogue.sides))]
    return LayerRows(product, epilogue, whole([p[0] for p in parts]), joined, whole([p[1] for p in parts]))


def _side_rows(product: RowProduct, side: Any, shape: tuple[int, ...]) -> Any:
    """A side as rows; one row where it is the same for all."""
    if not jnp.ndim(side):
        return side
    varies = any(n > 1 and k not in product.channels for k, n in enumerate(side.shape))
    full = shape if varies else tuple(n if k in product.channels else 1 for k, n in enumerate(shape))
    return product.result_rows(jnp.broadcast_to(side, full))


def _joined(parts: list[Any], counts: list[int], whole: Any) -> Any:
    """A side over all batches: one row where it is the same for all."""
    if not jnp.ndim(parts[0]):
        return parts[0]
    if parts[0].shape[1] == 1 and all(np.array_equal(parts[0], p) for p in parts[1:]):
        return parts[0]
    pairs = zip(parts, counts, strict=True)
    return whole([jnp.broadcast_to(p, (p.shape[0], n, p.shape[2])) for p, n in pairs])
