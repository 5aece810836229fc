"""The stages of a compilation, as those of `jax.jit(f).trace(...).lower().compile()`: each prints, and can be kept.

Traced -- calibrate --> Calibrated -- quantize --> Quantized -- compile --> QuantizedModel
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import itertools
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import ops, pipeline, sampler, sensitivity
from qcompiler import recipe as recipes
from qcompiler.backends import lax_int
from qcompiler.calls import batches_of, call, check_choice, check_data, first_of, flatten, is_empty, retrace
from qcompiler.debug import census, report
from qcompiler.debug.dumps import Dumper
from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import CalibrationError, IslandError, RecipeError, VerificationError
from qcompiler.flax_adapter import Source
from qcompiler.ir import Program, _compat, classes, identity, tracing
from qcompiler.passes import assign_precision, observe
from qcompiler.passes.observe import observed_ids
from qcompiler.precision.assignment import Assignment
from qcompiler.quantized_model import QuantizedModel
from qcompiler.samples import KEPT_BYTES, Samples, size_of
from qcompiler.sensitivity_table import Sensitivity


def start(
    source: Source,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    recipe: recipes.Recipe,
    verify: str,
    dumper: Dumper,
) -> Traced:
    """The first stage: the model captured for inputs like `args` and `kwargs`."""
    manager = pipeline.PassManager(verify, dumper=dumper)
    begin = time.perf_counter()
    program = _with_bytes(source.trace(args, kwargs))
    return Traced(source, recipe, manager, program, time.perf_counter() - begin)


def _with_bytes(program: Program) -> Program:
    return program.note("float_weight_bytes", report.weight_bytes(program.weights.values()))


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
        return report_of(self.program, self._manager)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.program!r}>"

    def __str__(self) -> str:
        return self.program.text()


def report_of(program: Program, manager: pipeline.PassManager) -> report.Report:
    """What is known of a program at its stage."""
    integer_ops, float_ops = report.count_ops(program)
    islands = report.islands_of(program)
    folder = manager.dumper.folder
    decided = "types" in program.notes
    return report.Report(
        islands=islands,
        integer_mac_share=1.0 - sum(i.mac_share for i in islands) if decided else None,
        qdq_pairs_before=program.notes.get("pairs_before", 0),
        qdq_pairs_after=program.notes.get("pairs_after", 0),
        integer_ops=integer_ops,
        float_ops=float_ops,
        weight_bytes=report.weight_bytes(program.weights.values()),
        float_weight_bytes=program.notes.get("float_weight_bytes", 0),
        sqnr_db=manager.sqnr,
        rules=report.rules_of(program),
        supergroups=report.supergroups_of(program),
        unfollowed=report.unfollowed_of(program.notes),
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
        items = batches_of(batches, self._source)
        return self._calibrate(*first_of(items), items)

    def representative(self, pool: Iterable[Any], count: int, *, edges: float = 0.25) -> sampler.Selection:
        """The samples of a pool to calibrate on; see `sampler`.

        Args:
          pool: batches, as `calibrate` takes them; leading dimensions count samples.
          count: how many samples to choose; all of a pool that is no larger.
          edges: share of them that is chosen to cover the ranges of values, 0 to 1; the others stand for the bulk.

        Raises:
          CalibrationError: bad batches, as `calibrate` says, or a pool without samples, or with too many.
        """
        observed: dict[Any, Any] = {}

        def items() -> Iterator[tuple[int, call, list[Any]]]:
            for number, item, flat in _checked(batches_of(pool, self._source), self.program):
                if not is_empty(item):
                    key = tuple(np.shape(x) for x in flat)
                    if key not in observed:
                        observed[key] = observe.reader(self._specialize(item, number, pipeline.Data()))
                    yield number, item, flat

        return sampler.select(items(), lambda flat: observed[tuple(np.shape(x) for x in flat)](flat), count, edges)

    def _calibrate(self, begin: int, first: call, rest: Iterable[call]) -> Calibrated:
        what = f"calibration batch {begin}"
        flat = flatten(first, self.program, what)
        if any(a.shape != b.shape for a, b in zip(map(tracing.abstract, flat), self.program.input_avals, strict=True)):
            program = _with_bytes(retrace(self._source, first, CalibrationError, what))
            traced = Traced(self._source, self._recipe, self._manager, program, self._seconds)
            return traced._calibrate(begin, first, rest)
        batches = _checked(_chain(first, rest), self.program, begin)
        ahead, samples = _read_ahead(batches)
        data = pipeline.Data(samples)
        manager = _branched(self._manager)
        manager.probe = flat
        program = manager.start(self.program, self._seconds)
        observed = pipeline.float_passes(manager, program, self._recipe, data)
        input_types = assign_precision.input_types(observed, self._recipe)
        collector = observe.Collector(observed, input_types, self._recipe.estimator_for)
        readers: dict[Any, Any] = {}
        start = time.perf_counter()
        with contextlib.closing(ProgressBar("calibrate")) as bar:
            for number, item, flat in itertools.chain(ahead, batches):
                if is_empty(item):
                    continue
                key = tuple(np.shape(x) for x in flat)
                if key not in readers:
                    shapes = tuple(a.shape for a in observed.input_avals)
                    same = observed if key == shapes else self._specialize(item, number, data)
                    if observed_ids(same) != observed_ids(observed):
                        raise CalibrationError(
                            f"calibration batch {number} traces to other operations than batch {begin}: {key}, {shapes}"
                        )
                    readers[key] = observe.reader(same, results=True)
                collector.add(readers[key], flat, number)
                bar.update(number + 1)
        calibrated = observed.replace(stats=collector.stats)
        manager.records.append(report.PassRecord("calibrate", time.perf_counter() - start, f"{number + 1} batches"))
        _warn_of_zeros(calibrated)
        return Calibrated(self._source, self._recipe, manager, calibrated, data)

    def _specialize(self, item: call, number: int, data: pipeline.Data) -> Program:
        """The observed program at another batch size."""
        program = retrace(self._source, item, CalibrationError, f"calibration batch {number}")
        return pipeline.float_passes(pipeline.retracing_manager(), program, self._recipe, data)


#: Number of a batch, the batch, and its flat inputs.
_Batch = tuple[int, call, list[Any]]


def _checked(items: Iterable[call], program: Program, begin: int = 0) -> Iterator[_Batch]:
    """Each batch with its flat inputs, whose structure and, if it has elements, numbers have been checked."""
    for number, item in enumerate(items, begin):
        flat = flatten(item, program, f"calibration batch {number}")
        if not is_empty(item):
            check_data(flat, program, number)
        yield number, item, flat


def _read_ahead(batches: Iterator[_Batch]) -> tuple[list[_Batch], Samples]:
    """The first batches, and the flat inputs of those that are kept; `batches` goes on behind them."""
    ahead: list[_Batch] = []
    kept: list[list[Any]] = []
    room = KEPT_BYTES
    for batch in batches:
        ahead.append(batch)
        _, item, flat = batch
        if not is_empty(item):
            room -= size_of(flat)
            if room < 0 and kept:
                break
            kept.append(flat)
    return ahead, Samples(tuple(kept))


def _warn_of_zeros(program: Program) -> None:
    """An input of zeros alone says nothing about its range; the model saturates when it gets other numbers."""
    for name in program.signature.input_names:
        stats = program.stats.get(f"input:{name}")
        if stats is not None and stats.count and stats.zeros == stats.count:
            warnings.warn(
                f"calibration saw nothing but zeros in input {name}, so its range is unknown and other numbers will "
                "saturate: calibrate on data that the model will see",
                stacklevel=identity.user_stacklevel(),
            )


def _chain(first: call, rest: Iterable[call]) -> Iterator[call]:
    yield first
    yield from rest


class Calibrated(_Stage):
    """A model whose ranges are known."""

    def __init__(
        self,
        source: Source,
        recipe: recipes.Recipe,
        manager: pipeline.PassManager,
        program: Program,
        data: pipeline.Data,
    ) -> None:
        self._source, self._recipe, self._manager, self._data = source, recipe, manager, data
        self.program = program

    def quantize(
        self, recipe: recipes.Recipe | str | None = None, *, strict: bool | Sequence[str] = False
    ) -> Quantized:
        """Assigns types, inserts QDQ pairs, and fuses them away.

        Args:
          recipe: in place of the one given to `trace`; it must agree with it on rotation, equalization and
            migration, which came before.
          strict: refuse a model of which anything stays float; globs of primitives and module paths that may.

        Raises:
          IslandError: strict, and there are islands that no glob allows.
          RecipeError: `strict` is no truth value and no globs.
        """
        chosen = self._recipe if recipe is None else recipes.named(recipe)
        differing = _decided_before_calibration(self._recipe, chosen)
        if differing:
            raise RecipeError(
                f"this recipe differs in {', '.join(differing)} from the one of qc.trace, which has taken effect "
                "before calibration: pass this recipe to qc.trace instead"
            )
        allowed = _globs(strict)
        if allowed is not None:
            _refuse_islands(self.program, allowed)
        manager = _branched(self._manager)
        data = self._data.branch()
        programs = pipeline.integer_passes(manager, self.program, chosen, data)
        if allowed is not None:
            _refuse_islands(programs["fold_zero_points"], allowed)
        _warn_of_disagreement(programs["fold_zero_points"])
        # Everything is decided: a model that is served does not hold its calibration data.
        decided = pipeline.Data(decisions=data.decisions)
        return Quantized(self._source, chosen, manager, self.program, programs, decided)

    def sensitivity(self, samples: Iterable[Any] | int | None = None, **options: Any) -> Sensitivity:
        """What each layer loses by each way of storing its operands; rules of the recipe do not count.

        Args:
          samples: batches to use in place of those of the calibration, or how many of these; None: of 32 samples.
          **options: `candidates`, `metric`, `mode`, `loss`, `draws`, `seed`; see `sensitivity.analyze`.
        """
        kept = self._data.samples
        if samples is None or isinstance(samples, int):
            count = samples
        else:
            flat = [batch for _, _, batch in _checked(batches_of(samples, self._source), self.program)]
            kept, count = Samples(tuple(flat)), max(1, len(flat))
        return sensitivity.analyze(self.program, kept, self._recipe, batches=count, **options)


def _warn_of_disagreement(program: Program) -> None:
    """Says what of a recipe's encodings and supergroups the program does not have."""
    lines = list(report.unfollowed_of(program.notes))
    for group in report.supergroups_of(program):
        wanted = "one op" if group.fuse else "ops apart"
        lines += [
            f"the supergroup {', '.join(group.ops)}, which is not {wanted} in {where}" for where in group.disagree
        ]
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        warnings.warn(f"not followed of the recipe:\n{listed}", stacklevel=identity.user_stacklevel())


