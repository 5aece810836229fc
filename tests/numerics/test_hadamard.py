"""Hadamard matrices are what they are called, and random rotations are orthogonal and the same each time."""

import numpy as np
import pytest

from qcompiler.numerics.hadamard import hadamard, randomized

#: Powers of two, Paley's first (12, 20, 24) and second construction (28, 36), and doubled ones; widths of decoders.
KNOWN = (1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 48, 56, 64, 72, 96, 384, 768, 896, 1536, 5120)
#: No multiple of four, or of an order that needs another construction.
UNKNOWN = (3, 6, 7, 14, 92, 100)


@pytest.mark.parametrize("n", [n for n in KNOWN if n <= 1536])
def test_rows_are_signs_and_orthogonal(n):
    h = hadamard(n)
    assert np.array_equal(np.abs(h), np.ones((n, n)))
    assert np.array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", UNKNOWN)
def test_unknown_orders_are_told(n):
    assert hadamard(n) is None


@pytest.mark.parametrize("n", [*(n for n in KNOWN if n <= 96), *UNKNOWN])
def test_a_random_rotation_is_orthogonal_and_deterministic(n):
    q, made = randomized(n)
    # Sums of n products of float64, each rounded by 2**-53.
    assert np.allclose(q @ q.T, np.eye(n), rtol=0, atol=1e-13)
    assert np.array_equal(q, randomized(n)[0])
    assert (made == "hadamard") == (n in KNOWN)
    if n > 2:
        assert not np.array_equal(q, randomized(n, seed=1)[0])


def test_a_rotation_spreads_one_element_evenly():
    q, _ = randomized(24)
    assert np.allclose(np.abs(np.eye(24)[3] @ q), 24**-0.5, rtol=1e-15, atol=0)


def test_says_what_it_is_made_of():
    assert randomized(28)[1] == "hadamard"
    assert randomized(14)[1] == "hadamard 2 x random 7"
    assert randomized(7)[1] == "random 7"


def test_an_order_is_positive():
    with pytest.raises(ValueError, match="an order of at least 1, got 0"):
        hadamard(0)
