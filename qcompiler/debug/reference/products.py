"""Products of integers, and the bounds that the contract gives their accumulators."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from qcompiler.debug.reference import contractions
from qcompiler.debug.reference.values import Ints, fits, known, whole


def product(eqn: Any, values: list[Any]) -> Any:
    dot = eqn.primitive.name == "dot_general"
    acc = (contractions.dot if dot else contractions.conv)(whole(values[0]), whole(values[1]), eqn.params)
    if known(values[0]) == known(values[1]):
        (a, b), (c, d) = values[0].one_interval(), values[1].one_interval()
        corners = [a * c, a * d, b * c, b * d]
        depth = _depth(eqn)
        low, high = np.int64(min(corners) * depth), np.int64(max(corners) * depth)
        return fits(eqn, Ints(acc, low, high))
    k = 0 if known(values[0]) else 1
    low, high = values[1 - k].one_interval()
    # Every weight meets the end of the interval that is worst for it, channel by channel of the result.
    positive, negative = np.maximum(whole(values[k]), 0), np.minimum(whole(values[k]), 0)
    least = _per_channel(eqn, k, positive * low + negative * high, acc.ndim)
    most = _per_channel(eqn, k, positive * high + negative * low, acc.ndim)
    return fits(eqn, Ints(acc, least, most))


def _depth(eqn: Any) -> int:
    shape = eqn.invars[1].aval.shape
    if eqn.primitive.name == "conv_general_dilated":
        return math.prod(shape) // shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    (_, contract), _ = eqn.params["dimension_numbers"]
    return math.prod(shape[d] for d in contract)


def _per_channel(eqn: Any, k: int, weight: np.ndarray, rank: int) -> np.ndarray:
    """Sums of an array over what the product contracts, in the layout of the result (size one elsewhere)."""
    if eqn.primitive.name == "conv_general_dilated":
        numbers = eqn.params["dimension_numbers"]
        sums = np.moveaxis(weight, numbers.rhs_spec[0], 0).reshape(weight.shape[numbers.rhs_spec[0]], -1).sum(axis=1)
        return sums.reshape([-1 if d == numbers.out_spec[1] else 1 for d in range(rank)])
    contract, batch = (dims[k] for dims in eqn.params["dimension_numbers"])
    free = [d for d in range(weight.ndim) if d not in contract and d not in batch]
    sums = (
        weight.transpose(*batch, *free, *contract).reshape(*(weight.shape[d] for d in (*batch, *free)), -1).sum(axis=-1)
    )
    ones = (1,) * (rank - sums.ndim)
    between, after = (ones, ()) if k == 1 else ((), ones)
    head, tail = sums.shape[: len(batch)], sums.shape[len(batch) :]
    return sums.reshape(*head, *between, *tail, *after)
