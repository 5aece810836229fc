"""The codes of what is known: computed now, packed where they have few bits, and of groups brought to one scale.

fake_quantize w (steps * scale) zero        ->      unpack bytes steps zero_points, at `scale` per channel
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qcompiler import ops
from qcompiler.ir import _compat
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program
from qcompiler.numerics import fixed_point, groups, packing
from qcompiler.numerics.types import QuantType
from qcompiler.passes._codes import Codes


class Numbers(NamedTuple):
    """The weights of the program that hold the numbers of a pair; `steps` is None where there are no groups."""

    scale: _compat.Var
    steps: _compat.Var | None
    zero_points: _compat.Var


def numbers_of(program: Program, pair: _compat.JaxprEqn) -> Numbers:
    """The weights behind scale and zero point of a pair, as `insert_qdq` made them."""
    _, scale, zero = pair.invars
    if not pair.params["type"].contracted:
        return Numbers(scale, None, zero)
    of_scale = sorted(_behind(program, scale), key=lambda v: v.aval.dtype != np.float32)
    (zero,) = _behind(program, zero)
    return Numbers(*of_scale, zero)


def _behind(program: Program, var: Any) -> set[_compat.Var]:
    """The weights that a value is computed from."""
    if not isinstance(var, _compat.Var):
        return set()
    made = program.producer.get(var)
    return {var} if made is None else set().union(*(_behind(program, v) for v in made.invars))


def known_codes(builder: Builder, program: Program, constants: Constants, pair: _compat.JaxprEqn) -> Codes:
    """What stands for a constant behind a pair; see the module's docstring."""
    qtype, names = pair.params["type"], program.weight_of
    codes = fixed_point.quantize_number(*map(constants.value, pair.invars), qtype).astype(qtype.dtype)
    numbers = numbers_of(program, pair)
    name, own = names[numbers.scale].removesuffix("/scale"), program.ids[pair.invars[0]].removeprefix("weight:")
    # In an encoding of others, what is known is named after itself too.
    name = name if name.startswith(own) else f"{own}@{name}"
    scale, zero = builder.get(names[numbers.scale]), builder.get(names[numbers.zero_points])
    packs = packing.is_packed(qtype.bits)
    stored = builder.weight(
        name, packing.pack(codes, qtype.bits) if packs else _unpacked(program, numbers, codes, qtype)
    )
    if not qtype.contracted:
        return Codes(ops.unpack(stored, qtype=qtype, shape=codes.shape) if packs else stored, scale, zero, qtype)
    grouped = [builder.get(names[numbers.steps]), *([] if qtype.symmetric else [zero])]
    q = ops.unpack(stored, *grouped, qtype=qtype, shape=codes.shape) if packs else stored
    channels = qtype.per_channel
    whole = QuantType(8, symmetric=True, axis=channels.axis, block_size=channels.block_size)
    return Codes(q, scale, builder.weight("zero", np.zeros((), np.int32)), whole)


def _unpacked(program: Program, numbers: Numbers, codes: np.ndarray, qtype: QuantType) -> np.ndarray:
    """The int8 weight that is stored where codes are not packed."""
    if numbers.steps is None:
        return codes
    steps, zeros = (program.weights[program.weight_of[v]] for v in (numbers.steps, numbers.zero_points))
    return groups.int8_weight(codes, steps, zeros, qtype)
