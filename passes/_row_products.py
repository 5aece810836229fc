"""Products with a weight as plain matrix products of rows: `[groups, rows, depth] @ [groups, depth, features]`.

A dot's rows are the positions along its free dimensions, a conv's are those of its result, each with the window that it
reads. Groups are a dot's batch dimensions, or the feature groups of a conv. Whatever rounds weights then has to know
nothing but matrices.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.ir import _compat, contraction


@dataclasses.dataclass(frozen=True, eq=False)
class RowProduct:
    """How the operands of one product lie as matrices.

    Attributes:
      anchor: `dot_general`, or `conv_general_dilated` without batch groups.
      position: which operand (0 or 1) is the weight.
    """

    anchor: _compat.JaxprEqn
    position: int

    @classmethod
    def of(cls, anchor: _compat.JaxprEqn, position: int) -> RowProduct | None:
        """The product, or None if it has no such form."""
        if anchor.primitive.name == "conv_general_dilated" and (
            position != 1 or anchor.params["batch_group_count"] != 1
        ):
            return None
        return cls(anchor, position)

    @property
    def is_conv(self) -> bool:
        """Whether it is a convolution."""
        return self.anchor.primitive.name == "conv_general_dilated"

    @property
    def depth(self) -> int:
        """How many inputs are behind one result."""
        return self._weight_layout(self.anchor.invars[self.position].aval.shape)[1][1]

    def rows(self, x: Any) -> Any:
        """The operand that is no weight, [groups, rows, depth]."""
        if self.is_conv:
            return self._windows(x)
        batch, free, contract = self._dims(1 - self.position)
        sizes = [math.prod(x.shape[d] for d in dims) for dims in (batch, free, contract)]
        return jnp.transpose(x, (*batch, *free, *contract)).reshape(sizes)

    def matrix(self, weight: Any) -> Any:
        """The weight, or an array of its shape, [groups, depth, features]."""
        order, sizes = self._weight_layout(weight.shape)
        if not self.is_conv:
            return weight.transpose(order).reshape(sizes)
        groups, depth, features = sizes
        return weight.transpose(order).reshape(depth, groups, features).swapaxes(0, 1)

    def weight(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`."""
        shape = self.anchor.invars[self.position].aval.shape
        order, (groups, depth, features) = self._weight_layout(shape)
        moved = matrix.swapaxes(0, 1).reshape(depth, groups * features) if self.is_conv else matrix
        return moved.reshape([shape[d] for d in order]).transpose(np.argsort(order))

    def result_rows(self, y: Any) -> Any:
        """The product's result as [groups, rows, features].

        An array with size one outside of the channels, which have their full size, gives one row.
        """
        if self.is_conv:
            out = self.anchor.params["dimension_numbers"].out_spec
            y = jnp.transpose(y, (out[0], *out[2:], out[1]))
            groups = self.anchor.params["feature_group_count"]
            return jnp.swapaxes(y.reshape(-1, groups, y.shape[-1] // groups), 0, 1)
        dims = contraction.weight_dims(self.anchor, self.position)
        batches = len(self._dims(self.position)[0])
        features = [k for k in sorted(dims) if k >= batches]
        free = [k for k in range(y.ndim) if k >= batches and k not in dims]
        sizes = [math.prod(y.shape[k] for k in part) for part in (range(batches), free, features)]
        return jnp.transpose(y, (*range(batches), *free, *features)).reshape(sizes)

    @property
    def channels(self) -> frozenset[int]:
        """Dimensions of the result that the weight makes: all others become rows."""
        return frozenset(contraction.weight_dims(self.anchor, self.position))

    def _dims(self, operand: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Batch, free and contracted dimensions of a dot's operand."""
        contract, batch = (pair[operand] for pair in self.anchor.params["dimension_numbers"])
        rank = self.anchor.invars[operand].aval.ndim
        return tuple(batch), tuple(d for d in range(rank) if d not in (*contract, *batch)), tuple(contract)

    def _weight_layout(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int, int]]:
        """The order of the weight's dimensions, and the sizes of groups, depth and features."""
        if self.is_conv:
            out, depth, *window = self.anchor.params["dimension_numbers"].rhs_spec
            groups = self.anchor.params["feature_group_count"]
            inputs = math.prod(shape[d] for d in (*window, depth))
            return (*window, depth, out), (groups, inputs, shape[out] // groups)
        batch, free, contract = self._dims(self.position)
        sizes = tuple(math.prod(shape[d] for d in dims) for dims in (batch, contract, free))
        return (*batch, *contract, *free), sizes

    def _windows(self, x: Any) -> Any:
        """What each result of a conv reads, [groups, rows, window and input channels of the group]."""
        params, kernel = self.anchor.params, self.anchor.invars[1].aval.shape
        numbers = params["dimension_numbers"]
        x = jnp.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
        padding = zip(params["padding"], params["lhs_dilation"], strict=True)
        config = [(0, 0, 0), *((low, high, dilation - 1) for (low, high), dilation in padding), (0, 0, 0)]
        x = lax.pad(x, np.zeros((), x.dtype), config)
        out = [self.anchor.outvars[0].aval.shape[d] for d in numbers.out_spec[2:]]
        strides, dilations = params["window_strides"], params["rhs_dilation"]
        taps = []
        for tap in itertools.product(*(range(kernel[d]) for d in numbers.rhs_spec[2:])):
            start = [t * d for t, d in zip(tap, dilations, strict=True)]
            stop = [s + (n - 1) * stride + 1 for s, n, stride in zip(start, out, strides, strict=True)]
            ends = (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)
            taps.append(lax.slice(x, *ends))
        groups = params["feature_group_count"]
        stacked = jnp.stack(taps, axis=-2).reshape(-1, len(taps), groups, x.shape[-1] // groups)
        return jnp.transpose(stacked, (2, 0, 1, 3)).reshape(groups, stacked.shape[0], -1)
