"""Terms of one scale, or of opposite ones, are added as integers: what cancels, cancels exactly."""

import numpy as np
import pytest

from qcompiler.backends.lax_int import rounding
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import Int, Real, Term

CODES = np.array([-32768, -1, 0, 1, 7, 32767], np.int32)


def _term(scale, codes=CODES, reach=32768):
    return Term(Int(codes, np.int64(-reach), np.int64(reach)), np.asarray(scale, np.float64))


@pytest.mark.parametrize("scale", [0.1, 3e-7, np.full(6, 0.3)])
def test_opposite_scales_cancel(scale):
    (term,) = rounding.merged([_term(scale), _term(-np.asarray(scale))])
    assert not np.any(np.asarray(term.int.x))
    context = Context("region", lambda name, array: array)
    real = Real([_term(scale), _term(-np.asarray(scale))], np.float64(0))
    for name, expected in {"ne": False, "lt": False, "gt": False, "eq": True, "le": True, "ge": True}.items():
        assert np.all(np.asarray(rounding.compare(context, name, real, name).x) == expected)


def test_equal_scales_add_and_others_stay_apart():
    first, second = rounding.merged([_term(0.5), _term(0.25), _term(0.5), _term(-0.25)])
    np.testing.assert_array_equal(first.int.x, 2 * CODES)
    assert (first.int.low, first.int.high) == (-65536, 65536) and not np.any(np.asarray(second.int.x))


def test_what_int32_cannot_hold_stays_apart():
    wide = [_term(0.5, reach=2**30), _term(0.5, reach=2**30)]
    assert len(rounding.merged(wide)) == 2
