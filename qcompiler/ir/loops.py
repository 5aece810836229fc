"""Loops and branches: their bodies as programs of their own, and the equation around bodies that a pass has changed.

    h, ys = scan{ body } w h0 xs        <->        Program(body), weights w, inputs h and x

A weight that a body reads keeps its name. What a body reads besides are its inputs: what the loop holds constant, then
what it carries, then an element of what it walks over. The ids of a body's equations start with those of its loop, so
they are no other's: `rnn/scan_0/cell/dot_general#0`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler.ir import _compat, replay, tracing
from qcompiler.ir.program import Builder, Program, Signature, build, rewrite

#: In `Program.notes`: id of a loop -> the notes of its bodies. A body notes its `scope`, and `steps` of a scan.
BODIES = "bodies"


@dataclasses.dataclass(frozen=True)
class Body:
    """A body of a loop or branch.

    Attributes:
      program: what it computes.
      reads: for each of its inputs, the operand of the loop where it comes from.
    """

    program: Program
    reads: tuple[int, ...]


def is_loop(eqn: _compat.JaxprEqn) -> bool:
    """Whether an equation is a loop, or a choice of branches, that computes with real numbers and has no effects."""
    if eqn.primitive not in _compat.CONTROL_FLOW or _compat.has_side_effects(eqn):
        return False
    return any(_has_reals(sub) for sub in _compat.sub_jaxprs(eqn))


def _has_reals(jaxpr: Any) -> bool:
    inner = _compat.open_jaxpr(jaxpr)
    atoms = [*inner.invars, *(v for e in inner.eqns for v in (*e.invars, *e.outvars))]
    return any(jax.dtypes.issubdtype(v.aval.dtype, jax.numpy.floating) for v in atoms)


def loops_of(program: Program) -> list[_compat.JaxprEqn]:
    """The loops and branches of a program, not those in their bodies."""
    return [eqn for eqn in program.eqns if is_loop(eqn)]


def bodies(program: Program, eqn: _compat.JaxprEqn) -> list[Body]:
    """The bodies of a loop: of a scan one; of a while its condition and its body; of a choice every branch."""
    name, loop = eqn.primitive.name, program.ids[eqn.outvars[0]]
    path, _, occurrence = loop.replace("#", "_").rpartition("/")
    scopes = [*path.split("/"), occurrence] if path else [occurrence]
    notes = program.notes.get(BODIES, {}).get(loop)
    found = []
    for k, (jaxpr, reads, held) in enumerate(parts_of(eqn)):
        own = scopes if name == "scan" else [*scopes, f"branch_{k}" if name == "cond" else ("condition", "body")[k]]
        found.append(_body(program, eqn, jaxpr, reads, held, own, None if notes is None else notes[k]))
    return found


def carried(eqn: _compat.JaxprEqn) -> range:
    """The operands that start what a scan or a while carries; a choice carries nothing."""
    if eqn.primitive.name == "cond":
        return range(0)
    if eqn.primitive.name == "scan":
        held, count = _compat.scan_counts(eqn)
        return range(held, held + count)
    return range(eqn.params["cond_nconsts"] + eqn.params["body_nconsts"], len(eqn.invars))


def parts_of(eqn: _compat.JaxprEqn) -> list[tuple[Any, list[int], int]]:
    """Of each body its jaxpr, the operands that its arguments start from, and how many of the first never change."""
    params, everything = eqn.params, range(len(eqn.invars))
    if eqn.primitive.name == "scan":
        return [(params["jaxpr"], list(everything), _compat.scan_counts(eqn)[0])]
    if eqn.primitive.name == "cond":
        return [(branch, list(everything[1:]), len(eqn.invars)) for branch in params["branches"]]
    before, within = params["cond_nconsts"], params["body_nconsts"]
    carry = list(everything[before + within :])
    condition = (params["cond_jaxpr"], [*everything[:before], *carry], before)
    return [condition, (params["body_jaxpr"], [*everything[before : before + within], *carry], within)]


def _body(
    program: Program, eqn: _compat.JaxprEqn, jaxpr: Any, reads: list[int], held: int, scopes: list[str], notes: Any
) -> Body:
    """One body; `notes` is None before its equations have the scopes of the loop."""
    weight_of = program.weight_of
    weights: dict[str, Any] = {}
    sources: list[Any] = []
    inputs: list[int] = []
    for place, k in enumerate(reads):
        atom = eqn.invars[k]
        if place < held and isinstance(atom, _compat.Var) and atom in weight_of:
            name = weight_of[atom]
            weights[name] = program.weights[name]
            sources.append(name)
        elif place < held and isinstance(atom, _compat.Literal):
            sources.append(atom)
        else:
            sources.append(len(inputs))
            inputs.append(k)

    def make(builder: Builder, *values: Any) -> list[Any]:
        args = [values[s] if isinstance(s, int) else builder.get(s) if isinstance(s, str) else s.val for s in sources]
        if scoped:
            return replay.evaluate(jaxpr, args)
        return tracing.inline(builder, jaxpr, _compat.consts_of(jaxpr), args, scopes=scopes)

    scoped, arguments = notes is not None, _compat.invars_of(jaxpr)
    avals = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)
        for v, s in zip(arguments, sources, strict=True)
        if isinstance(s, int)
    ]
    results = len(_compat.open_jaxpr(jaxpr).outvars)
    trees = (jax.tree.structure(([0] * len(inputs), {})), jax.tree.structure([0] * results))
    names = tuple(f"{'/'.join(scopes)}.{k}" for k in range(len(inputs)))
    if notes is None:
        notes = {"steps": eqn.params.get("length", 1), "scope": "/".join(scopes)}
    fields = {"stats": program.stats, "notes": notes, "stage": program.stage}
    return Body(build(make, weights, avals, Signature(*trees, names), **fields), tuple(inputs))


def bind(
    eqn: _compat.JaxprEqn,
    values: Sequence[Any],
    found: Sequence[Body],
    weight: Callable[[str], Any],
    run: Callable[[Body, Sequence[Any]], list[Any]] | None = None,
) -> list[Any]:
    """The loop around other bodies.

    Args:
      eqn: the loop.
      values: of its operands; those that became weights of the bodies are not read.
      found: its bodies, changed: other weights, other dtypes at their ends, but as many inputs and results.
      weight: name -> the (traced) weight.
      run: evaluates a body on its inputs, and may close over traced values; None: as the body's program is.
    """

    def typed(body: Body) -> list[Any]:
        """The operands that a body reads, in the dtypes of its inputs: a literal's is weak."""
        pairs = zip(body.reads, body.program.input_avals, strict=True)
        strong = lambda x, dtype: np.asarray(x, dtype)[()] if isinstance(x, int | float | bool) else x
        return [strong(values[k], aval.dtype) for k, aval in pairs]

    operands = [typed(body) for body in found]
    if eqn.primitive.name == "cond" and run is None:
        return _bind_cond(eqn, values[0], found, operands, weight)
    if run is None:
        run = lambda body, inputs: replay.evaluate(body.program.jaxpr, [*map(weight, body.program.weights), *inputs])
    if eqn.primitive.name == "cond":
        # A branch that `bind` takes must be closed; `switch` closes it over what is traced.
        index = values[0].astype(np.int32)
        return lax.switch(index, [lambda f=f, xs=xs: run(f, xs) for f, xs in zip(found, operands, strict=True)])

    fixed = [held_by(eqn, body) for body in found]
    if eqn.primitive.name == "while":
        condition, body = found
        out = lax.while_loop(
            lambda carry: run(condition, [*operands[0][: fixed[0]], *carry])[0],
            lambda carry: run(body, [*operands[1][: fixed[1]], *carry]),
            operands[1][fixed[1] :],
        )
        return list(out)
    (body,), (inputs,), (first,) = found, operands, fixed
    last = first + len(carried(eqn))

    def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run(body, [*inputs[:first], *carry, *row])
        return out[: len(carry)], out[len(carry) :]

    kept = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    carry, rows = lax.scan(step, inputs[first:last], inputs[last:], **kept)
    return [*carry, *rows]


