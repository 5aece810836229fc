"""Settings that must be in force before any test module is imported."""

import gc
import os
from pathlib import Path

import jax
import pytest
from hypothesis import settings

# A GPU, where there is one, is for those who ask: set JAX_PLATFORMS to run everything there. The environment variable
# is for the processes that tests start, the setting for this one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])

# Integer code must say which dtype it means; under strict promotion a silent int32 -> float32 is an error.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The first example of a property compiles, so its time says nothing. Every run sees the same examples, so that a
# failure tells of a change; new ones are looked for with --hypothesis-profile=search, and by `qcompiler.debug.fuzz`.
settings.register_profile("qcompiler", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True, max_examples=2000)
settings.load_profile("qcompiler")


#: Bytes of memory from which on a process forgets what it has compiled: thousands of tests leave many gigabytes.
_MOST_MEMORY = 2 << 30


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    yield
    statm = Path("/proc/self/statm")
    if statm.exists() and int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > _MOST_MEMORY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def trained_digits():
    """`(model, data)` of `train_digits_resnet()`, trained once per test session; mark the tests that use it slow."""
    from qcompiler.models.digits import train_digits_resnet

    return train_digits_resnet()
