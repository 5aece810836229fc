"""Capturing a function as a flat program: weights become named arguments, calls are inlined, effects are refused.

jit[name=relu]{ max x 0 }; scan{...}      ->      max x 0   (scope `#relu`); scan{...} kept whole
"""

from __future__ import annotations

import itertools
import os
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.errors import TraceError
from qcompiler.ir import _compat, identity, replay
from qcompiler.ir.program import Builder, Program, Signature, build

#: Effects of a printed message only: dropped with a warning. Everything else with an effect is refused.
_PRINTS = frozenset({"debug_callback", "debug_print"})
#: What JAX raises where Python wants the value of a tracer.
_READS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_CALLBACKS = frozenset({"pure_callback", "io_callback", "outside_call", "python_callback"})


def trace(
    fun: Callable[..., Any],
    weights: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    parameter_names: Sequence[str] = (),
    root_scope: str | None = None,
) -> Program:
    """Captures `fun(weights, *args, **kwargs)` as a `Program`.

    Args:
      fun: a pure JAX function of pytrees.
      weights: pytree of arrays, known now; its leaves become `Program.weights`, named by their path.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`s: shapes and dtypes only are read.
      kwargs: the same, by keyword.
      parameter_names: names of the positional inputs, for readable ids and messages.
      root_scope: a scope to drop from the front of module paths (linen opens one named after the class).

    Raises:
      TraceError: an input or weight is no array, or the function has side effects.
    """
    kwargs = dict(kwargs or {})
    weight_leaves = jax.tree_util.tree_leaves_with_path(weights)
    named = {path_name(path) or f"weight{k}": _as_array(leaf, path) for k, (path, leaf) in enumerate(weight_leaves)}
    if len(named) != len(weight_leaves):
        raise TraceError("two weights have the same path in the pytree; rename one of its keys")
    weight_tree = jax.tree_util.tree_structure(weights)
    flat, in_tree = jax.tree_util.tree_flatten((args, kwargs))
    avals = [abstract(leaf) for leaf in flat]
    names = input_names(args, kwargs, parameter_names)
    out_tree: list[Any] = []

    def flat_fun(weight_values: list[Any], inputs: list[Any]) -> list[Any]:
        inner_args, inner_kwargs = jax.tree_util.tree_unflatten(in_tree, inputs)
        out = fun(jax.tree_util.tree_unflatten(weight_tree, weight_values), *inner_args, **inner_kwargs)
        leaves, tree = jax.tree_util.tree_flatten(out)
        out_tree.append(tree)
        return leaves

    try:
        closed = jax.make_jaxpr(flat_fun)([abstract(w) for w in named.values()], avals)
    except _READS_VALUES as error:
        raise TraceError(
            f"the function needs the value of an input at {user_line(error)}, where only its shape is known; what is "
            "no array (a flag, a size) is no input: bind it by closure, functools.partial or apply_kwargs"
        ) from error
    signature = Signature(in_tree, out_tree[-1], tuple(names))
    consts = {f"const#{k}": _host(value) for k, value in enumerate(_compat.consts_of(closed))}
    if clash := set(consts) & set(named):
        raise TraceError(f"weights are named {sorted(clash)}, as captured constants are; rename them")

    def make(builder: Builder, *inputs: Any) -> list[Any]:
        values = [builder.get(n) for n in named]
        held = [builder.get(n) for n in consts]
        return inline(builder, closed, held, [*values, *inputs], root_scope=root_scope)

    return build(make, named | consts, avals, signature)