def _globs(strict: bool | Sequence[str]) -> Sequence[str] | None:
    """What strict mode allows to stay float; None where it is off."""
    if isinstance(strict, bool):
        return () if strict else None
    if isinstance(strict, str) or not all(isinstance(glob, str) for glob in strict):
        raise RecipeError(f"strict is True, False, or a list of globs of what may stay float, got {strict!r}")
    return strict


def _decided_before_calibration(one: recipes.Recipe, other: recipes.Recipe) -> list[str]:
    """The fields of `qc.Recipe` that decide on passes in front of calibration, as far as the recipes differ in them."""
    decide = {"rotate": lambda r: r.rotate, "equalize": lambda r: r.equalizes, "migrate": lambda r: r.migrates}
    return [field for field, of in decide.items() if of(one) != of(other)]


def _refuse_islands(program: Program, allowed: Sequence[str]) -> None:
    matches = lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in allowed)
    islands = [i for i in report.islands_of(program) if not (matches(i.primitive) or matches(i.module_path))]
    if islands:
        lines = [f"  {i.primitive} in {i.module_path or '<top level>'} at {i.source}: {i.reason}" for i in islands]
        listed = "\n".join(lines)
        raise IslandError(f"strict mode: {len(islands)} operations would stay float:\n{listed}")


