"""What float32, and the backend's own floats, cannot tell of a region."""

import jax.numpy as jnp
import numpy as np
from wide import Codes, every_code, region_of

from qcompiler.debug.noise import simulation_noise, soft_noise


def test_a_well_conditioned_region_has_next_to_none():
    region = region_of(lambda x: x * 0.5 + 1.0, every_code())
    # Half a unit of 24 bits is 2**-8 of a step of 16: it shows where a value lies next to the middle of two codes.
    noise = simulation_noise(region.eqn, region.operands)[0]
    assert noise.max() <= 2 and np.mean(noise) < 0.02
    assert np.mean(soft_noise(region.eqn, region.operands)[0]) < 0.002


def test_cancellation_shows():
    """x + 1e6 - 1e6 keeps steps of 1/16 in float32, and of 2**-8 in 28 bits."""
    x = Codes(np.arange(1000, dtype=np.int16), 2.0**-14)
    region = region_of(lambda x: jnp.square(x + 1e3) - 1e6, x, scale=2.0**-8)
    noise, soft = (f(region.eqn, region.operands)[0].max() for f in (simulation_noise, soft_noise))
    assert noise > 8 * soft > 0


def test_the_same_seed_gives_the_same_noise():
    region = region_of(jnp.exp, every_code())
    runs = [simulation_noise(region.eqn, region.operands, seed=3)[0] for _ in range(2)]
    np.testing.assert_array_equal(*runs)
