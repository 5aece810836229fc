"""Arrays of scales and zero points as `onnx::QuantizeLinear` has them: a scalar, one per channel, or blocks.

Ours have the weight's rank, size one where one number serves all, and each number repeated over its block. ONNX's have
one dimension and `axis`; or, in blocks, the weight's shape but for one dimension, which has a number per block.
"""

from __future__ import annotations

import numpy as np

from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType


def to_onnx(encoding: Encoding, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int | None, int | None]:
    """Scale, zero point, axis and block size of a weight's encoding.

    Scales of several dimensions become blocks of which each spans a dimension that they do not vary along.

    Args:
      encoding: arrays of the weight's rank, or scalars.
      shape: of the weight.
    """
    scale = np.asarray(encoding.scale)
    zero = np.broadcast_to(np.asarray(encoding.zero_point), scale.shape)
    varying = [d for d in range(scale.ndim) if scale.shape[d] > 1]
    if not varying and not encoding.type.axis:
        return scale.reshape(()), zero.reshape(()), None, None
    blocks = dict(zip(encoding.type.axis, encoding.type.block_size, strict=False))
    grouped = [d for d in varying if blocks.get(d, 1) > 1]
    if len(varying) <= 1:
        return scale.reshape(-1), zero.reshape(-1), (varying or encoding.type.axis)[0], None
    rest = [d for d in range(scale.ndim) if d not in varying]
    axis = (grouped or rest or varying)[0]
    size = blocks.get(axis, 1) if axis in varying else shape[axis]
    full = tuple(scale.shape[d] if d == axis else shape[d] for d in range(scale.ndim))
    starts = range(0, scale.shape[axis], size if axis in varying else 1)
    scale, zero = (np.take(np.broadcast_to(a, full), starts, axis=axis) for a in (scale, zero))
    return scale, zero, axis, size


def of_onnx(
    qtype: QuantType, scale: np.ndarray, zero: np.ndarray, axis: int | None, block_size: int | None
) -> Encoding:
    """The encoding behind ONNX's arrays, as `Recipe.encodings` takes it: the weight's shape is not known yet.

    Args:
      qtype: without axis and blocks.
      scale, zero: arrays of one shape.
      axis, block_size: as in a file.

    Raises:
      ValueError: the arrays, the axis and the block size do not fit together.
    """
    scale, zero = scale.astype(np.float32), zero.astype(np.int32)
    if block_size:
        if axis is None or scale.ndim == 0 or not -scale.ndim <= axis < scale.ndim:
            raise ValueError(
                f"blocks of {block_size} need an axis of y_scale, whose shape is {scale.shape}; got {axis}"
            )
        axis %= scale.ndim
        sizes = tuple(block_size if d == axis else 1 for d in range(scale.ndim))
        scale, zero = (np.repeat(a, block_size, axis=axis) for a in (scale, zero))
        qtype = QuantType(qtype.bits, qtype.symmetric, tuple(range(scale.ndim)), qtype.narrow_range, sizes)
        return Encoding(qtype, scale, zero)
    if scale.size == 1 and scale.ndim <= 1:
        return Encoding(qtype, scale.reshape(()), zero.reshape(()))
    if scale.ndim > 1 or axis is None:
        raise ValueError(f"y_scale of shape {scale.shape} needs an axis, and blocks where it has several dimensions")
    if axis < 0:
        # Counted from the last dimension, as broadcasting counts.
        right = (1, scale.size, *(1,) * (-axis - 1))
        return Encoding(qtype, scale.reshape(right), zero.reshape(right))
    return Encoding(QuantType(qtype.bits, qtype.symmetric, (axis,), qtype.narrow_range), scale, zero)
