"""Counting what a program became: which element types it and XLA's own program hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax

from qcompiler.errors import VerificationError
from qcompiler.ir import _compat
from qcompiler.ir.program import Program

_TYPE = re.compile(r"\b(f8\w*|bf16|f16|f32|f64|s4|u4|s8|u8|s16|u16|s32|u32|s64|u64|pred)\[")
_FLOATS = ("f8", "bf16", "f16", "f32", "f64")


def hlo_text(program: Program) -> str:
    """XLA's program for a program with its weights as constants, after all optimization."""
    return jax.jit(lambda *inputs: program(*inputs)).lower(*program.input_avals).compile().as_text()


def dtypes_in(text: str) -> Counter[str]:
    """How often each element type occurs in HLO text."""
    return Counter(_TYPE.findall(text))


def float_types_in(text: str) -> list[str]:
    """The float types in HLO text."""
    return sorted(name for name in dtypes_in(text) if name.startswith(_FLOATS))


def check_integer_only(program: Program) -> None:
    """Raises if XLA's program for `program` (lowered with `io="int"`) holds any float type.

    Raises:
      VerificationError: it does; the types are named.
    """
    found = float_types_in(hlo_text(program))
    if found:
        raise VerificationError(f"the integer program holds float types: {', '.join(found)}")


def _made(jaxpr: Any) -> Iterator[Any]:
    """The variables that equations make, in bodies too."""
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        yield from eqn.outvars
        for sub in _compat.sub_jaxprs(eqn):
            yield from _made(sub)


def float_avals(program: Program) -> list[Any]:
    """The float variables of a program, weights and inputs included."""
    every = [*program.invars, *_made(program.jaxpr)]
    return [v for v in every if jax.dtypes.issubdtype(v.aval.dtype, jax.numpy.floating)]
