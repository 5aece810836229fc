"""The type of a weight whose scales a granularity spreads over output channels and groups of input channels.

int4s, one scale per channel, groups of 32    ->      int4s[~0/32,1] of a weight [in, out]
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qcompiler.ir import _compat, contraction
from qcompiler.numerics.types import QuantType

#: Up to so many bits, steps of int8 can be multiples of each other by 4 and more; beyond, groups gain nothing.
MOST_GROUPED_BITS = 6


def weight_type(weight: QuantType, granularity: Any, anchor: _compat.JaxprEqn, position: int) -> QuantType:
    """The type with `axis`, `block_size` and `contracted` of a granularity.

    Args:
      weight: bits and symmetry.
      granularity: a `qcompiler.Granularity`.
      anchor: the product that reads the weight.
      position: of the weight among its operands, 0 or 1.
    """
    found = _per_channel(weight, anchor, position, granularity.channel_group)
    if granularity.input_group is None or weight.bits > MOST_GROUPED_BITS:
        return found
    return _in_groups(found, anchor, position, granularity.input_group)


def _per_channel(weight: QuantType, anchor: _compat.JaxprEqn, position: int, group: int | None) -> QuantType:
    """The type with the dimensions that have scales of their own, `group` consecutive channels sharing one."""
    axis = contraction.channel_dims(anchor, position)
    if group is None or not axis:
        return weight
    if group == 1:
        return dataclasses.replace(weight, axis=axis)
    dims = contraction.weight_dims(anchor, position)
    grouped = dims[max(dims)]
    return dataclasses.replace(weight, axis=axis, block_size=tuple(group if a == grouped else 1 for a in axis))


def _in_groups(weight: QuantType, anchor: _compat.JaxprEqn, position: int, size: int) -> QuantType:
    """The type with groups of at most `size` elements along what is contracted, or as it is where one group is all.

    A group runs along the input channels; where there are fewer, it goes on over neighbouring elements of the other
    contracted dimensions, whole windows of them.
    """
    shape, blocks = anchor.invars[position].aval.shape, weight.blocks
    contracted = contraction.contracted_dims(anchor, position)
    room = size
    for d in contracted:
        blocks[d] = max(1, min(room, shape[d]))
        room //= blocks[d]
    if all(blocks[d] >= shape[d] for d in contracted):
        return weight
    axis = tuple(sorted(blocks))
    sizes = tuple(blocks[d] for d in axis)
    return dataclasses.replace(weight, axis=axis, block_size=sizes, contracted=tuple(sorted(contracted)))
