"""`QuantizedModel`: the compiled integers behind the model's own signature, at any batch size."""

from __future__ import annotations

import functools
import operator
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qcompiler import interchange, ops, pipeline, state
from qcompiler.backends import lax_int
from qcompiler.calls import call, flatten, retrace
from qcompiler.debug import census, report
from qcompiler.errors import QuantizationError, SignatureError
from qcompiler.ir import Program, _compat, identity, tracing
from qcompiler.numerics.encoding import Encoding
from qcompiler.passes.observe import observed_ids

if TYPE_CHECKING:
    from qcompiler.precision.assignment import Assignment
    from qcompiler.stages import Quantized

#: Weights up to this many bytes reach XLA as constants, which it can lay out once; above, as arguments.
CONSTANT_BYTES = 1 << 29


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

    @property
    def precision(self) -> Assignment | None:
        """The types that were decided by data, a recipe's `precision`: prints as a table, `save`s as a file that can be
        edited; None where there is none."""
        return self._quantized.precision

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

    @functools.cached_property
    def state_encodings(self) -> dict[str, Encoding | None]:
        """Input name -> how what is state is encoded; None where it stays as the model has it."""
        program = self._quantized.program
        names = [program.signature.input_names[k] for k, _ in state.pairs_of(program)]
        return dict(zip(names, program.notes.get(state.STATE_CODES, ()), strict=True))

    def init_state(self, **values: Any) -> dict[str, Any]:
        """Name of each state -> its codes, as a call takes them.

        Args:
          **values: state in float, as a float call leaves it; zeros of the calibrated shapes where it is not given.

        Raises:
          SignatureError: no such state, or another structure than was calibrated.
        """
        source = self._quantized._source
        return state.initial(self._quantized.program, source.state, source.parameters, values)

    @functools.cached_property
    def encodings(self) -> interchange.Encodings:
        """Name -> encoding of every stored value, weight and bias, by the names that `Recipe.encodings` takes."""
        programs = self._quantized.programs
        return interchange.encodings_of(programs["assign_precision"], programs["insert_qdq"])

    def export_encodings(
        self, path: str | os.PathLike[str], format: str = "aimet2", names: Mapping[str, str] | None = None
    ) -> None:
        """Writes the encodings of every value and weight for other tools; `qc.interchange.load` reads them back.

        Args:
          path: of the file, which is replaced whole or not at all.
          format: `aimet2` (AIMET's encodings 2.0.0) or `qnn` (`quantization_overrides.json`).
          names: our name (value id, weight) -> the name in the file.

        Raises:
          RecipeError: no such format, or two encodings would get one name.
          OSError: the file cannot be written.
        """
        interchange.save(self.encodings, path, format, names)

    def _run(self, which: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reference = self.program if which == "integers" else pipeline.simulation(self._quantized.programs)
        flat = flatten(call(*args, **kwargs), reference, "this call")
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
            simulated = self._at(key, args, kwargs, pipeline.simulation)
            return jax.jit(lambda *flat: simulated(*flat))
        if key not in self._programs:
            folded = self._at(key, args, kwargs, operator.itemgetter("fold_zero_points"))
            lowered = lax_int.lower(folded, self._io)
            shared = {
                n: self.params[n] if equal_arrays(self.params.get(n), w) else w for n, w in lowered.weights.items()
            }
            self._programs[key] = lowered.replace(weights=shared)
        return _integer_function(self._programs[key], self._constant)

    def _at(
        self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any], of: Callable[[dict[str, Program]], Program]
    ) -> Program:
        """The program of a stage, retraced for inputs of other shapes with the decisions taken at calibration."""
        quantized = self._quantized
        if key == self._key(of(quantized.programs).input_avals):
            return of(quantized.programs)
        args, kwargs = self._float_avals(args, kwargs)
        abstract = jax.tree_util.tree_map(tracing.abstract, (args, kwargs))
        manager = pipeline.retracing_manager()
        retraced = retrace(quantized._source, call(*abstract[0], **abstract[1]), SignatureError, "this call")
        program = pipeline.float_passes(manager, retraced, quantized._recipe, quantized._data)
        if observed_ids(program) != observed_ids(quantized._calibrated):
            raise SignatureError(
                "for inputs of these shapes the model traces to other operations than were calibrated; "
                f"got {[a.shape for a in program.input_avals]}, "
                f"calibrated {[a.shape for a in quantized.program.input_avals]}"
            )
        program = program.replace(stats=quantized._calibrated.stats)
        return of(pipeline.integer_passes(manager, program, quantized._recipe, quantized._data))

    def _float_avals(self, args: Any, kwargs: Any) -> Any:
        """Avals with the float dtypes that the integer codes stand for."""
        flat, tree = jax.tree_util.tree_flatten((args, kwargs))
        real = self._quantized._calibrated.input_avals
        avals = [jax.ShapeDtypeStruct(tracing.abstract(x).shape, a.dtype) for x, a in zip(flat, real, strict=True)]
        return jax.tree_util.tree_unflatten(tree, avals)

    def check_integer_only(self) -> None:
        """Raises unless XLA's program for this model holds no float type; for `io="int"`.

        Raises:
          VerificationError: there is one.
        """
        census.check_integer_only(self.program)

    def __repr__(self) -> str:
        islands = self.report.islands
        share = f"{1.0 - sum(i.mac_share for i in islands):.0%} of multiply-adds in integers"
        return f"<QuantizedModel: {share}, {len(islands)} islands, {self.report.weight_bytes:,} bytes>"


def _encoding(program: Program, eqn: Any) -> Encoding | None:
    """What a quantize or dequantize of a program does; None for anything else."""
    if eqn is None or eqn.primitive not in (ops.quantize_p, ops.dequantize_p):
        return None
    scale, zero = (np.asarray(program.weights[program.weight_of[v]]) for v in eqn.invars[1:])
    return Encoding(eqn.params["type"], scale, zero)


def equal_arrays(a: Any, b: Any) -> bool:
    """Whether two arrays are the same, dtype and shape included; False if `a` is None."""
    return a is not None and a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b)


def _integer_function(program: Program, constant: bool) -> Callable[..., Any]:
    """The compiled flat function of a lowered program; its derivative is an error."""
    compiled: Callable[..., Any]
    if constant:
        compiled = jax.jit(lambda *flat: program(*flat))
    else:
        held = [jax.device_put(w) for w in program.weights.values()]
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
        share = sum(i.mac_share for i in result.islands)
        kinds = ", ".join(sorted({i.primitive for i in result.islands}))
        warnings.warn(
            f"qcompiler leaves {len(result.islands)} operations in float ({kinds}; {share:.1%} of multiply-adds): "
            "print qmodel.report for the reasons and source lines, or pass strict=True to refuse",
            stacklevel=identity.user_stacklevel(),
        )
