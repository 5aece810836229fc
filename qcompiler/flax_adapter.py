"""Turns what users have (functions, nnx modules, linen modules) into a pure function of weights and inputs.

Neither the user's module nor its class is touched. An nnx module is merged anew inside the trace, and each of its parts
gets a cached subclass whose `__call__` opens a scope with its path, because nnx leaves no path in the jaxpr. linen's
methods are intercepted to open the same scopes.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import errors as flax_errors
from flax import linen, nnx

from qcompiler.errors import TraceError
from qcompiler.ir import Program, _compat, identity, tracing
from qcompiler.state import noted


@dataclasses.dataclass(frozen=True)
class Source:
    """A model as `fun(weights, *args, **kwargs)`.

    Attributes:
      fun: pure.
      weights: pytree of arrays.
      parameters: names of the inputs that can be passed by keyword, positional ones first in order.
      keeps_rngs: whether the model holds random number streams of its own, which inference must not draw from.
      state: see `state.noted`.
    """

    fun: Callable[..., Any]
    weights: Any
    parameters: tuple[str, ...]
    keeps_rngs: bool = False
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def trace(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
        """The program for inputs of these shapes.

        Raises:
          TraceError: see `tracing.trace`; or a captured array holds NaN, or a linen module draws random numbers.
        """
        program = tracing.trace(self.fun, self.weights, args, kwargs, parameter_names=self.parameters)
        _check_captured(program)
        if self.keeps_rngs:
            _refuse_draws(program)
        return noted(program, self.state, self.parameters) if self.state else program


def source_of(
    model: Any,
    params: Any = None,
    variables: Any = None,
    method: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Source:
    """The `Source` of a function, an `nnx.Module`, or a linen module.

    Args:
      model: what to quantize.
      params: first argument of a function, its weights; None: it has none (what it closes over is weights).
      variables: of a linen module: `{"params": ..., "batch_stats": ...}`.
      method: of a module, to call in place of `__call__`: a name, or a function of the module.
      apply_kwargs: keyword arguments that are no inputs (`train=False`), handed to every call as they are.

    Raises:
      TraceError: the arguments do not fit the kind of model; a weight is NaN or infinite.
    """
    apply_kwargs = dict(apply_kwargs or {})
    if isinstance(model, nnx.Module):
        _refuse({"params": params, "variables": variables}, "an nnx.Module holds its own weights")
        source = _nnx_source(model, method, apply_kwargs)
    elif isinstance(model, linen.Module):
        if variables is None:
            variables = params
        if variables is None:
            raise TraceError("a linen module needs variables=..., what model.init returned (and training changed)")
        if "params" not in variables:
            variables = {"params": variables}
        source = _linen_source(model, variables, method, apply_kwargs)
    elif callable(model):
        _refuse({"variables": variables, "method": method}, "those belong to Flax modules; a function takes params=")
        source = _function_source(model, params, apply_kwargs)
    else:
        raise TraceError(f"cannot quantize a {type(model).__name__}: pass a function, an nnx.Module or a linen module")
    _check_finite(source.weights)
    return dataclasses.replace(source, weights=unaliased(source.weights))


def unaliased(weights: Any) -> Any:
    """The weights with NumPy arrays copied: they are read again for every batch size, and the user may write to his."""
    return jax.tree_util.tree_map(lambda w: w.copy() if isinstance(w, np.ndarray) else w, weights)


def _refuse(given: Mapping[str, Any], why: str) -> None:
    wrong = [f"{name}=" for name, value in given.items() if value is not None]
    if wrong:
        raise TraceError(f"{', '.join(wrong)} cannot be given here: {why}")


def _check_finite(weights: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        if isinstance(leaf, jax.core.Tracer) or not hasattr(leaf, "dtype"):
            continue
        if jax.dtypes.issubdtype(leaf.dtype, np.floating) and not np.isfinite(np.asarray(leaf, np.float32)).all():
            bad = "NaN" if np.isnan(np.asarray(leaf, np.float32)).any() else "infinity"
            raise TraceError(f"weight {tracing.path_name(path)} holds {bad}; it cannot be quantized")


def _check_captured(program: Program) -> None:
    """Raises `TraceError` for NaN in arrays that the function closes over; infinity may be a mask."""
    for var, name in program.weight_of.items():
        if "#" in name and jax.dtypes.issubdtype(program.weights[name].dtype, np.floating):
            if np.isnan(np.asarray(program.weights[name], np.float32)).any():
                readers = [identity.describe(eqn) for eqn, _ in program.users.get(var, [])] or ["the result"]
                raise TraceError(f"an array that the function closes over holds NaN; it is read by {readers[0]}")


def _refuse_draws(program: Program) -> None:
    """Raises `TraceError` for random numbers from a key that is no input: every call would draw the same."""
    varying = set(program.input_vars)
    for eqn in program.eqns:
        if any(isinstance(v, _compat.Var) and v in varying for v in eqn.invars):
            varying.update(eqn.outvars)
        elif eqn.primitive.name in _compat.RANDOM:
            raise TraceError(
                f"{identity.describe(eqn)} draws random numbers, the same at every call. Dropout in training mode? "
                "Pass the inference flag as an apply keyword, such as deterministic=True"
            )


def _parameter_names(fun: Callable[..., Any], skip: int) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(fun).parameters.values())[skip:]
    except (TypeError, ValueError):
        return ()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.kind in named)


def _function_source(fun: Callable[..., Any], params: Any, apply_kwargs: dict[str, Any]) -> Source:
    if params is None:
        return Source(lambda _, *a, **k: fun(*a, **k, **apply_kwargs), {}, _parameter_names(fun, 0))
    return Source(lambda w, *a, **k: fun(w, *a, **k, **apply_kwargs), params, _parameter_names(fun, 1))


# linen


def _linen_source(model: linen.Module, variables: Any, method: Any, apply_kwargs: dict[str, Any]) -> Source:
    called = _method(model, method) if isinstance(method, str) else method or model.__call__
    skip = 1 if callable(method) and not hasattr(method, "__self__") else 0

    def fun(weights: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with linen.override_named_call(False), linen.intercept_methods(_linen_scope):
                return model.apply(weights, *args, method=method, **apply_kwargs, **kwargs)
        except flax_errors.ModifyScopeVariableError as error:
            raise TraceError(
                f"the model writes to its variables at {tracing.user_line(error)}: {_first_line(error)} "
                "BatchNorm on batch statistics? Pass the inference flag as an apply keyword, such as train=False"
            ) from error
        except flax_errors.InvalidRngError as error:
            raise TraceError(
                f"the model draws random numbers at {tracing.user_line(error)}: {_first_line(error)} "
                "Dropout in training mode? Pass the inference flag as an apply keyword, such as deterministic=True"
            ) from error
        except (flax_errors.ScopeCollectionNotFound, flax_errors.ScopeParamNotFoundError) as error:
            raise TraceError(
                f"variables= lack what the model reads at {tracing.user_line(error)}: {_first_line(error)} They hold "
                f"{', '.join(sorted(weights))}; pass all that model.init returned (and training changed)"
            ) from error

    return Source(fun, variables, _parameter_names(called, skip), keeps_rngs=True)


def _linen_scope(run: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
    """Runs a method in the scope of its module's path; linen's own scopes repeat a module that calls its methods."""
    if context.module.scope is None:
        return run(*args, **kwargs)
    with _module_scope("/".join(context.module.path)):
        return run(*args, **kwargs)


def _method(model: Any, name: str) -> Any:
    called = getattr(model, name, None)
    if not callable(called):
        raise TraceError(f"the model has no method {name!r}")
    return called


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


# nnx


def _nnx_source(model: nnx.Module, method: Any, apply_kwargs: dict[str, Any]) -> Source:
    parts: Any = nnx.split(model, nnx.Not(nnx.RngState), ...)
    graphdef, state, rng_state = parts
    rng_values = nnx.to_pure_dict(rng_state)
    call = _method(type(model), method) if isinstance(method, str) else method or type(model).__call__

    def fun(weights: Any, *args: Any, **kwargs: Any) -> Any:
        # Pure arrays, so that merge makes variables of its own that belong to this trace.
        merged = nnx.merge(graphdef, weights, rng_values)
        lines: dict[str, str] = {"": "the top level"}
        before = _variables(merged)
        token = _scopes.set((_open_scopes(merged), lines))
        try:
            out = call(merged, *args, **kwargs, **apply_kwargs)
        finally:
            _scopes.reset(token)
        after = _variables(merged)
        for path in _normalized_in_place(merged):
            del after[path]
        _refuse_writes(before, after, lines)
        return out

    return Source(fun, nnx.to_pure_dict(state), _parameter_names(call, 1))


def _variables(module: nnx.Module) -> dict[str, Any]:
    """Path -> value of every variable."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {tracing.path_name(path): leaf for path, leaf in leaves}