def held_by(eqn: _compat.JaxprEqn, body: Body) -> int:
    """How many of a body's inputs come first and stay the same in every step of its scan or while."""
    return sum(k < carried(eqn).start for k in body.reads)


def _bind_cond(
    eqn: _compat.JaxprEqn,
    index: Any,
    found: Sequence[Body],
    operands: Sequence[Sequence[Any]],
    weight: Callable[[str], Any],
) -> list[Any]:
    """The choice of other branches: all read the same weights and operands. `lax.switch` would clamp again."""
    names = list(dict.fromkeys(n for body in found for n in body.program.weights))
    values = {k: x for body, xs in zip(found, operands, strict=True) for k, x in zip(body.reads, xs, strict=True)}
    args = [*map(weight, names), *values.values()]
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jax.typeof, args)]

    def branch(body: Body) -> Any:
        def taken(*args: Any) -> list[Any]:
            given = dict(zip([*names, *values], args, strict=True))
            return replay.evaluate(body.program.jaxpr, [given[key] for key in (*body.program.weights, *body.reads)])

        return jax.make_jaxpr(taken)(*avals)

    return list(eqn.primitive.bind(index, *args, **{**eqn.params, "branches": tuple(map(branch, found))}))


def change(program: Program, rule: Callable[[Program], Program]) -> Program:
    """The program with `rule` applied to every body of its loops; the same one if it has none.

    Notes `bodies`: id of a loop -> the notes of its bodies.
    """
    found: dict[int, list[Body]] = {}
    weights: dict[str, Any] = dict(program.weights)
    notes: dict[str, Any] = {}
    for eqn in loops_of(program):
        loop = program.ids[eqn.outvars[0]]
        changed = [dataclasses.replace(b, program=rule(b.program)) for b in bodies(program, eqn)]
        found[id(eqn)] = with_own_names(changed, loop, weights)
        for body in found[id(eqn)]:
            weights.update(body.program.weights)
        notes[loop] = [dict(b.program.notes) for b in changed]
    if not found:
        return program

    def replaced(builder: Builder, eqn: _compat.JaxprEqn, values: list[Any]) -> Sequence[Any] | None:
        return bind(eqn, values, found[id(eqn)], builder.weight) if id(eqn) in found else None

    return rewrite(program, replaced, stage=program.stage, weights=weights).note(BODIES, notes)


