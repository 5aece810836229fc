"""Whole programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.debug.reference.contract import dequantize, quantize
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
    if name == "qc_requantize":
        return requantize(eqn, operands)
    if not any(map(classes.is_float, (*eqn.invars, *eqn.outvars))):
        # Integers of the model itself, on their way to where it makes them real.
        return [np.asarray(x) for x in _compat.bind(eqn, list(operands))]
    raise QuantizationError(f"{name} is an island: the reference interprets integers only")


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
