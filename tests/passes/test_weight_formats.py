"""The dequantization error of every weight format against the formulas of uniform noise."""

import numpy as np
import pytest

from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import QuantType
from qcompiler.passes.insert_qdq import weight_scale

#: [inputs, channels]; ranges from 1/2 to 2 from channel to channel.
SHAPE = (4096, 8)
RANGES = np.exp2(np.linspace(-1, 1, SHAPE[1]))
GRANULARITIES = {
    "tensor": {},
    "channel": {"axis": (1,)},
    "channel pairs": {"axis": (1,), "block_size": (2,)},
    "group128": {"axis": (0, 1), "block_size": (128, 1), "contracted": (0,)},
}


def uniform(low=-1.0):
    draws = np.random.default_rng(1).uniform(low, 1, size=SHAPE)
    # Both ends of the range occur in every group.
    draws[::128], draws[1::128] = low, 1
    return (draws * RANGES).astype(np.float32)


def error_of(w, qtype):
    scale, zero = weight_scale(w, qtype)
    assert scale.dtype == np.float32 and zero.dtype == np.int32
    scale = np.broadcast_to(scale, w.shape).astype(np.float64)
    codes = fixed_point.quantize_number(w, scale, zero, qtype)
    # By its definition, x = s (q - z), in float64.
    return scale * (codes - zero) - w, scale, codes


#: Steps of more than 6 bits are those of int8, and groups are not used for them.
FORMATS = [(bits, name) for bits in range(2, 9) for name in GRANULARITIES if bits <= 6 or name != "group128"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "granularity"), FORMATS)
def test_uniform_weights_have_the_noise_of_their_step(bits, symmetric, granularity):
    """E[(x - x')²] = s²/12 per step s, and no error is larger than s/2 (but where groups clip on purpose)."""
    qtype = QuantType(bits, symmetric=symmetric, narrow_range=symmetric, **GRANULARITIES[granularity])
    w = uniform()
    error, scale, codes = error_of(w, qtype)
    steps = qtype.qmax - qtype.qmin
    if not qtype.contracted:
        # The step is the widest range that shares it, over the number of steps.
        shared = {"tensor": RANGES * 0 + 2, "channel": RANGES}.get(granularity, np.repeat(RANGES[1::2], 2))
        np.testing.assert_allclose(scale, np.broadcast_to(2 * shared / steps, SHAPE), rtol=1e-6)
        # An affine zero point is rounded, which moves either end by up to half a step.
        slack = 1 + 1e-6 if symmetric else 2 + 1e-6
        assert (np.abs(error) <= slack * scale / 2).all()
    inside = (codes > qtype.qmin) & (codes < qtype.qmax)
    assert (np.abs(error)[inside] <= scale[inside] / 2 * (1 + 1e-4)).all()
    # 32,768 draws know their mean square to 1 %; few steps end where the range does not, so that the ends count: of
    # groups, whose steps are rounded to whole ones, most.
    expected, tolerance = np.mean(scale**2) / 12, {2: 0.25, 3: 0.12}.get(bits, 0.06)
    few = not symmetric and bits == 2
    assert np.mean(error**2) == pytest.approx(expected, rel=tolerance * (2 if few else 1))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_bit_is_six_decibels(granularity):
    noise = [
        np.mean(error_of(uniform(), QuantType(b, symmetric=False, **GRANULARITIES[granularity]))[0] ** 2)
        for b in (3, 4, 5, 6)
    ]
    # (2^b - 1)² from one to the next: 6.6 dB at 3 bits, 6.2 at 5; whole steps of groups and zero points add a little.
    gains = 10 * np.log10(np.array(noise[:-1]) / noise[1:])
    expected = 20 * np.log10([15 / 7, 31 / 15, 63 / 31])
    np.testing.assert_allclose(gains, expected, atol=1.0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [4, 6])
def test_zero_points_help_weights_of_one_sign(granularity, bits):
    """Half of a symmetric type's codes are never used: a zero point makes steps half as large, noise a quarter."""
    symmetric, affine = (
        np.mean(error_of(uniform(low=0.0), QuantType(bits, symmetric=s, **GRANULARITIES[granularity]))[0] ** 2)
        for s in (True, False)
    )
    # Groups have whole steps of int8 and clip a little where that has less noise.
    steps = (1 << bits) - 1, (1 << (bits - 1)) - 1
    assert symmetric / affine == pytest.approx(steps[0] ** 2 / steps[1] ** 2, rel=0.2)


def test_zero_points_do_nothing_for_symmetric_weights():
    """A range that is centred on zero has 2^b - 1 steps instead of 2^b - 2: 0.03 dB at 8 bits.

    Its zero point lies half way between two codes and is rounded, so that one end is clipped by half a step.
    """
    affine, symmetric = (
        np.mean(error_of(uniform(), QuantType(8, symmetric=s, narrow_range=s, axis=(1,)))[0] ** 2)
        for s in (False, True)
    )
    assert 10 * np.log10(symmetric / affine) == pytest.approx(20 * np.log10(255 / 254), abs=0.2)