def everywhere(rule: Callable[[Program], Program], program: Program) -> Program:
    """The program with `rule` applied to it, then to the bodies of its loops, and to the bodies of loops in those."""
    return change(rule(program), lambda body: everywhere(rule, body))


def nested(program: Program) -> list[Program]:
    """The program, and every body in it."""
    found = [program]
    for eqn in loops_of(program):
        for body in bodies(program, eqn):
            found += nested(body.program)
    return found


def first_inputs(eqn: _compat.JaxprEqn, values: Sequence[Any], body: Body, number: int) -> list[Any] | None:
    """What a body reads when it first runs, given the loop's operands; None if it never does.

    Args:
      eqn: the loop.
      values: of its operands, concrete.
      body: body `number` of it.
      number: see `bodies`.
    """
    inputs = [values[k] for k in body.reads]
    if eqn.primitive.name == "cond":
        return inputs if int(values[0]) == number else None
    if eqn.primitive.name == "while":
        return inputs
    if not eqn.params["length"]:
        return None
    first = -1 if eqn.params["reverse"] else 0
    stacked = carried(eqn).stop
    return [x if k < stacked else x[first] for k, x in zip(body.reads, inputs, strict=True)]


def with_own_names(found: Sequence[Body], loop: str, weights: Mapping[str, Any]) -> list[Body]:
    """Bodies with those weights named after the loop whose names stand for other arrays outside, or in each other."""
    same = lambda a, b: a is b or (a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b))
    taken, out = dict(weights), []
    for number, body in enumerate(found):
        named = {}
        for name, array in body.program.weights.items():
            own = name
            if name in taken and not same(taken[name], array):
                own = f"{loop}:{number}:{name}"
            named[own] = taken[own] = array
        out.append(dataclasses.replace(body, program=body.program.replace(weights=named)))
    return out
