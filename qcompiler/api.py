"""What a user touches: `quantize`, `jit`, and the stages `trace` → `calibrate` → `quantize` → `compile`.

qmodel = qc.quantize(model, batches)                          # all stages at once
qc.trace(model, x).calibrate(batches).quantize().compile()    # one by one
"""

from __future__ import annotations

import copy
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler import ops, pipeline
from qcompiler import recipe as recipes
from qcompiler import target as targets
from qcompiler.backends import lax_int
from qcompiler.debug import census, progress, report
from qcompiler.debug.dumps import Dumper
from qcompiler.errors import (
    CalibrationError,
    IslandError,
    QuantizationError,
    RecipeError,
    SignatureError,
    VerificationError,
)
from qcompiler.flax_adapter import Source, source_of
from qcompiler.ir import Program, _compat, identity, tracing
from qcompiler.numerics.encoding import Encoding
from qcompiler.passes import assign_precision, observe

#: Weights up to this many bytes reach XLA as constants, which it can lay out once; above, as arguments.
CONSTANT_BYTES = 1 << 29


class call:
    """One calibration item, spelled out: `qc.call(x, mask=m)` is what the model is called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


def _as_call(item: Any, parameters: Sequence[str]) -> call:
    """A calibration item as a call: a tuple is positional, a dict of parameter names keywords, all else one input."""
    if isinstance(item, call):
        return item
    if isinstance(item, tuple) and not hasattr(item, "_fields"):
        return call(*item)
    if isinstance(item, dict) and item and all(key in parameters for key in item):
        return call(**item)
    return call(item)


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
    strict: bool = False,
    verify: str = "probe",
    weights: str | None = None,
    dump: Any = None,
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
      recipe: types and estimators: a `qc.Recipe`, or `default`, `litert`, `per_tensor`.
      target: what the integers run on; `xla`.
      backend: `auto` or `lax_int`.
      io: `float`: inputs and outputs as the model has them; `int`: integer codes in and out.
      strict: refuse a model of which anything stays float.
      verify: `probe`: every pass against the first batch; `types`: types only; `off`.
      weights: `constant` or `argument`: how they reach XLA; None: constant up to 512 MiB.
      dump: folder for the program after every pass; also `QCOMPILER_DUMP_TO`.

    Returns:
      A `QuantizedModel`: callable as the model is, without the weights.

    Raises:
      QuantizationError: one of its subclasses; the message says what, where, and what to do.
    """
    source = source_of(fn_or_model, params, variables, method, apply_kwargs)
    chosen = recipes.named(recipe)
    targets.named(target, backend)
    _check_choice("io", io, ("float", "int"))
    _check_choice("weights", weights, (None, "constant", "argument"))
    batches = _batches(calibration_batches, source)
    first = next(batches, None)
    if first is None:
        raise CalibrationError("there are no calibration batches: the iterable is empty (or was read before)")
    traced = _trace(source, first.args, first.kwargs, chosen, verify, Dumper(dump))
    calibrated = traced._calibrate(first, batches)
    return calibrated.quantize(strict=strict).compile(io=io, weights=weights)


def _check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise RecipeError(f"unknown {name}={value!r}; known: {', '.join(map(repr, known))}")


def _batches(items: Iterable[Any], source: Source) -> Any:
    if isinstance(items, Mapping | str | bytes | call) or hasattr(items, "dtype"):
        raise CalibrationError(
            f"calibration batches must be an iterable of batches, got one {type(items).__name__}: pass a list of it"
        )
    try:
        iterator = iter(items)
    except TypeError:
        raise CalibrationError(
            f"calibration batches must be an iterable of batches, got a {type(items).__name__}"
        ) from None
    return (_as_call(item, source.parameters) for item in iterator)


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
    **kwargs: Any,
) -> Traced:
    """Captures a model for inputs like `args` and `kwargs` (arrays or `jax.ShapeDtypeStruct`s); see `quantize`."""
    source = source_of(fn_or_model, params, variables, method, apply_kwargs)
    return _trace(source, args, kwargs, recipes.named(recipe), verify, Dumper(dump))