def _refuse_uncoded(program: Program) -> None:
    """Raises `RecipeError` for real inputs and results that are not quantized, though nothing is an island."""
    codes = lax_int.input_codes(program)
    for name, var in zip(program.signature.input_names, program.input_vars, strict=True):
        if classes.is_float(var) and var not in codes:
            why = "a result, too" if var in program.outvars else "read by nothing"
            raise RecipeError(f'io="int": input {name} is {why}, so that it has no codes; drop it, or use io="float"')
    for k, var in enumerate(program.outvars):
        made = None if isinstance(var, _compat.Literal) else program.producer.get(var)
        if classes.is_float(var) and (made is None or made.primitive is not ops.dequantize_p):
            raise RecipeError(
                f'io="int": result {k} is a constant, so that it has no codes; drop it, or use io="float"'
            )


class Quantized(_Stage):
    """A model in integers, not lowered yet. `program` is the one after the last pass, `programs` those on the way."""

    def __init__(
        self,
        source: Source,
        recipe: recipes.Recipe,
        manager: pipeline.PassManager,
        calibrated: Program,
        programs: dict[str, Program],
        data: pipeline.Data,
    ) -> None:
        self._source, self._recipe, self._manager, self._calibrated = source, recipe, manager, calibrated
        self._data = data
        self.programs = programs
        self.program = programs["fold_zero_points"]

    @property
    def precision(self) -> Assignment | None:
        """The types that were decided by data, a recipe's `precision`; None where there is none."""
        return self._data.decisions.get("assign_precision")

    @property
    def report(self) -> report.Report:
        """Numbers so far; see `debug.report.Report`."""
        return dataclasses.replace(super().report, precision=self.precision)

    def compile(self, io: str = "float", weights: str | None = None) -> QuantizedModel:
        """Lowers to `jax.lax` integers; see `quantize` for the arguments.

        Raises:
          RecipeError: an option is unknown, or `io="int"` with an input or a result that has no codes.
        """
        check_choice("io", io, ("float", "int"))
        check_choice("weights", weights, (None, "constant", "argument"))
        manager = _branched(self._manager)
        if io == "int" and not report.islands_of(self.program):
            _refuse_uncoded(self.program)
        lowered = manager.run("lower", self.program, lambda p: lax_int.lower(p, io))
        if io == "int" and not report.islands_of(lowered) and (found := census.float_avals(lowered)):
            raise VerificationError(f"the integer program holds {len(found)} float values, such as {found[0].aval}")
        return QuantizedModel(
            self, lowered, io, weights, dataclasses.replace(report_of(lowered, manager), precision=self.precision)
        )
