"""Loops and branches that are known before any input, as the equations that they run.

    scan[length=12]{ h = relu (dot h w) } x ws      ->      h0 = relu (dot x ws[0]); h1 = relu (dot h0 ws[1]); ...

So every layer of a stack has its own weights and scales. A loop that carries nothing becomes one batched body. A branch
whose index is known is the branch. Everything else stays a loop, whose body every pass goes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from qcompiler.ir import _compat, replay
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program, rewrite

#: A loop is unrolled that becomes no more equations.
MOST_EQUATIONS = 256
#: A loop over constants (the stacked weights of layers) with no more steps is.
MOST_LAYERS = 128


def unroll(program: Program) -> Program:
    """The program without the loops and branches of the module's docstring; the same one if it has none.

    Steps have the names `0`, `1`, ... in the module path of what they compute.
    """
    while True:
        constants = Constants(program)
        if not any(_form(eqn, constants) for eqn in program.eqns):
            return program

        def rule(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
            form = None if eqn.outvars[0] in constants else _form(eqn, constants)  # noqa: B023 - used in this round
            return None if form is None else form(eqn, values, constants)  # noqa: B023

        program = rewrite(program, rule, stage=program.stage)


def _form(eqn: _compat.JaxprEqn, constants: Constants) -> Any:
    """How an equation is rewritten, or None."""
    if not eqn.outvars or eqn.outvars[0] in constants or _compat.has_side_effects(eqn):
        return None
    if eqn.primitive.name == "cond":
        return _branch if eqn.invars[0] in constants else None
    if eqn.primitive.name != "scan":
        return None
    (consts, carries), length = _compat.scan_counts(eqn), eqn.params["length"]
    if not length:
        return None
    if not carries:
        return _batch
    stacked = [v in constants for v in eqn.invars[consts + carries :]]
    body = _compat.open_jaxpr(eqn.params["jaxpr"])
    if length * len(body.eqns) <= MOST_EQUATIONS or (length <= MOST_LAYERS and stacked and any(stacked)):
        return _steps
    return None


def _branch(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    """The branch that is taken."""
    branches = eqn.params["branches"]
    index = min(max(int(constants.value(eqn.invars[0])), 0), len(branches) - 1)
    return _run(branches[index], values[1:])


def _steps(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    """One body per step."""
    params = eqn.params
    consts, carries = _compat.scan_counts(eqn)
    held, carry, stacked = values[:consts], list(values[consts : consts + carries]), values[consts + carries :]
    length = params["length"]
    rows: list[list[Any] | None] = [None] * length
    for k in reversed(range(length)) if params["reverse"] else range(length):
        with jax.named_scope(str(k)):
            xs = [lax.squeeze(lax.slice_in_dim(x, k, k + 1, axis=0), (0,)) for x in stacked]
            out = _run(params["jaxpr"], [*held, *carry, *xs])
        carry, rows[k] = out[: len(carry)], out[len(carry) :]
    along = [lax.concatenate([lax.expand_dims(y, (0,)) for y in ys], 0) for ys in zip(*rows, strict=True)]
    return [*carry, *along]


def _batch(eqn: _compat.JaxprEqn, values: Sequence[Any], constants: Constants) -> list[Any]:
    """The body at all steps at once: none depends on another."""
    count, _ = _compat.scan_counts(eqn)
    axes = tuple(None if k < count else 0 for k in range(len(values)))
    body = lambda *args: _run(eqn.params["jaxpr"], args)
    return jax.vmap(body, in_axes=axes, out_axes=0)(*values)


def _run(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The results of a body, the calls in it dissolved."""

    def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any] | None:
        called = _compat.called_jaxpr(eqn)
        return None if called is None else replay.evaluate(called, values, rule)

    return replay.evaluate(jaxpr, args, rule)
