"""Whole programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference.contract import dequantize, quantize
from qcompiler.debug.reference.packing import unpack
from qcompiler.debug.reference.regions import region, requantize
from qcompiler.debug.reference.values import read
from qcompiler.errors import QuantizationError
from qcompiler.ir import _compat, classes


def evaluate(program: Any, inputs: Sequence[Any], io: str = "float") -> list[np.ndarray]:
    """Runs a program after `fuse` or `fold_zero_points`.

    Args:
      program: a `Program` without islands.
      inputs: flat inputs; with `io="int"` the codes of those that `input_codes` quantizes.
      io: as of `lower`: `float`, or `int` for codes in and codes out.

    Raises:
      QuantizationError: an equation stays float, so that there is no integer it must give.
    """
    env: dict[Any, Any] = {v: np.asarray(w) for v, w in zip(program.invars, program.weights.values(), strict=False)}
    env.update((v, np.asarray(x)) for v, x in zip(program.input_vars, inputs, strict=True))
    entries = _entries(program) if io == "int" else {}
    results = {v for v in program.outvars if isinstance(v, _compat.Var)}
    for eqn in program.eqns:
        values = [read(env, v) for v in eqn.invars]
        is_entry = eqn.primitive.name == "qc_quantize" and eqn.invars[0] in entries
        is_exit = eqn.primitive.name == "qc_dequantize" and io == "int" and eqn.outvars[0] in results
        found = [values[0]] if is_entry or is_exit else equation(eqn, values)
        env.update(zip(eqn.outvars, found, strict=True))
    return [read(env, v) for v in program.outvars]


def equation(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The results of one equation outside of regions, or of a region.

    Raises:
      QuantizationError: the equation is float, so that there is no integer it must give.
    """
    name = eqn.primitive.name
    if name == "qc_region":
        return region(eqn, operands)
    if name == "qc_quantize":
        return [quantize(*operands, eqn.params["type"])]
    if name == "qc_dequantize":
        return [dequantize(*operands)]
    if name == "qc_unpack":
        return [unpack(*operands, **eqn.params)]
    if name == "qc_requantize":
        return requantize(eqn, operands)
    if name in _LOOPS:
        return _LOOPS[name](eqn, operands)
    if not any(map(classes.is_float, (*eqn.invars, *eqn.outvars))):
        # Integers of the model itself, on their way to where it makes them real.
        return [np.asarray(x) for x in _compat.bind(eqn, list(operands))]
    raise QuantizationError(f"{name} is an island: the reference interprets integers only")


def _body(jaxpr: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    """The results of a body of a loop."""
    env: dict[Any, Any] = dict(zip(_compat.invars_of(jaxpr), map(np.asarray, operands), strict=True))
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        env.update(zip(eqn.outvars, equation(eqn, [read(env, v) for v in eqn.invars]), strict=True))
    return [np.asarray(read(env, v)) for v in _compat.open_jaxpr(jaxpr).outvars]


def _scan(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    held, count = _compat.scan_counts(eqn)
    fixed, carry, stacked = operands[:held], list(operands[held : held + count]), operands[held + count :]
    order = range(eqn.params["length"])
    rows: dict[int, list[np.ndarray]] = {}
    for t in reversed(order) if eqn.params["reverse"] else order:
        out = _body(eqn.params["jaxpr"], [*fixed, *carry, *(x[t] for x in stacked)])
        carry, rows[t] = out[:count], out[count:]
    empty = [np.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[count:]]
    return [*carry, *([np.stack(ys) for ys in zip(*(rows[t] for t in order), strict=True)] if rows else empty)]


def _while(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    before, within = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tested, fixed, carry = operands[:before], operands[before : before + within], list(operands[before + within :])
    while _body(eqn.params["cond_jaxpr"], [*tested, *carry])[0]:
        carry = _body(eqn.params["body_jaxpr"], [*fixed, *carry])
    return [np.asarray(x) for x in carry]


def _cond(eqn: Any, operands: Sequence[Any]) -> list[np.ndarray]:
    branches = eqn.params["branches"]
    return _body(branches[min(max(int(operands[0]), 0), len(branches) - 1)], operands[1:])


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


def input_codes(program: Any, inputs: Sequence[Any]) -> list[np.ndarray]:
    """Inputs as `io="int"` takes them: the codes of every input that one quantize alone reads, the others unchanged."""
    entries = _entries(program)
    weights = dict(zip(program.invars, program.weights.values(), strict=False))
    codes = []
    for var, x in zip(program.input_vars, inputs, strict=True):
        eqn = entries.get(var)
        scale_and_zero = [] if eqn is None else [weights[v] for v in eqn.invars[1:]]
        codes.append(np.asarray(x) if eqn is None else quantize(x, *scale_and_zero, eqn.params["type"]))
    return codes


def _entries(program: Any) -> dict[Any, Any]:
    found = {}
    for var in program.input_vars:
        readers = [eqn for eqn in program.eqns for v in eqn.invars if v is var]
        is_result = any(v is var for v in program.outvars)
        if len(readers) == 1 and not is_result and readers[0].primitive.name == "qc_quantize":
            found[var] = readers[0]
    return found
