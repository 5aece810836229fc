"""Wide regions made by hand, lowered alone, and their distance from float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler import ops
from qcompiler.backends.lax_int.lower import lower_region
from qcompiler.debug import reference
from qcompiler.ir import _compat, classes, replay, tracing
from qcompiler.numerics.types import QuantType

INT16 = QuantType(16, symmetric=True)


@dataclasses.dataclass(frozen=True)
class Codes:
    """An int16 operand that stands for `scale * array`."""

    array: np.ndarray
    scale: float = 2.0**-12

    @property
    def real(self) -> np.ndarray:
        return self.array * np.float64(np.float32(self.scale))


def every_code(scale=2.0**-12) -> Codes:
    return Codes(np.arange(-(2**15), 2**15).astype(np.int16), scale)


@dataclasses.dataclass(frozen=True)
class WideRegion:
    """A fused region of kind `wide`.

    Attributes:
      eqn: the equation.
      operands: its operands.
      held: per operand, its array if it is known, else None.
    """

    eqn: object
    operands: list
    held: list

    def integers(self, *arrays):
        """The lowered region, op by op, of other arrays for the operands that are not known, if given."""
        rest = iter(arrays)
        values = [next(rest) if arrays and h is None else v for v, h in zip(self.operands, self.held, strict=True)]
        weight = lambda name, array: jnp.asarray(array)
        return lower_region(self.eqn, [jnp.asarray(v) for v in values], self.held, weight)[0]

    def expected(self):
        """The same in float64."""
        return reference.region(self.eqn, self.operands)[0]

    def primitives(self) -> set[str]:
        return {e.primitive.name for e in _compat.open_jaxpr(self.eqn.params["body"]).eqns}

    @property
    def free(self):
        """The operands that are not known."""
        return [v for v, h in zip(self.operands, self.held, strict=True) if h is None]


def region_of(fun, *operands, scale=None) -> WideRegion:
    """The region of `fun` in float32, its result in int16 if it is real.

    Args:
      fun: of one array per operand.
      *operands: `Codes`; integers and truth values; known floats.
      scale: of the result; None: its largest finite magnitude is the last code.
    """
    flat, held, reads = [], [], []
    for x in operands:
        start = len(flat)
        if isinstance(x, Codes):
            parts = [x.array, np.float32(x.scale), np.int32(0)]
            known = [None, *parts[1:]]
            reads.append(lambda args, k=start: ops.dequantize(*args[k : k + 3], INT16))
        else:
            parts = [np.asarray(x)]
            known = parts if parts[0].dtype.kind == "f" else [None]
            reads.append(lambda args, k=start: args[k])
        flat += parts
        held += known
    shapes = [jax.ShapeDtypeStruct(np.shape(x.array if isinstance(x, Codes) else x), _dtype(x)) for x in operands]
    program = tracing.trace(lambda weights, *args: fun(*args), {}, tuple(shapes))
    weights = [np.asarray(w) for w in program.weights.values()]
    flat[:0], held[:0] = weights, weights
    reads = [lambda args, read=read: read(args[len(weights) :]) for read in reads]
    is_real = classes.is_float(program.outvars[0])
    if is_real:
        flat += [np.float32(scale or _scale_of(fun, operands)), np.int32(0)]
        held += flat[-2:]

    def body(*args):
        (result,) = replay.evaluate(program.jaxpr, [*args[: len(weights)], *(read(args) for read in reads)])
        return [ops.quantize(result, *args[-2:], INT16) if is_real else result]

    roles = ("term",) * len(flat)
    run = lambda *args: ops.region(body, *args, id="region", kind="wide", roles=roles)
    (eqn,) = jax.make_jaxpr(run)(*flat).eqns
    return WideRegion(eqn, flat, held)


def _dtype(x):
    return np.float32 if isinstance(x, Codes) else np.asarray(x).dtype


def _scale_of(fun, operands) -> float:
    """A step with which the largest finite result of float32 is the last code."""
    values = [np.asarray(x.real, np.float32) if isinstance(x, Codes) else np.asarray(x) for x in operands]
    result = np.abs(np.asarray(fun(*map(jnp.asarray, values)), np.float64))
    return max(float(np.max(result[np.isfinite(result)], initial=0)) / INT16.qmax, 2.0**-40)


def distance(region: WideRegion) -> np.ndarray:
    """Steps between the integers and float64, element by element; of truth values, whether they differ."""
    got, expected = np.asarray(region.integers()), region.expected()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return np.abs(got.astype(np.int64) - expected.astype(np.int64))


def operations(region: WideRegion) -> list[str]:
    """dtypes of all values of the lowered region."""
    jaxpr = jax.make_jaxpr(region.integers)(*region.free)
    return [str(v.aval.dtype) for v in _values(jaxpr.jaxpr)]


def _values(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v for v in (*eqn.invars, *eqn.outvars))
        for sub in _compat.sub_jaxprs(eqn):
            yield from _values(_compat.open_jaxpr(sub))
