"""Arrays of random numbers, the same in every run."""

import numpy as np


def normal(*shape, seed=0, scale=1.0, shift=0.0):
    """float32 of the given shape, from N(shift, scale**2)."""
    return (scale * np.random.default_rng(seed).normal(size=shape) + shift).astype(np.float32)