def _normalized_in_place(module: nnx.Module) -> Iterator[str]:
    """Paths of the weights that nnx's wrappers overwrite in every call with what they compute from these alone.

    `nnx.WeightNorm` and `nnx.SpectralNorm` hand the normalized kernel to the layer that they wrap by writing it there.
    """
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.WeightNorm | nnx.SpectralNorm):
            inner = nnx.to_pure_dict(nnx.state(part.layer_instance, nnx.Param))
            for leaf, _ in jax.tree_util.tree_leaves_with_path(inner):
                yield "/".join([*map(str, path), "layer_instance", tracing.path_name(leaf)])


def _refuse_writes(before: Mapping[str, Any], after: Mapping[str, Any], lines: Mapping[str, str]) -> None:
    for path, value in after.items():
        if value is before.get(path):
            continue
        owner = path.rpartition("/")[0]
        while owner and owner not in lines:
            owner = owner.rpartition("/")[0]
        where = f"{owner or 'the model'} called at {lines.get(owner, 'unknown source')}"
        if path.endswith(("count", "key")):
            raise TraceError(f"{where} draws random numbers: dropout in training mode? Call model.eval() first")
        raise TraceError(
            f"{where} writes to its variable {path}: BatchNorm on batch statistics? Call model.eval() first; other "
            "state that a call changes is not supported yet: pass it in and out of a plain function instead"
        )


