"""A layer as rows: what its weight is multiplied with, what stands beside the product, and what should come out.

Rows of all batches are drawn evenly, the same in every run, and shuffled, so that any stretch of them is a sample.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
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
class InputRows:
    """What the weight of one layer is multiplied with, as a matrix.

    Attributes:
      product: how weights and results lie.
      x: float32[groups, rows, depth], in the simulation.
    """

    product: RowProduct
    x: Any

    def rounding_error(self, difference: Any) -> Any:
        """Sum over rows of the squares that a change of the weight, `[groups, depth, features]`, adds to the product;
        per group and feature."""
        return jnp.sum(jnp.square(jnp.matmul(self.x, jnp.asarray(difference, self.x.dtype))), axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRows(InputRows):
    """Matrices of one layer, those of its epilogue and of what should come out too; float32.

    Attributes:
      epilogue: from the product's rows to those of the target.
      sides: of the epilogue: [groups, rows or 1, features], or numbers.
      target: [groups, rows, features]; what the float program has behind the epilogue.
    """

    epilogue: Epilogue
    sides: list[Any]
    target: Any

    def error(self, matrix: Any) -> Any:
        """Sum over rows of the squared error with a weight `[groups, depth, features]`; per group and feature."""
        y = self.epilogue(jnp.matmul(self.x, jnp.asarray(matrix, self.x.dtype)), self.sides)
        return jnp.sum(jnp.square(y.astype(jnp.float32) - self.target.astype(jnp.float32)), axis=1)


def inputs_of(layer: Layer, most: int, seed: int) -> InputRows | None:
    """The inputs of a layer; None where its product is no matrix product of rows.

    Args:
      layer: of a walk.
      most: rows that are kept.
      seed: of what is drawn.
    """
    product = RowProduct.of(layer.anchor, _regions.weight_position(layer.eqn))
    if product is None:
        return None
    return InputRows(product, _inputs(layer, product, *_drawn(layer, product, most, seed)))


def rows_of(layer: Layer, most: int, seed: int) -> LayerRows | None:
    """The rows of a layer; arguments and None as for `inputs_of`."""
    product = RowProduct.of(layer.anchor, _regions.weight_position(layer.eqn))
    if product is None:
        return None
    epilogue = Epilogue.of(layer.eqn.params["body"], layer.anchor)
    drawn, order = _drawn(layer, product, most, seed)
    parts: list[tuple[Any, list[Any]]] = []
    for batch, rows in enumerate(drawn):
        sides = layer.values(epilogue.sides, batch, simulated=True)
        (y,) = layer.values([epilogue.result], batch, simulated=False)
        pick = lambda array, rows=rows: array[:, rows] if jnp.ndim(array) and array.shape[1] > 1 else array
        parts.append((pick(product.result_rows(y)), [pick(_side_rows(product, s, y.shape)) for s in sides]))
    whole = lambda arrays: jnp.concatenate(arrays, axis=1)[:, order]
    counts = [len(rows) for rows in drawn]
    joined = [_joined([p[1][k] for p in parts], counts, whole) for k in range(len(epilogue.sides))]
    return LayerRows(product, _inputs(layer, product, drawn, order), epilogue, joined, whole([p[0] for p in parts]))


def _drawn(layer: Layer, product: RowProduct, most: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Per batch, which rows are kept; and the order of all of them."""
    groups, rows, depth = jax.eval_shape(product.rows, layer.anchor.invars[1 - product.position].aval).shape
    rng, count = np.random.default_rng([seed, zlib.crc32(layer.id.encode())]), len(layer.operands)
    room = max(1, _MOST_BYTES // max(1, 4 * groups * depth))
    drawn = [rng.permutation(rows)[: -(-min(most, room) // count)] for _ in range(count)]
    return drawn, rng.permutation(sum(map(len, drawn)))


def _inputs(layer: Layer, product: RowProduct, drawn: list[np.ndarray], order: np.ndarray) -> Any:
    """The rows of the operand that is no weight."""
    key = ("rows", str(layer.anchor), tuple(v.aval.shape for v in layer.anchor.invars), product.position)
    draw = compiled(key, lambda: lambda x, rows: product.rows(x)[:, rows])
    wanted = [layer.anchor.invars[1 - product.position]]
    parts = [draw(*layer.values(wanted, batch, simulated=True), rows) for batch, rows in enumerate(drawn)]
    return jnp.concatenate(parts, axis=1)[:, order]


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
