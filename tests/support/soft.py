"""Soft floats from and to float64 for tests, and the dtypes of a traced program."""

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.ir import _compat
from qcompiler.numerics.soft_float import INFINITY_EXPONENT, ZERO_EXPONENT, SoftFloat, constant


def soft(value) -> SoftFloat:
    """As a device array; rounds to 30 bits."""
    number = constant(np.asarray(value, np.float64))
    return SoftFloat(jnp.asarray(number.mantissa), jnp.asarray(number.exponent))


def real(x: SoftFloat) -> np.ndarray:
    """float64, exact within its exponents; asserts that `x` is normalized."""
    mantissa = np.asarray(x.mantissa, np.int64)
    exponent = np.broadcast_to(np.asarray(x.exponent, np.int64), mantissa.shape)
    size = np.abs(mantissa)
    assert np.all((mantissa == 0) | ((size >= 1 << 29) & (size < 1 << 30)))
    np.testing.assert_array_equal(mantissa == 0, exponent == ZERO_EXPONENT)
    infinite = exponent == INFINITY_EXPONENT
    assert np.all(size[infinite] == 1 << 29)
    with np.errstate(over="ignore", under="ignore"):
        return np.where(infinite, np.copysign(np.inf, mantissa), np.ldexp(mantissa.astype(np.float64), exponent))


def draw(rng, low: int, high: int, shape=4000) -> SoftFloat:
    """Numbers of either sign whose exponents are uniform between 2**low and 2**high."""
    size = rng.uniform(0.5, 1, shape) * np.exp2(rng.integers(low + 1, high + 1, shape))
    return soft(size * rng.choice([-1, 1], shape))


def dtypes(fun, *args) -> set[str]:
    """Of every variable of the program that `fun` is traced to, inner programs included."""

    def of(jaxpr):
        inner = _compat.open_jaxpr(jaxpr)
        for eqn in inner.eqns:
            for atom in (*eqn.invars, *eqn.outvars):
                yield str(atom.aval.dtype)
            for sub in _compat.sub_jaxprs(eqn):
                yield from of(sub)

    return set(of(jax.make_jaxpr(fun)(*args)))
