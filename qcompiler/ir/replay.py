"""Evaluating a jaxpr equation by equation, with a rule that may put something else in an equation's place.

Inside `jax.make_jaxpr` this is how every pass rewrites a program: live equations are bound again under their own source
line, name stack and context, so that both survive any number of replays. On concrete arrays it is the op-by-op
evaluation that verification uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.ir import _compat

#: rule(equation, input values) -> the results in its place, or None to bind the equation as it is.
Rule = Callable[[_compat.JaxprEqn, list[Any]], "Sequence[Any] | None"]


def live_equations(jaxpr: Any) -> list[_compat.JaxprEqn]:
    """The equations that the results depend on, or that have side effects, in order."""
    body = _compat.open_jaxpr(jaxpr)
    needed = {v for v in body.outvars if isinstance(v, _compat.Var)}
    kept = []
    for eqn in reversed(body.eqns):
        if _compat.has_side_effects(eqn) or any(v in needed for v in eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, _compat.Var))
            kept.append(eqn)
    return kept[::-1]


def evaluate(jaxpr: Any, args: Sequence[Any], rule: Rule | None = None, *, keep_source: bool = True) -> list[Any]:
    """Evaluates the live equations of `jaxpr`.

    Args:
      jaxpr: a closed jaxpr; its constants are used as they are.
      args: one value per argument of the jaxpr; tracers or arrays.
      rule: see `Rule`.
      keep_source: bind under the equation's own source information; off is faster for concrete values.

    Returns:
      The results, a list.
    """
    body = _compat.open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(_compat.constvars_of(jaxpr), _compat.consts_of(jaxpr), strict=True))
    env.update(zip(_compat.invars_of(jaxpr), args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, _compat.Literal) else env[atom]

    eqns = live_equations(jaxpr)
    last_use: dict[Any, int] = {}
    for position, eqn in enumerate(eqns):
        last_use.update((v, position) for v in eqn.invars if isinstance(v, _compat.Var))
    outvars = {v for v in body.outvars if isinstance(v, _compat.Var)}
    for position, eqn in enumerate(eqns):
        values = [read(v) for v in eqn.invars]
        if keep_source:
            info = eqn.source_info
            with _compat.source_context(info.traceback, info.name_stack, eqn.ctx):
                results = rule(eqn, values) if rule is not None else None
                results = _compat.bind(eqn, values) if results is None else results
        else:
            results = rule(eqn, values) if rule is not None else None
            results = _compat.bind(eqn, values) if results is None else results
        env.update(zip(eqn.outvars, results, strict=True))
        for var in {v for v in eqn.invars if isinstance(v, _compat.Var)}:
            if last_use[var] == position and var not in outvars:
                env.pop(var, None)
    return [read(v) for v in body.outvars]
