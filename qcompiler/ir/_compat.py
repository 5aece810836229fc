"""The only module that knows how JAX releases differ; everything else uses these names.

Supported: jax 0.10 (`ClosedJaxpr` wraps an open `Jaxpr`) and jax >= 0.11 (they are one class).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core
from jax.extend import source_info_util
from jax.extend.core import primitives as jex_primitives

ClosedJaxpr = jex_core.ClosedJaxpr
Jaxpr = jex_core.Jaxpr
JaxprEqn = jex_core.JaxprEqn
Literal = jex_core.Literal
Primitive = jex_core.Primitive
Var = jex_core.Var
DropVar = jex_core.DropVar
NameStack = source_info_util.NameStack

#: Call-like primitives that inlining dissolves, with the parameter that holds the called jaxpr.
CALL_JAXPR_PARAM: dict[Primitive, str] = {
    jex_primitives.jit_p: "jaxpr",
    jex_primitives.custom_jvp_call_p: "call_jaxpr",
    jex_primitives.custom_vjp_call_p: "call_jaxpr",
    jex_primitives.remat_p: "jaxpr",
    jex_primitives.closed_call_p: "call_jaxpr",
    jex_primitives.call_p: "call_jaxpr",
}

#: Primitives whose bodies stay whole: replay goes through them, inlining does not.
CONTROL_FLOW: frozenset[Primitive] = frozenset({jex_primitives.scan_p, jex_primitives.while_p, jex_primitives.cond_p})

#: Draws random bits: never folded, never merged.
RANDOM: frozenset[str] = frozenset(
    {"random_bits", "random_seed", "random_split", "random_fold_in", "random_gamma", "random_wrap", "random_unwrap"}
    | {"threefry2x32", "rng_bit_generator", "rng_uniform"}
)


def open_jaxpr(jaxpr: Any) -> Jaxpr:
    """The jaxpr whose `invars` are the arguments alone, given either kind."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def consts_of(jaxpr: Any) -> list[Any]:
    """Values of the constvars of a closed jaxpr (an open one of jax 0.10 has none bound)."""
    return list(getattr(jaxpr, "consts", ()))


def constvars_of(jaxpr: Any) -> list[Var]:
    """The constvars, in the order of `consts_of`."""
    return list(open_jaxpr(jaxpr).constvars)


def invars_of(jaxpr: Any) -> list[Var]:
    """The arguments without constants."""
    return list(open_jaxpr(jaxpr).invars)


def sub_jaxprs(eqn: JaxprEqn) -> list[Any]:
    """The jaxprs held by an equation's parameters."""
    return list(jex_core.jaxprs_in_params(eqn.params))


def called_jaxpr(eqn: JaxprEqn) -> Any | None:
    """The jaxpr that a call-like equation calls; None for any other equation."""
    key = CALL_JAXPR_PARAM.get(eqn.primitive)
    if key is not None:
        return eqn.params[key]
    if eqn.primitive.name == "call_hi_primitive":
        # Of jax >= 0.11: an operation that is kept whole, and says itself what it is made of.
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        return jax.make_jaxpr(lambda *args: jax.tree.leaves(eqn.params["_prim"].expand(*args)))(*avals)
    return None


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands a scan holds constant, and how many it carries."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    held, carried, _ = (len(part) for part in eqn.params["ft_in"].unpack())
    return held, carried


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Binds the equation's primitive to `args`; always returns a list of results."""
    params = eqn.primitive.get_bind_params(eqn.params)
    result = eqn.primitive.bind(*args, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


def full_name_stack(name_stack: NameStack) -> NameStack:
    """`name_stack` below the one in force."""
    return source_info_util.current_name_stack() + name_stack


@contextlib.contextmanager
def source_context(traceback: Any, name_stack: NameStack, context: Any = None) -> Iterator[None]:
    """Gives what is bound inside it this source line, name stack and equation context."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(source_info_util.user_context(traceback, name_stack=full_name_stack(name_stack)))
        if context is not None:
            stack.enter_context(context.manager)
        yield


def scope_names(name_stack: NameStack) -> list[str]:
    """The names that `jax.named_scope` pushed, without the transformations between them."""
    return [entry.name for entry in name_stack.stack if type(entry).__name__ == "Scope"]


def name_stack_of(names: Sequence[str]) -> NameStack:
    """A name stack holding `names`."""
    stack = source_info_util.new_name_stack()
    for name in names:
        stack = stack.extend(name)
    return stack


def absolute_scope(path: str) -> contextlib.AbstractContextManager[Any]:
    """A scope that replaces the one in force instead of extending it."""
    return source_info_util.set_name_stack(name_stack_of([path]))


def frames(traceback: Any) -> list[tuple[str, int, str]]:
    """(file, line, function) of a traceback, innermost first; empty for None."""
    if traceback is None:
        return []
    return [(f.file_name, f.line_num, f.function_name) for f in traceback.frames]


def defined_in(jaxpr: Any) -> str:
    """The file where the traced function of a jaxpr was defined, or an empty string."""
    info = getattr(open_jaxpr(jaxpr) if hasattr(jaxpr, "jaxpr") else jaxpr, "debug_info", None)
    text = getattr(info, "func_src_info", "") or ""
    return text.partition(" at ")[2].rpartition(":")[0]


def primitives_by_name() -> dict[str, Primitive]:
    """Every primitive that `jax.extend` names, keyed by the name that jaxprs print."""
    found = (getattr(jex_primitives, n) for n in dir(jex_primitives) if n.endswith("_p"))
    return {p.name: p for p in found if isinstance(p, Primitive)}


def check_types(jaxpr: Any) -> None:
    """Raises if the jaxpr is not well typed."""
    jex_core.check_jaxpr(open_jaxpr(jaxpr))


def has_side_effects(eqn: JaxprEqn) -> bool:
    """Whether the equation does something besides computing its results."""
    return bool(eqn.effects)


def is_abstract(value: Any) -> bool:
    """Whether `value` is a tracer, so that it cannot be read now."""
    return isinstance(value, jax.core.Tracer)