def inline(
    builder: Builder,
    closed: Any,
    consts: list[Any],
    args: list[Any],
    *,
    root_scope: str | None = None,
    scopes: Sequence[str] = (),
) -> list[Any]:
    """Replays a jaxpr with calls dissolved, scopes cleaned, and array literals lifted to weights.

    Args:
      builder: gets the weights.
      closed: the jaxpr.
      consts, args: values of its constants and arguments.
      root_scope: the scope that linen opens for the outermost module.
      scopes: of what the jaxpr is a body of.
    """
    lifted, where = itertools.count(), "".join(f"{scope}/" for scope in scopes)

    def lift(value: Any) -> Any:
        return builder.weight(f"{where}literal#{next(lifted)}", _host(value))

    def walk(
        jaxpr: Any, consts: list[Any], args: list[Any], scopes: list[str], caller: Any = None, library: bool = False
    ) -> list[Any]:
        env: dict[Any, Any] = dict(zip(_compat.constvars_of(jaxpr), consts, strict=True))
        env.update(zip(_compat.invars_of(jaxpr), args, strict=True))

        def read(atom: Any) -> Any:
            if not isinstance(atom, _compat.Literal):
                return env[atom]
            if not getattr(atom.val, "ndim", 0):
                return atom.val
            return lift(np.asarray(atom.val))

        for eqn in replay.live_equations(jaxpr):
            name = eqn.primitive.name
            if name in _PRINTS:
                message = f"qcompiler dropped a debug print at {identity.source_of(eqn)}"
                warnings.warn(message, stacklevel=identity.user_stacklevel())
                continue
            refuse_effects(eqn)
            local = scopes + identity.clean_scopes(eqn.source_info.name_stack, root_scope if not scopes else None)
            traceback = eqn.source_info.traceback
            # A cached library jaxpr remembers the lines of whoever called it first, so the caller's are the right ones.
            if caller is not None and (library or identity.user_frame(traceback) is None):
                traceback = caller
            inner = _compat.called_jaxpr(eqn)
            values = [read(v) for v in eqn.invars]
            if inner is not None:
                tag = identity.TAG + str(eqn.params.get("name") or name)
                held = [lift(value) for value in _compat.consts_of(inner)]
                inner_library = identity.is_internal_file(_compat.defined_in(inner))
                results = walk(inner, held, values, [*local, tag], traceback, inner_library)
            else:
                with _compat.source_context(traceback, _compat.name_stack_of(local), eqn.ctx):
                    results = _compat.bind(eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in _compat.open_jaxpr(jaxpr).outvars]

    return walk(closed, consts, args, list(scopes))


def refuse_effects(eqn: _compat.JaxprEqn) -> None:
    """Raises `TraceError` for callbacks and other side effects, in the equation or in its bodies."""
    if eqn.primitive.name in _CALLBACKS:
        raise TraceError(
            f"{eqn.primitive.name} at {identity.source_of(eqn)} calls back into Python, which integers cannot;"
            " move it outside of the quantized function"
        )
    for sub in _compat.sub_jaxprs(eqn):
        for inner in _compat.open_jaxpr(sub).eqns:
            refuse_effects(inner)
    if _compat.has_side_effects(eqn) and eqn.primitive.name not in _PRINTS and not _compat.sub_jaxprs(eqn):
        raise TraceError(
            f"{eqn.primitive.name} at {identity.source_of(eqn)} has side effects ({eqn.effects}); make it pure"
        )


def user_line(error: BaseException) -> str:
    """`file.py:line (function)` of the innermost frame of the user's own code that an error passed through."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not identity.is_internal_file(frame.filename):
            return f"{os.path.relpath(frame.filename)}:{frame.lineno} ({frame.name})"
    return "unknown source"


def path_name(path: Sequence[Any]) -> str:
    """`params/conv1/kernel` from a key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def input_names(args: tuple[Any, ...], kwargs: Mapping[str, Any], parameter_names: Sequence[str]) -> list[str]:
    """One name per flat input: the parameter's name, with the path inside it if it is a pytree."""
    names = []
    for k, arg in enumerate(args):
        base = parameter_names[k] if k < len(parameter_names) else f"arg{k}"
        names.extend(base + jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(arg))
    for key in sorted(kwargs):
        names.extend(key + jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(kwargs[key]))
    return names


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an input leaf, as JAX would take it.

    Raises:
      TraceError: the leaf is no array.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    try:
        aval = jax.typeof(leaf)
    except TypeError:
        raise TraceError(f"an input is a {type(leaf).__name__}, not an array; pass it by closure instead") from None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _as_array(leaf: Any, path: Any) -> Any:
    if _compat.is_abstract(leaf):
        raise TraceError(
            f"weight {path_name(path)} is a tracer: the compiler must read weights, so call qc.quantize outside of jit"
        )
    if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | bool):
        raise TraceError(f"weight {path_name(path)} is a {type(leaf).__name__}, not an array")
    return _host(leaf if hasattr(leaf, "dtype") else jax.numpy.asarray(leaf))


def _host(value: Any) -> Any:
    """The array in NumPy where it has the dtype; PRNG keys stay JAX arrays."""
    if _compat.is_abstract(value):
        raise TraceError(
            "an array that the function closes over is a tracer: the compiler must read weights, so call qc.quantize "
            "outside of jit"
        )
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    # As JAX would take it: float32 for float64 unless jax_enable_x64 is set.
    return np.asarray(value, jax.dtypes.canonicalize_dtype(value.dtype))