#: Of the module being traced: path of each part by its `id` (an attribute would be an item of an `nnx.Dict`), and the
#: line that last called the part of each path.
_scopes: contextvars.ContextVar[tuple[dict[int, str], dict[str, str]]] = contextvars.ContextVar(
    "scopes", default=({}, {})
)


def _open_scopes(module: nnx.Module) -> dict[int, str]:
    """Gives each part of a merged copy a class that opens its path as a scope; `id` of the part -> its path."""
    paths: dict[int, str] = {}
    for path, part in nnx.iter_modules(module):
        if path:
            paths[id(part)] = "/".join(map(str, path))
            object.__setattr__(part, "__class__", _scoped_class(type(part)))
    return paths


@functools.cache
def _scoped_class(cls: type) -> type:
    """A subclass whose call runs in the scope of the module's path."""

    def scoped_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        paths, lines = _scopes.get()
        path = paths.get(id(self))
        if path is None:
            return cls.__call__(self, *args, **kwargs)
        lines[path] = _caller_line()
        with _module_scope(path):
            return cls.__call__(self, *args, **kwargs)

    namespace = {"__call__": scoped_call, "__qualname__": cls.__qualname__, "__module__": cls.__module__}
    return type(cls)(cls.__name__, (cls,), namespace)


#: Path of the module whose call is being traced.
_open_path: contextvars.ContextVar[str] = contextvars.ContextVar("open_path", default="")


@contextlib.contextmanager
def _module_scope(path: str) -> Iterator[None]:
    """Opens what of `path` is not open yet, since parts call each other; a shared part gets its own path."""
    outer = _open_path.get()
    token = _open_path.set(path)
    try:
        context: contextlib.AbstractContextManager[Any]
        if path == outer:
            context = contextlib.nullcontext()
        elif not outer or path.startswith(outer + "/"):
            context = jax.named_scope(path[len(outer) + 1 :] if outer else path)
        else:
            context = _compat.absolute_scope(path)
        with context:
            yield
    finally:
        _open_path.reset(token)


def _caller_line() -> str:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if not identity.is_internal_file(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "unknown source"
