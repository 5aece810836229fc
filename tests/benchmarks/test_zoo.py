"""The table of convnets: one row of it."""

import pytest

from benchmarks import zoo


@pytest.mark.slow
def test_a_row():
    row = zoo.measure("vgg11", size=32, batch=2, rounds=2)
    assert row["islands"] == 0 and row["float_ms"] > 0 and row["int8_ms"] > 0
    # A quarter, and what biases and multipliers take; eleven layers of 8 bits leave some 37 - 10 log10(11) = 27 dB.
    assert 0.25 <= row["weight_ratio"] <= 0.27 and row["sqnr_db"] >= 24
