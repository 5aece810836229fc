"""The portable backend: integer-only `jax.lax`, for XLA on any platform."""

from qcompiler.backends.lax_int.lower import input_codes as input_codes
from qcompiler.backends.lax_int.lower import lower as lower
from qcompiler.backends.lax_int.lower import lower_region as lower_region
from qcompiler.backends.lax_int.lower import lower_requantize as lower_requantize
