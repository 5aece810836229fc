"""What a user touches: `quantize` does all stages at once, `trace` starts them one by one, `jit` decorates.

qmodel = qc.quantize(model, batches)
qmodel = qc.trace(model, x).calibrate(batches).quantize().compile()
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler import recipe as recipes
from qcompiler import target as targets
from qcompiler.calls import batches_of, check_choice, first_of
from qcompiler.debug import report
from qcompiler.debug.dumps import Dumper
from qcompiler.errors import CalibrationError, RecipeError, SignatureError
from qcompiler.flax_adapter import source_of, unaliased
from qcompiler.ir import tracing
from qcompiler.quantized_model import QuantizedModel, equal_arrays
from qcompiler.stages import Traced, start


def quantize(
    fn_or_model: Any,
    calibration_batches: Iterable[Any],
    *,
    params: Any = None,
    variables: Any = None,
    method: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    recipe: recipes.Recipe | str | None = None,
    target: targets.Target | str | None = None,
    backend: str = "auto",
    io: str = "float",
    strict: bool | Sequence[str] = False,
    verify: str = "probe",
    weights: str | None = None,
    dump: Any = None,
    state: Mapping[str, Any] | None = None,
) -> QuantizedModel:
    """Quantizes a model to integers with a handful of example inputs.

    Args:
      fn_or_model: a function `fn(params, *inputs)`, an `nnx.Module` in eval mode, or a linen module.
      calibration_batches: any iterable, read once. An item is what the model is called with: a tuple is positional, a
        dict whose keys are all parameter names is keywords, anything else is one input; `qc.call` settles doubt. The
        leading axis may differ from batch to batch.
      params: weights of a function; a pytree.
      variables: of a linen module.
      method: of a module, in place of `__call__`.
      apply_kwargs: keyword arguments of every call that are no inputs (`{"train": False}`).
      recipe: types and estimators: a `qc.Recipe`, or `default`, `accurate`, `int16x8`, `litert`, `per_tensor`.
      target: what the integers run on; `xla`.
      backend: `auto` or `lax_int`.
      io: `float`: inputs and outputs as the model has them; `int`: integer codes in and out.
      strict: refuse a model of which anything stays float; a list of globs: but for primitives and module paths that
        match one.
      verify: `probe`: every pass against the first batch; `types`: types only; `off`.
      weights: `constant` or `argument`: how they reach XLA; None: constant up to 512 MiB.
      dump: folder for the program after every pass; also `QCOMPILER_DUMP_TO`.
      state: name of an input -> place of its next value in the result (an index or key, None for all of it), as
        `{"cache": 1}` of a function that gives `logits, cache`. It goes in and comes out as codes, and starts as
        `QuantizedModel.init_state()`; calibration batches hold it in float.

    Returns:
      A `QuantizedModel`: callable as the model is, without the weights.

    Raises:
      QuantizationError: one of its subclasses; the message says what, where, and what to do.
    """
    source = dataclasses.replace(source_of(fn_or_model, params, variables, method, apply_kwargs), state=state or {})
    chosen = recipes.named(recipe)
    targets.named(target, backend)
    check_choice("io", io, ("float", "int"))
    check_choice("weights", weights, (None, "constant", "argument"))
    batches = batches_of(calibration_batches, source)
    begin, first = first_of(batches)
    traced = start(source, first.args, first.kwargs, chosen, verify, Dumper(dump))
    calibrated = traced._calibrate(begin, first, batches)
    return calibrated.quantize(strict=strict).compile(io=io, weights=weights)


def trace(
    fn_or_model: Any,
    *args: Any,
    params: Any = None,
    variables: Any = None,
    method: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    recipe: recipes.Recipe | str | None = None,
    verify: str = "types",
    dump: Any = None,
    state: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Traced:
    """Captures a model for inputs like `args` and `kwargs` (arrays or `jax.ShapeDtypeStruct`s); see `quantize`."""
    source = dataclasses.replace(source_of(fn_or_model, params, variables, method, apply_kwargs), state=state or {})
    return start(source, args, kwargs, recipes.named(recipe), verify, Dumper(dump))


class JitFunction:
    """What `qc.jit` makes of a function: float under `jax.jit` until `calibrate`, integers after."""

    def __init__(self, fn: Callable[..., Any], weight_argnums: int | None, options: dict[str, Any]) -> None:
        functools.update_wrapper(self, fn)
        if weight_argnums not in (None, 0):
            raise RecipeError(f"weight_argnums must be 0 (weights first) or None (no weights), got {weight_argnums!r}")
        self._fn, self._weights_first, self._options = fn, weight_argnums == 0, options
        self._float = jax.jit(fn)
        self.model: QuantizedModel | None = None
        self._calibrated_weights: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        if self.model is None:
            return self._float(*args, **kwargs)
        if not self._weights_first:
            return self.model(*args, **kwargs)
        if not args:
            raise SignatureError("the weights are the first argument: pass them by position, not by keyword")
        weights, *inputs = args
        self._check_weights(weights)
        return self.model(*inputs, **kwargs)

    def _check_weights(self, weights: Any) -> None:
        given, known = (jax.tree_util.tree_leaves(w) for w in (weights, self._calibrated_weights))
        structures: list[Any] = [jax.tree_util.tree_structure(w) for w in (weights, self._calibrated_weights)]
        if structures[0] != structures[1]:
            raise SignatureError("the weights have another structure than those that were calibrated")
        for path, a, b in zip(jax.tree_util.tree_leaves_with_path(weights), given, known, strict=True):
            if a is b:
                continue
            if isinstance(a, jax.core.Tracer):
                raise SignatureError(
                    f"weight {tracing.path_name(path[0])} is a tracer, which cannot be compared with the one that was "
                    "calibrated: close over the weights instead of passing them through jax.jit or jax.grad"
                )
            if not equal_arrays(np.asarray(b), np.asarray(a)):
                raise SignatureError(
                    f"weight {tracing.path_name(path[0])} is not the one that was calibrated: the integers were made "
                    "from the weights of .calibrate(params=...); calibrate again for others"
                )

    def calibrate(self, batches: Iterable[Any], params: Any = None) -> JitFunction:
        """Quantizes the function with these weights and calibration batches; see `quantize`. Returns itself."""
        if self._weights_first and params is None:
            raise CalibrationError("calibrate(batches, params=...) needs the weights that the function is called with")
        self.model = quantize(self._fn, batches, params=params, **self._options)
        self._calibrated_weights = unaliased(params)
        return self

    @property
    def report(self) -> report.Report:
        """Numbers of the integers.

        Raises:
          CalibrationError: not calibrated yet.
        """
        if self.model is None:
            raise CalibrationError("there is no report before .calibrate(batches)")
        return self.model.report


def jit(fn: Callable[..., Any] | None = None, *, weight_argnums: int | None = None, **options: Any) -> Any:
    """The decorator twin of `jax.jit`: float until `.calibrate(batches, params=...)`, integers after.

    Args:
      fn: a function of inputs, or of weights and inputs.
      weight_argnums: 0 if the first argument is the weights; None if there are none.
      **options: those of `quantize`.
    """
    known = set(quantize.__kwdefaults__ or ()) - {"params", "variables", "method"}
    wrong = set(options) - known
    if wrong:
        raise RecipeError(f"unknown options {', '.join(sorted(wrong))}; known: {', '.join(sorted(known))}")
    if fn is None:
        return lambda f: JitFunction(f, weight_argnums, options)
    return JitFunction(fn, weight_argnums, options)
