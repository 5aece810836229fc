"""In which codes values enter and leave loops and branches.

What a loop carries keeps one encoding: that in which its body reads it, so the body's result is converted to it. What
the branches of a choice give are converted to one that holds them all.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.ir import _compat, classes, loops
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.numerics import types
from qcompiler.numerics.encoding import Encoding


@dataclasses.dataclass(frozen=True)
class LoopCodes:
    """The ends of a loop; None: as the model has it.

    Attributes:
      bodies: of the loop, float inside, with QDQ pairs.
      operands: position of an operand -> its encoding.
      results: the encoding of each result.
      exits: for each body, the encodings of its results.
    """

    bodies: list[loops.Body]
    operands: dict[int, Encoding]
    results: list[Encoding | None]
    exits: list[list[Encoding | None]]

    def entries(self, body: loops.Body) -> list[Encoding | None]:
        """The encodings of a body's inputs."""
        return [self.operands.get(k) for k in body.reads]


#: Program -> id of a loop's equation -> its codes: those of loops in loops are asked for again and again.
_known: weakref.WeakKeyDictionary[Program, dict[int, LoopCodes]] = weakref.WeakKeyDictionary()


def codes_of(program: Program, eqn: _compat.JaxprEqn) -> LoopCodes:
    """See `LoopCodes`.

    Args:
      program: with QDQ pairs in it and in its bodies.
      eqn: a loop of it.
    """
    known = _known.setdefault(program, {})
    if id(eqn) not in known:
        known[id(eqn)] = _codes_of(program, eqn)
    return known[id(eqn)]


def _codes_of(program: Program, eqn: _compat.JaxprEqn) -> LoopCodes:
    found = loops.bodies(program, eqn)
    operands: dict[int, Encoding] = {}
    for body in found:
        wanted = wanted_of(body.program)
        for k, var in zip(body.reads, body.program.input_vars, strict=True):
            if var in wanted:
                operands[k] = _wider(operands.get(k), wanted[var])
    for k, atom in enumerate(eqn.invars):
        # What bodies only hand on stays what it is.
        if k not in operands and k not in loops.carried(eqn):
            known = _encoding_of(program, atom)
            operands |= {} if known is None else {k: known}
    plan = LoopCodes(found, operands, [], [])
    natural = [[_given(b, v, operands) for v in b.program.outvars] for b in found]
    if eqn.primitive.name == "cond":
        results = [_joint(found, cases, k) for k, cases in enumerate(zip(*natural, strict=True))]
        return dataclasses.replace(plan, results=results, exits=[results] * len(found))
    carried = [operands.get(k) for k in loops.carried(eqn)]
    if eqn.primitive.name == "while":
        return dataclasses.replace(plan, results=carried, exits=[[None], carried])
    results = [*carried, *natural[0][len(carried) :]]
    return dataclasses.replace(plan, results=results, exits=[results])


def _given(body: loops.Body, atom: Any, operands: Mapping[int, Encoding]) -> Encoding | None:
    """The encoding in which a body gives a result; what it only hands on has that in which it came."""
    entries = dict(zip(body.program.input_vars, body.reads, strict=True))
    if isinstance(atom, _compat.Var) and atom in entries:
        return operands.get(entries[atom])
    return _encoding_of(body.program, atom)


def wanted_of(program: Program) -> dict[Any, Encoding]:
    """Value -> the widest encoding in which pairs, or loops, read it."""
    constants, found = Constants(program), {}
    for eqn in program.eqns:
        if eqn.primitive is ops.fake_quantize_p:
            found[eqn.invars[0]] = _wider(found.get(eqn.invars[0]), pair(eqn, constants))
        elif loops.is_loop(eqn):
            for k, encoding in codes_of(program, eqn).operands.items():
                if isinstance(eqn.invars[k], _compat.Var):
                    found[eqn.invars[k]] = _wider(found.get(eqn.invars[k]), encoding)
    return found


def _encoding_of(program: Program, atom: Any) -> Encoding | None:
    """The encoding in which a pair, or a loop, gives a real value; None of inputs."""
    made = program.producer.get(atom) if isinstance(atom, _compat.Var) and classes.is_float(atom) else None
    if made is None:
        return None
    if made.primitive is ops.fake_quantize_p:
        return pair(made, Constants(program))
    if loops.is_loop(made):
        return codes_of(program, made).results[made.outvars.index(atom)]
    return None


def pair(eqn: _compat.JaxprEqn, constants: Constants) -> Encoding:
    """The encoding of a QDQ pair."""
    scale, zero = (np.asarray(constants.value(v)) for v in eqn.invars[1:])
    return Encoding(eqn.params["type"], scale, zero)


def _wider(first: Encoding | None, second: Encoding) -> Encoding:
    return second if first is None or second.type.bits > first.type.bits else first


def _joint(found: Sequence[loops.Body], cases: Iterable[Encoding | None], k: int) -> Encoding | None:
    """An encoding that holds result k of every branch; what is known of a branch fits any."""
    every: list[Encoding] = []
    for body, encoding in zip(found, cases, strict=True):
        atom = body.program.outvars[k]
        if encoding is not None:
            every.append(encoding)
        elif not classes.is_float(atom) or atom not in Constants(body.program):
            return None
    if not every:
        return None
    widest = max((e.type for e in every), key=lambda t: t.bits)
    if all(same(e, every[0]) for e in every):
        return every[0]
    low = min(float(np.min((e.type.qmin - e.zero_point) * e.scale.astype(np.float64))) for e in every)
    high = max(float(np.max((e.type.qmax - e.zero_point) * e.scale.astype(np.float64))) for e in every)
    return Encoding(widest, *types.scale_and_zero_point(np.float64(low), np.float64(high), widest))


def same(a: Encoding, b: Encoding) -> bool:
    """Whether two encodings give the same codes."""
    return a.type == b.type and np.array_equal(a.scale, b.scale) and np.array_equal(a.zero_point, b.zero_point)
