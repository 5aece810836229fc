"""`unpack`: a weight's int8 codes from the packed bytes that the program holds.

    q = unpack bytes                        int4 per tensor or channel: the codes themselves
    q8 = unpack bytes steps zero_points     int4 in groups: (q4 - zero_point) * step, codes at the scale of the channel

The packed bytes are all that is stored; the int8 weight is made when the program runs. See `numerics.packing` and
`numerics.groups`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants
from qcompiler.numerics import groups, packing
from qcompiler.numerics.types import QuantType

unpack_p = Primitive("qc_unpack")


def unpack(packed: Any, *grouped: Any, qtype: QuantType, shape: tuple[int, ...]) -> jax.Array:
    """The int8 weight behind packed codes.

    Args:
      packed: uint8, [bytes], as of `packing.pack`.
      *grouped: of a type with `contracted` dimensions, `steps` and, unless it is symmetric, `zero_points` of
        `groups.Groups`, int8.
      qtype: type of the packed codes, of fewer than 8 bits.
      shape: of the weight.

    Returns:
      int8 of `shape`: codes of `qtype`; in groups, codes of its channels' scales.
    """
    return unpack_p.bind(packed, *grouped, type=qtype, shape=shape)


def unpack_in_lax(packed: Any, *grouped: Any, type: QuantType, shape: tuple[int, ...]) -> Any:
    """What `unpack` computes, in integer `jax.lax`."""
    # What is computed from constants, XLA would compute when it compiles, and hold the int8 weight as well.
    codes = packing.unpack(lax.optimization_barrier(packed), type.bits, shape)
    if not grouped:
        return codes
    steps, *zeros = (jnp.broadcast_to(groups.expand(x, shape, type), shape) for x in grouped)
    return lax.mul(lax.sub(codes, *zeros) if zeros else codes, steps)


def weights_of(program: Any) -> Callable[[Any], Any | None]:
    """`variable -> array` for the weights of a program (an `ir.Program`), packed ones too; None for all else."""
    constants, names = Constants(program), program.weight_of

    def array(var: Any) -> Any | None:
        made = program.producer.get(var) if isinstance(var, _compat.Var) else None
        held = (var in names) if made is None else made.primitive is unpack_p
        return constants.value(var) if held else None

    return array


def _abstract(*avals: Any, type: QuantType, shape: tuple[int, ...]) -> Any:
    del avals, type
    return jax.core.ShapedArray(shape, jnp.int8)


@functools.cache
def _compiled(type: QuantType, shape: tuple[int, ...]) -> Any:
    return jax.jit(functools.partial(unpack_in_lax, type=type, shape=shape))


unpack_p.def_abstract_eval(_abstract)
unpack_p.def_impl(lambda *args, type, shape: _compiled(type, shape)(*args))
mlir.register_lowering(unpack_p, mlir.lower_fun(unpack_in_lax, multiple_results=False))
