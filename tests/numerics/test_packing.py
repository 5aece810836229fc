"""Packed codes: sizes, and the same codes again, by the program's ops and by the reference's."""

import jax
import numpy as np
import pytest

from qcompiler.debug.reference.packing import unpack as by_reference
from qcompiler.numerics import packing
from qcompiler.numerics.types import QuantType


def codes(bits, *shape):
    """Every code of a number of bits, its extremes first."""
    return np.resize(np.roll(np.arange(-(1 << (bits - 1)), 1 << (bits - 1)), 1), shape).astype(np.int8)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 3), (2, 3, 4, 16), (0, 3)], ids=str)
def test_unpacked_codes_are_those_packed(bits, shape):
    q = codes(bits, *shape)
    packed = packing.pack(q, bits)
    assert packed.dtype == np.uint8 and packed.shape == (packing.packed_size(q.size, bits),)
    found = jax.jit(lambda p: packing.unpack(p, bits, shape))(packed)
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, q)
    if bits > 1:
        np.testing.assert_array_equal(by_reference(packed, type=QuantType(bits), shape=shape), q)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (2, 16), (3, 24), (6, 48), (7, 56)])
def test_codes_take_their_bits(bits, size):
    assert packing.pack(codes(bits, 64), bits).nbytes == size


def test_an_odd_number_of_codes_takes_the_half_byte_too():
    assert packing.pack(codes(4, 33), 4).nbytes == 17
    assert packing.pack(codes(2, 33), 2).nbytes == 9
    # 33 codes of 2 bits and 33 bits.
    assert packing.pack(codes(3, 33), 3).nbytes == 9 + 5


def test_halves_of_the_row_share_bytes():
    assert packing.pack(np.array([1, 2, -1, -8]), 4).tolist() == [0xF1, 0x82]


@pytest.mark.parametrize("wrong", [8, -9])
def test_codes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match="do not fit 4 bits"):
        packing.pack(np.array([0, wrong]), 4)