def _trace(
    source: Source,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    recipe: recipes.Recipe,
    verify: str,
    dumper: Dumper,
) -> Traced:
    manager = pipeline.PassManager(verify, dumper=dumper)
    start = time.perf_counter()
    program = _with_bytes(source.trace(args, kwargs))
    return Traced(source, recipe, manager, program, time.perf_counter() - start)


def _with_bytes(program: Program) -> Program:
    return program.note("float_weight_bytes", report.weight_bytes(program.weights.values()))


def _retrace(source: Source, item: call, error: type[QuantizationError], what: str) -> Program:
    """The program at other shapes; what the user was warned of at the first ones is not said again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="qcompiler dropped")
        try:
            return source.trace(item.args, item.kwargs)
        except (TypeError, ValueError) as cause:
            shapes = [tracing.abstract(x).shape for x in jax.tree_util.tree_leaves((item.args, item.kwargs))]
            raise error(
                f"{what}: the model fails on inputs of shapes {shapes} at {tracing.user_line(cause)}: {cause}"
            ) from cause


def _branched(manager: pipeline.PassManager) -> pipeline.PassManager:
    """A manager that goes on from here, so that a stage can be left in several ways, each with its own report."""
    branch = copy.copy(manager)
    branch.records = list(manager.records)
    return branch


class _Stage:
    """What every stage shows: the program so far and the report so far."""

    program: Program
    _manager: pipeline.PassManager

    @property
    def report(self) -> report.Report:
        """Numbers so far; see `debug.report.Report`."""
        return _report(self.program, self._manager)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.program!r}>"

    def __str__(self) -> str:
        return self.program.text()


def _report(program: Program, manager: pipeline.PassManager) -> report.Report:
    integer_ops, float_ops = report.count_ops(program)
    islands = report.islands_of(program)
    folder = manager.dumper.folder
    return report.Report(
        islands=islands,
        integer_mac_share=1.0 - sum(i.mac_share for i in islands),
        qdq_pairs_before=program.notes.get("pairs_before", 0),
        qdq_pairs_after=program.notes.get("pairs_after", 0),
        integer_ops=integer_ops,
        float_ops=float_ops,
        weight_bytes=report.weight_bytes(program.weights.values()),
        float_weight_bytes=program.notes.get("float_weight_bytes", 0),
        sqnr_db=manager.sqnr,
        passes=tuple(manager.records),
        dump=str(folder) if folder is not None else None,
    )


class Traced(_Stage):
    """A captured model, in float."""

    def __init__(
        self, source: Source, recipe: recipes.Recipe, manager: pipeline.PassManager, program: Program, seconds: float
    ) -> None:
        self._source, self._recipe, self._manager = source, recipe, manager
        self.program = program
        self._seconds = seconds

    def calibrate(self, batches: Iterable[Any]) -> Calibrated:
        """Runs the float passes and observes the model on calibration batches; see `quantize`.

        Raises:
          CalibrationError: no batches, NaN or infinity, or another structure, rank or dtype than was traced.
        """
        items = _batches(batches, self._source)
        first = next(items, None)
        if first is None:
            raise CalibrationError("there are no calibration batches: the iterable is empty (or was read before)")
        return self._calibrate(first, items)

    def _calibrate(self, first: call, rest: Iterable[call]) -> Calibrated:
        flat = _flatten(first, self.program, "calibration batch 0")
        if any(a.shape != b.shape for a, b in zip(map(tracing.abstract, flat), self.program.input_avals, strict=True)):
            program = _with_bytes(_retrace(self._source, first, CalibrationError, "calibration batch 0"))
            return Traced(self._source, self._recipe, self._manager, program, self._seconds)._calibrate(first, rest)
        _check_data(flat, self.program, 0)
        manager = _branched(self._manager)
        manager.probe = flat
        program = manager.start(self.program, self._seconds)
        observed = pipeline.float_passes(manager, program, self._recipe)
        input_types = assign_precision.input_types(observed, self._recipe)
        collector = observe.Collector(observed, input_types, self._recipe.estimator_for)
        readers: dict[Any, Any] = {}
        start = time.perf_counter()
        with progress.bar("calibrate") as tick:
            for number, item in enumerate(_chain(first, rest)):
                flat = _flatten(item, self.program, f"calibration batch {number}")
                _check_data(flat, self.program, number)
                key = tuple(np.shape(x) for x in flat)
                if key not in readers:
                    shapes = tuple(a.shape for a in observed.input_avals)
                    same = observed if key == shapes else self._specialize(item, number)
                    if list(_observed_ids(same)) != list(_observed_ids(observed)):
                        raise CalibrationError(
                            f"calibration batch {number} traces to other operations than batch 0: {key}, {shapes}"
                        )
                    readers[key] = observe.reader(same, results=True)
                collector.add(readers[key], flat)
                tick(number + 1)
        calibrated = observed.replace(stats=collector.stats)
        manager.records.append(report.PassRecord("calibrate", time.perf_counter() - start, f"{number + 1} batches"))
        return Calibrated(self._source, self._recipe, manager, calibrated)

    def _specialize(self, item: call, number: int) -> Program:
        """The observed program at another batch size."""
        program = _retrace(self._source, item, CalibrationError, f"calibration batch {number}")
        return pipeline.float_passes(pipeline.PassManager("types"), program, self._recipe)


def _chain(first: call, rest: Iterable[call]) -> Iterable[call]:
    yield first
    yield from rest


def _observed_ids(program: Program) -> Iterable[str]:
    return (e.params["id"] for e in program.eqns if e.primitive.name == "qc_observe")


def _flatten(item: call, program: Program, what: str) -> list[Any]:
    """Flat inputs, with the structure, dtypes and ranks of the traced ones.

    Raises:
      CalibrationError, SignatureError: they differ; calibration or a call.
    """
    error = CalibrationError if what.startswith("calibration") else SignatureError
    leaves, tree = jax.tree_util.tree_flatten((item.args, item.kwargs))
    if tree != program.signature.in_tree:
        raise error(
            f"{what} has another structure than was traced: {_describe_tree(tree)} against "
            f"{_describe_tree(program.signature.in_tree)}"
        )
    for name, leaf, aval in zip(program.signature.input_names, leaves, program.input_avals, strict=True):
        given = tracing.abstract(leaf)
        if given.dtype != aval.dtype:
            raise error(f"{what}: input {name} has dtype {given.dtype}, {aval.dtype} was traced; convert it first")
        if len(given.shape) != len(aval.shape):
            raise error(f"{what}: input {name} has shape {given.shape}, rank {len(aval.shape)} {aval.shape} was traced")
    return leaves


def _describe_tree(tree: Any) -> str:
    args, kwargs = jax.tree_util.tree_unflatten(tree, ["*"] * tree.num_leaves)
    parts = [str(a) for a in args] + [f"{k}={v}" for k, v in kwargs.items()]
    return f"({', '.join(parts)})".replace("'*'", "*")


def _check_data(flat: Sequence[Any], program: Program, number: int) -> None:
    for name, leaf in zip(program.signature.input_names, flat, strict=True):
        if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
            raise CalibrationError(
                f"calibration batch {number}: input {name} is a {type(leaf).__name__} without values; calibrate on "
                "arrays, outside of jit"
            )
        if jax.dtypes.issubdtype(tracing.abstract(leaf).dtype, jax.dtypes.prng_key):
            continue
        array = np.asarray(leaf)
        if jax.dtypes.issubdtype(array.dtype, np.floating) and not np.isfinite(array.astype(np.float32)).all():
            bad = "NaN" if np.isnan(array.astype(np.float32)).any() else "infinity"
            raise CalibrationError(f"calibration batch {number}: input {name} holds {bad}; remove such samples")


class Calibrated(_Stage):
    """A model whose ranges are known."""

    def __init__(self, source: Source, recipe: recipes.Recipe, manager: pipeline.PassManager, program: Program) -> None:
        self._source, self._recipe, self._manager = source, recipe, manager
        self.program = program

    def quantize(self, recipe: recipes.Recipe | str | None = None, *, strict: bool = False) -> Quantized:
        """Assigns types, inserts QDQ pairs, and fuses them away.

        Args:
          recipe: in place of the one given to `trace`; it must agree with it on equalization, which came before.
          strict: refuse a model of which anything stays float.

        Raises:
          IslandError: strict, and there are islands.
        """
        chosen = self._recipe if recipe is None else recipes.named(recipe)
        if chosen.equalizes != self._recipe.equalizes:
            raise RecipeError("equalization comes before calibration: pass this recipe to qc.trace instead")
        if strict:
            _refuse_islands(self.program)
        manager = _branched(self._manager)
        programs = pipeline.integer_passes(manager, self.program, chosen)
        if strict:
            _refuse_islands(programs["fold_zero_points"])
        return Quantized(self._source, chosen, manager, self.program, programs)


def _refuse_islands(program: Program) -> None:
    islands = report.islands_of(program)
    if islands:
        lines = [f"  {i.primitive} in {i.module_path or '<top level>'} at {i.source}: {i.reason}" for i in islands]
        listed = "\n".join(lines)
        raise IslandError(f"strict mode: {len(islands)} operations would stay float:\n{listed}")


class Quantized(_Stage):
    """A model in integers, not lowered yet. `program` is the one after the last pass, `programs` those on the way."""

    def __init__(
        self,
        source: Source,
        recipe: recipes.Recipe,
        manager: pipeline.PassManager,
        calibrated: Program,
        programs: dict[str, Program],
    ) -> None:
        self._source, self._recipe, self._manager, self._calibrated = source, recipe, manager, calibrated
        self.programs = programs
        self.program = programs["fold_zero_points"]

    def compile(self, io: str = "float", weights: str | None = None) -> QuantizedModel:
        """Lowers to `jax.lax` integers; see `quantize` for the arguments."""
        _check_choice("io", io, ("float", "int"))
        _check_choice("weights", weights, (None, "constant", "argument"))
        manager = _branched(self._manager)
        lowered = manager.run("lower", self.program, lambda p: lax_int.lower(p, io))
        if io == "int" and not lowered.notes["islands"] and (found := census.float_avals(lowered)):
            raise VerificationError(f"the integer program holds {len(found)} float values, such as {found[0].aval}")
        return QuantizedModel(self, lowered, io, weights, _report(lowered, manager))


class QuantizedModel:
    """A compiled integer model: call it as the model was called, without the weights.

    It can be called at any batch size, under `jax.jit` and `jax.vmap`; differentiating it is an error.

    Attributes:
      program: the final program, `jax.lax` integers.
      params: its weights, a plain dict of arrays.
      report: numbers; see `debug.report.Report`.
    """

    def __init__(
        self, quantized: Quantized, lowered: Program, io: str, weights: str | None, result: report.Report
    ) -> None:
        self._quantized, self._io = quantized, io
        self.program = lowered
        self.params = dict(lowered.weights)
        self._constant = result.weight_bytes <= CONSTANT_BYTES if weights is None else weights == "constant"
        self.report = result
        self._programs: dict[Any, Program] = {self._key(lowered.input_avals): lowered}
        self._functions: dict[tuple[str, Any], Callable[..., Any]] = {}
        _warn_of_islands(self.report)

    @staticmethod
    def _key(avals: Iterable[Any]) -> Any:
        return tuple((tuple(a.shape), str(a.dtype)) for a in avals)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result, computed in integers.

        Raises:
          SignatureError: another structure, rank or dtype than was calibrated.
          QuantizationError: differentiated.
        """
        return self._run("integers", args, kwargs)

    def simulate(self, *args: Any, **kwargs: Any) -> Any:
        """The float program with quantize/dequantize pairs that the integers were made from; differentiable."""
        return self._run("simulate", args, kwargs)

    def float(self, *args: Any, **kwargs: Any) -> Any:
        """The original model."""
        return self._run("float", args, kwargs)

    @functools.cached_property
    def input_encodings(self) -> dict[str, Encoding | None]:
        """Input name -> how `io="int"` encodes it; None where the input is no real number, or not quantized."""
        program = self._quantized.program
        entries = lax_int.input_codes(program)
        pairs = zip(program.signature.input_names, program.input_vars, strict=True)
        return {name: _encoding(program, entries.get(var)) for name, var in pairs}

    @functools.cached_property
    def output_encodings(self) -> tuple[Encoding | None, ...]:
        """Per flat result, how `io="int"` encodes it; None where it is no real number, or not quantized."""
        program = self._quantized.program
        made = (None if isinstance(v, _compat.Literal) else program.producer.get(v) for v in program.outvars)
        return tuple(_encoding(program, eqn) for eqn in made)

    def _run(self, which: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reference = self.program if which == "integers" else self._quantized.programs["insert_qdq"]
        flat = _flatten(call(*args, **kwargs), reference, "this call")
        key = self._key(map(tracing.abstract, flat))
        if (which, key) not in self._functions:
            self._functions[which, key] = self._compile(which, key, args, kwargs)
        outs = self._functions[which, key](*flat)
        return jax.tree_util.tree_unflatten(self._out_tree(which, key), outs)

    def _out_tree(self, which: str, key: Any) -> Any:
        return self._programs[key].signature.out_tree if which == "integers" else self.program.signature.out_tree

    def _compile(self, which: str, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        if which == "float":
            source = self._quantized._source
            weights = jax.tree_util.tree_map(jax.numpy.asarray, source.weights)

            def original(*flat: Any) -> Any:
                inner_args, inner_kwargs = jax.tree_util.tree_unflatten(self.program.signature.in_tree, flat)
                return jax.tree_util.tree_leaves(source.fun(weights, *inner_args, **inner_kwargs))

            return jax.jit(original)
        if which == "simulate":
            simulated = self._at(key, args, kwargs, "insert_qdq")
            return jax.jit(lambda *flat: simulated(*flat))
        if key not in self._programs:
            folded = self._at(key, args, kwargs, "fold_zero_points")
            lowered = lax_int.lower(folded, self._io)
            shared = {n: self.params[n] if _equal(self.params.get(n), w) else w for n, w in lowered.weights.items()}
            self._programs[key] = lowered.replace(weights=shared)
        return _integer_function(self._programs[key], self._constant)

    def _at(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stage: str) -> Program:
        """The program of a stage, retraced for inputs of other shapes with the decisions taken at calibration."""
        quantized = self._quantized
        if key == self._key(quantized.programs[stage].input_avals):
            return quantized.programs[stage]
        if self._io == "int":
            args, kwargs = self._float_avals(args, kwargs)
        abstract = jax.tree_util.tree_map(tracing.abstract, (args, kwargs))
        manager = pipeline.PassManager("types")
        retraced = _retrace(quantized._source, call(*abstract[0], **abstract[1]), SignatureError, "this call")
        program = pipeline.float_passes(manager, retraced, quantized._recipe)
        if list(_observed_ids(program)) != list(_observed_ids(quantized._calibrated)):
            raise SignatureError(
                "for inputs of these shapes the model traces to other operations than were calibrated; "
                f"got {[a.shape for a in program.input_avals]}, "
                f"calibrated {[a.shape for a in quantized.program.input_avals]}"
            )
        program = program.replace(stats=quantized._calibrated.stats)
        return pipeline.integer_passes(manager, program, quantized._recipe)[stage]

    def _float_avals(self, args: Any, kwargs: Any) -> Any:
        """Avals with the float dtypes that the integer codes stand for."""
        flat, tree = jax.tree_util.tree_flatten((args, kwargs))
        real = self._quantized.program.input_avals
        avals = [jax.ShapeDtypeStruct(tracing.abstract(x).shape, a.dtype) for x, a in zip(flat, real, strict=True)]
        return jax.tree_util.tree_unflatten(tree, avals)

    def check_integer_only(self) -> None:
        """Raises unless XLA's program for this model holds no float type; for `io="int"`.

        Raises:
          VerificationError: there is one.
        """
        census.check_integer_only(self.program)

    def __repr__(self) -> str:
        share = f"{self.report.integer_mac_share:.0%} of multiply-adds in integers"
        return f"<QuantizedModel: {share}, {len(self.report.islands)} islands, {self.report.weight_bytes:,} bytes>"


def _encoding(program: Program, eqn: Any) -> Encoding | None:
    """What a quantize or dequantize of a program does; None for anything else."""
    if eqn is None or eqn.primitive not in (ops.quantize_p, ops.dequantize_p):
        return None
    scale, zero = (np.asarray(program.weights[program.weight_of[v]]) for v in eqn.invars[1:])
    return Encoding(eqn.params["type"], scale, zero)


def _equal(a: Any, b: Any) -> bool:
    return a is not None and a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b)


def _integer_function(program: Program, constant: bool) -> Callable[..., Any]:
    """The compiled flat function of a lowered program; its derivative is an error."""
    weights = list(program.weights.values())
    if constant:
        compiled = jax.jit(lambda *flat: program(*flat))
    else:
        held = [jax.device_put(w) for w in weights]
        inner = jax.jit(lambda w, *flat: program.replace(weights=dict(zip(program.weights, w, strict=True)))(*flat))
        compiled = lambda *flat: inner(held, *flat)

    @jax.custom_jvp
    def integers(*flat: Any) -> Any:
        return compiled(*flat)

    @integers.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise QuantizationError(
            "the integer program has no derivative; differentiate qmodel.simulate (straight-through) or qmodel.float"
        )

    return integers


def _warn_of_islands(result: report.Report) -> None:
    if result.islands:
        share = 1.0 - result.integer_mac_share
        kinds = ", ".join(sorted({i.primitive for i in result.islands}))
        warnings.warn(
            f"qcompiler leaves {len(result.islands)} operations in float ({kinds}; {share:.1%} of multiply-adds): "
            "print qmodel.report for the reasons and source lines, or pass strict=True to refuse",
            stacklevel=_level_of_user(),
        )


def _level_of_user() -> int:
    """The `stacklevel` of the innermost frame that is not ours, for the caller to warn with."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and identity.is_internal_file(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level


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
        given, tree = jax.tree_util.tree_flatten(weights)
        known, known_tree = jax.tree_util.tree_flatten(self._calibrated_weights)
        if tree != known_tree:
            raise SignatureError("the weights have another structure than those that were calibrated")
        for path, a, b in zip(jax.tree_util.tree_leaves_with_path(weights), given, known, strict=True):
            if a is b:
                continue
            if isinstance(a, jax.core.Tracer):
                raise SignatureError(
                    f"weight {tracing.path_name(path[0])} is a tracer, which cannot be compared with the one that was "
                    "calibrated: close over the weights instead of passing them through jax.jit or jax.grad"
                )
            if not _equal(np.asarray(b), np.asarray(a)):
                raise SignatureError(
                    f"weight {tracing.path_name(path[0])} is not the one that was calibrated: the integers were made "
                    "from the weights of .calibrate(params=...); calibrate again for others"
                )

    def calibrate(self, batches: Iterable[Any], params: Any = None) -> JitFunction:
        """Quantizes the function with these weights and calibration batches; see `quantize`. Returns itself."""
        if self._weights_first and params is None:
            raise CalibrationError("calibrate(batches, params=...) needs the weights that the function is called with")
        self.model = quantize(self._fn, batches, params=params, **self._options)
        self._calibrated_weights = params
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
