"""Weights by name: one name, one array."""

import jax
import numpy as np
import pytest
from draws import normal
from jax import lax

from qcompiler.ir import _compat
from qcompiler.ir.program import rewrite
from qcompiler.ir.tracing import trace

WEIGHT = normal(4, 4)


def _doubled(name, array):
    """A program that adds a weight to its product, under a name that is free or not."""
    program = trace(lambda p, x: x @ p["w"], {"w": WEIGHT}, (jax.ShapeDtypeStruct((4, 4), np.float32),))

    def rule(builder, eqn, values):
        (y,) = _compat.bind(eqn, values)
        return [lax.add_p.bind(y, builder.weight(name, array))]

    return rewrite(program, rule, stage="test")


@pytest.mark.parametrize(
    "value",
    [WEIGHT + np.float32(1), WEIGHT[:1], WEIGHT.astype(np.float64)],
    ids=["numbers", "shape", "dtype"],
)
def test_a_name_that_is_taken_by_another_array_is_refused(value):
    with pytest.raises(AssertionError, match="two weights are named w"):
        _doubled("w", value)


def test_a_name_stands_for_the_same_array_again():
    gaps = np.where(np.eye(4, dtype=bool), np.float32(np.nan), WEIGHT)
    assert list(_doubled("w", WEIGHT.copy()).weights) == ["w"]
    # A rewrite is traced again with what it added; NaN is a number like any other there.
    assert list(_doubled("gaps", gaps).weights) == ["w", "gaps"]
