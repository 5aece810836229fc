"""Lowers a fused program to integer-only `jax.lax`.

    region[conv]{ a = conv q_x q_w; dequantize (a + b); max 0; quantize }
        ->      conv s8·s8→s32; add b; mulhi; shift; max; min; convert s8

Scales disappear into multipliers and shifts, which become weights of the program. What stands outside of regions stays:
quantize at inputs, dequantize at results, islands in float between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.backends.lax_int import bounds, isolation, rounding, rules, tables, wide
from qcompiler.backends.lax_int.context import Context
from qcompiler.backends.lax_int.values import Int, Known, Real, Term
from qcompiler.ir import _compat, loops, replay
from qcompiler.ir.program import Builder, Program, build
from qcompiler.numerics import fixed_point


def lower(program: Program, io: str = "float") -> Program:
    """See the module's docstring.

    Args:
      program: after `fuse` (and `fold_zero_points`).
      io: `float`: inputs and results as the user's function has them; `int`: the codes themselves, so that the whole
        program is integers.

    Raises:
      OverflowProofError: an int32 accumulator could overflow.
    """
    return loops.change(_lowered(program, io), lower)


def _lowered(program: Program, io: str) -> Program:
    array = ops.weights_of(program)
    entries = input_codes(program) if io == "int" else {}
    avals = [entries[v].outvars[0].aval if v in entries else v.aval for v in program.input_vars]

    def make(builder: Builder, *inputs: Any) -> list[Any]:
        def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
            if eqn.primitive is ops.region_p and eqn.params["id"] in program.notes.get("float_regions", ()):
                return replay.evaluate(eqn.params["body"], values)
            if eqn.primitive is ops.region_p:
                held = [array(v) for v in eqn.invars]
                run = lambda values: lower_region(eqn, values, held, builder.weight)
                if eqn.params["kind"] != "wide":
                    return run(values)
                varying = [k for k, array in enumerate(held) if array is None]
                return isolation.isolated(run, values, varying, [v.aval for v in eqn.outvars])
            if eqn.primitive is ops.unpack_p:
                return [ops.unpack_in_lax(*values, **eqn.params)]
            if eqn.primitive is ops.requantize_p:
                return [lower_requantize(program, eqn, values)]
            if eqn.primitive is ops.quantize_p:
                if eqn.invars[0] in entries:
                    return [values[0]]
                return [fixed_point.quantize(*values, eqn.params["type"])]
            if eqn.primitive is ops.dequantize_p:
                if io == "int" and all(v in program.outvars for v in eqn.outvars):
                    return [values[0]]
                return [fixed_point.dequantize(*values)]
            return None

        args = [*(builder.get(n) for n in program.weights), *inputs]
        return replay.evaluate(program.jaxpr, args, rule)

    fields = {"stats": program.stats, "notes": program.notes, "stage": "lower"}
    return build(make, program.weights, avals, program.signature, **fields)


def input_codes(program: Program) -> dict[Any, _compat.JaxprEqn]:
    """Input variable -> the quantize that alone reads it."""
    found = {}
    for var in program.input_vars:
        users = program.users.get(var, [])
        if program.use_count(var) == 1 and users and users[0][0].primitive is ops.quantize_p:
            found[var] = users[0][0]
    return found


def lower_region(
    eqn: _compat.JaxprEqn,
    values: Sequence[Any],
    held: Sequence[Any],
    weight: Callable[[str, np.ndarray], Any],
    watch: Callable[[Any], None] = lambda accumulator: None,
) -> list[Any]:
    """The integers of one fused region.

    Args:
      eqn: the region.
      values: (traced) operands.
      held: per operand, its array if it is a weight of the program, else None.
      weight: `(name, array) -> traced array`, makes an array a weight.
      watch: called with every int32 accumulator when it becomes a real.
    """
    context = Context(eqn.params["id"], weight)
    body = eqn.params["body"]
    jaxpr = _compat.open_jaxpr(body)
    operands = [
        Int(x, *bounds.of_dtype(x.dtype)) if array is None else Known(np.asarray(array), x)
        for x, array in zip(values, held, strict=True)
    ]
    if eqn.params["kind"] == "table":
        return [r.x for r in tables.lower_table(context, body, operands)]
    env: dict[Any, Any] = dict(zip(jaxpr.invars, operands, strict=True))
    apply = wide.apply if eqn.params["kind"] == "wide" else rules.apply

    def read(atom: Any) -> Any:
        return Known(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, _compat.Literal) else env[atom]

    for inner in jaxpr.eqns:
        info = inner.source_info
        with _compat.source_context(info.traceback, info.name_stack, inner.ctx):
            inputs = [read(v) for v in inner.invars]
            if inner.primitive is ops.dequantize_p and isinstance(inputs[0], Int):
                inputs[0] = _within(inputs[0], inner.params["type"])
                if inner.params["type"].bits == 32:
                    watch(inputs[0].x)
            made = apply(context, inner, inputs)
            env.update(zip(inner.outvars, made if isinstance(made, list) else [made], strict=True))
    return [read(v).x for v in jaxpr.outvars]


def _within(x: Int, qtype: Any) -> Int:
    """Codes of a narrow type stored in a wider dtype keep to the type's range."""
    return x if qtype.bits == 32 else Int(x.x, np.maximum(x.low, qtype.qmin), np.minimum(x.high, qtype.qmax))


def lower_requantize(program: Program, eqn: _compat.JaxprEqn, values: Sequence[Any]) -> Any:
    """Codes of one type to codes of another."""
    numbers = [np.asarray(program.weights[program.weight_of[v]]) for v in eqn.invars[1:]]
    scale_in, zero_in, scale_out, zero_out = numbers
    in_type = eqn.params["in_type"]
    context = Context(f"requantize to {eqn.params['type'].name}", lambda name, value: value)
    codes = Int(values[0], np.int64(in_type.qmin), np.int64(in_type.qmax))
    shifted = rules.fixed_point_shift(eqn, codes, Known(zero_in), context)
    real = Real([Term(shifted, scale_in.astype(np.float64))])
    return rounding.codes(context, real, scale_out, zero_out, eqn.params["type"], "").x
