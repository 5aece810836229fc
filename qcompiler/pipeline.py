"""The order of the passes, and the manager that runs, verifies, times and dumps each.

trace → simplify → fold_norms → (rotate) → equalize → (absorb_bias → migrate) → partition → observe
                                                                                             (float; `float_passes`)
      → assign_precision → (choose_ranges) → insert_qdq → (round_weights → correct_bias) → fuse → fold_zero_points
      → lower                                                                             (integers; `integer_passes`)

Those in parentheses run where the recipe asks for them; all but `rotate` decide on samples (`data_passes`).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler import ops, state
from qcompiler.backends import lax_int
from qcompiler.data_passes import DATA_PASSES as DATA_PASSES
from qcompiler.data_passes import Data as Data
from qcompiler.debug.dumps import Dumper
from qcompiler.debug.noise import simulation_noise
from qcompiler.debug.report import PassRecord, sqnr_db
from qcompiler.errors import QuantizationError, RecipeError, VerificationError
from qcompiler.ir import Program, _compat, loops, replay, serialize
from qcompiler.passes import (
    add_biases,
    assign_precision,
    equalize,
    fold_norms,
    fold_zero_points,
    fuse,
    insert_qdq,
    observe,
    partition,
    rotate,
    simplify,
)
from qcompiler.recipe import Recipe

#: Passes that a user can name, as functions of a program (and of a recipe where they need one).
PASSES: dict[str, Callable[..., Program]] = {
    "simplify": lambda program, recipe: loops.everywhere(simplify.simplify, program),
    "fold_norms": lambda program, recipe: loops.everywhere(fold_norms.fold_norms, program),
    "rotate": lambda program, recipe: loops.everywhere(rotate.rotate, program),
    "equalize": lambda program, recipe: loops.everywhere(
        lambda part: equalize.equalize(part, equalize.FAR_APART if recipe.equalizes == "far_apart" else 1.0), program
    ),
    "partition": lambda program, recipe: loops.everywhere(partition.partition, program),
    "observe": lambda program, recipe: loops.everywhere(observe.observe, program),
    "assign_precision": lambda program, recipe: assign_precision.assign_precision(
        observe.without_observers(program), recipe
    ),
    "insert_qdq": lambda program, recipe: loops.everywhere(
        lambda part: insert_qdq.insert_qdq(part, recipe.estimator_for), program
    ),
    "fuse": lambda program, recipe: fuse.fuse(program),
    "fold_zero_points": lambda program, recipe: loops.everywhere(fold_zero_points.fold_zero_points, program),
    "lower": lambda program, recipe: lax_int.lower(program),
}
FLOAT_PASSES = ("simplify", "fold_norms", "rotate", "equalize", "partition", "observe")
INTEGER_PASSES = ("assign_precision", "insert_qdq", "fuse", "fold_zero_points")

#: Least agreement in dB with the program before, for passes that must keep the function. The same float ops run op by
#: op after partitioning, also with biases of zeros, and after simplifying but for divisions by a repeated constant,
#: which XLA turns into products with its reciprocal; folding, rotating and equalizing round weights to float32 again
#: (2**-24 each, some 140 dB), of which the depth of a network and cancellation in it eat a part.
_KEEPS_DB = {
    "simplify": 100.0,
    "fold_norms": 80.0,
    "rotate": 80.0,
    "equalize": 80.0,
    "absorb_bias": 80.0,
    "migrate": 80.0,
    "partition": float("inf"),
    "add_biases": float("inf"),
}
#: Passes whose programs simulate the integers in float.
_SIMULATED = ("insert_qdq", "round_weights", "correct_bias")
VERIFY = ("probe", "types", "off")


class PassManager:
    """Runs passes on a program.

    Args:
      verify: `probe`: types, and the function on a probe batch; `types`: types only; `off`.
      probe: flat inputs of the program's own shapes, or None.
      dumper: where programs are written.
    """

    def __init__(self, verify: str = "probe", probe: Sequence[Any] | None = None, dumper: Dumper | None = None) -> None:
        if verify not in VERIFY:
            raise RecipeError(f"unknown verify={verify!r}; known: {', '.join(VERIFY)}")
        self.verify, self.probe, self.dumper = verify, probe, dumper or Dumper(None)
        self.records: list[PassRecord] = []
        self.reference: list[np.ndarray] = []
        self._before: list[np.ndarray] = []
        self.sqnr: float | None = None

    def start(self, program: Program, seconds: float) -> Program:
        """Records the traced program and runs it on the probe: what all later programs are compared with."""
        if self.verify == "probe" and self.probe is not None:
            self.reference = self._before = _outputs(program, self.probe)
        self.records.append(PassRecord("trace", seconds, f"{len(program.eqns)} equations"))
        self.dumper.after("trace", program, seconds=round(seconds, 3))
        return program

    def run(self, name: str, program: Program, apply: Callable[[Program], Program] | Recipe | None = None) -> Program:
        """The program after the pass `name`, verified.

        Args:
          name: a pass.
          program: the program before it.
          apply: the pass, or the recipe for the pass of that name.

        Raises:
          RecipeError: no pass of that name.
          VerificationError: the pass broke the program, or failed itself; names the reproducer it left.
        """
        if not callable(apply):
            if name not in PASSES:
                raise RecipeError(f"unknown pass {name!r}; known: {', '.join(PASSES)}")
            recipe = apply or Recipe()
            apply = lambda before: PASSES[name](before, recipe)
        start = time.perf_counter()
        try:
            after = apply(program)
            numbers = self._check(name, program, after)
        except VerificationError as error:
            raise VerificationError(f"{error}; {self._reproducer(name, program)}") from error
        except (QuantizationError, KeyboardInterrupt):
            raise
        except Exception as error:
            message = f"pass {name} failed: {type(error).__name__}: {error}; {self._reproducer(name, program)}"
            raise VerificationError(message) from error
        seconds = time.perf_counter() - start
        self.records.append(PassRecord(name, seconds, _what_changed(name, program, after)))
        self.dumper.after(name, after, seconds=round(seconds, 3), **numbers)
        return after

    def _check(self, name: str, before: Program, after: Program) -> dict[str, Any]:
        """Types, invariants, and for passes that must keep the function, the outputs on the probe batch."""
        if self.verify == "off":
            return {}
        try:
            _compat.check_types(after.jaxpr)
        except Exception as error:
            raise VerificationError(f"pass {name} made an ill-typed program: {error}") from error
        if after.notes.get("pairs_after"):
            raise VerificationError(f"pass {name} left {after.notes['pairs_after']} removable QDQ pairs")
        if self.probe is None or not self.reference or name not in (*_KEEPS_DB, *_SIMULATED):
            return {}
        outputs = _outputs(after, self.probe)
        for k, (out, was) in enumerate(zip(outputs, self._before, strict=True)):
            if np.isnan(out).any() and not np.isnan(was).any():
                raise VerificationError(f"pass {name} makes NaN in result {k}")
        if name in _KEEPS_DB:
            # A result of zeros has no signal, so that only equality is agreement.
            agreement = _agreement(self._before, outputs)
            if not agreement >= _KEEPS_DB[name] and not _equal(self._before, outputs):
                raise VerificationError(
                    f"pass {name} changed the function: {agreement:.1f} dB against the program before it on the probe "
                    f"batch, {_KEEPS_DB[name]} dB are required"
                )
        self._before = outputs
        return {"sqnr_db": _agreement(self.reference, outputs)}

    def check_integers(self, fused: Program, folded: Program) -> None:
        """Runs the integers region by region on the probe batch and compares each with its own simulation.

        The zero-point-folded region must have the accumulators of the unfolded one bit for bit, and its results must be
        within one least significant bit of evaluating its body. Notes the SQNR of the whole against float.

        Raises:
          VerificationError: a region disagrees; it is named.
        """
        if self.verify != "probe" or self.probe is None:
            return
        try:
            outputs = state.decoded(folded, _checked(fused, folded, state.coded(folded, self.probe)))
        except VerificationError as error:
            raise VerificationError(f"{error}; {self._reproducer('lower', folded)}") from error
        self.sqnr = _agreement(self.reference, outputs)

    def _reproducer(self, name: str, program: Program) -> str:
        """Leaves the program before a failed pass as a file, and says where."""
        folder = self.dumper.folder or Path(tempfile.mkdtemp(prefix="qcompiler-"))
        path = folder / f"before-{name}.qcprogram"
        try:
            serialize.save(program, path)
        except Exception as error:
            return f"no reproducer could be written ({error})"
        return f"reproducer: qcompiler.ir.serialize.load({os.fspath(path)!r}), then pass {name!r}"


def _checked(fused: Program, folded: Program, inputs: Sequence[Any]) -> list[Any]:
    """The results of the integers, every region and every body of a loop in its first step compared; see above."""
    unfolded = {e.params["id"]: e for e in fused.eqns if e.primitive is ops.region_p}
    unfolded_loops = {fused.ids[e.outvars[0]]: e for e in loops.loops_of(fused)}
    array, fused_array = ops.weights_of(folded), ops.weights_of(fused)

    def rule(eqn: _compat.JaxprEqn, values: list[Any]) -> list[Any] | None:
        if loops.is_loop(eqn):
            other = unfolded_loops[folded.ids[eqn.outvars[0]]]
            pairs = zip(loops.bodies(fused, other), loops.bodies(folded, eqn), strict=True)
            for k, (plain, body) in enumerate(pairs):
                first = loops.first_inputs(eqn, values, body, k)
                if first is not None:
                    _checked(plain.program, body.program, first)
            return None
        if eqn.primitive is not ops.region_p or eqn.params["id"] in folded.notes["float_regions"]:
            return None
        other = unfolded[eqn.params["id"]]
        weights = [array(v) for v in eqn.invars]
        refolded = other.params["body"] is not eqn.params["body"] and eqn.params["kind"] in ("dot", "conv")
        before = [fused_array(v) for v in other.invars] if refolded else []
        integers, off, same = _check_region(eqn, values, weights, other, before)
        if max(off, default=0) > 1:
            off = _beyond_noise(eqn, values, integers)
        if max(off, default=0) > 1:
            raise VerificationError(
                f"region {eqn.params['id']}: the integers are {max(off)} steps away from the simulation"
            )
        if not same:
            raise VerificationError(f"region {eqn.params['id']}: folding its zero points changed its integers")
        return integers

    return replay.evaluate(folded.jaxpr, [*folded.weights.values(), *inputs], rule, keep_source=False)


def _check_region(
    eqn: _compat.JaxprEqn, values: list[Any], weights: list[Any], other: _compat.JaxprEqn, before: list[Any]
) -> tuple[list[Any], list[int], bool]:
    """A region's integers, how far each is from its simulation, and whether unfolded it has the same accumulators.

    Args:
      eqn, values: the region and its operands.
      weights: per operand, its array if it is a weight, else None.
      other, before: the region before its zero points were folded, and its weights; empty if there is none.
    """

    def run(values: list[Any], before_values: list[Any]) -> Any:
        constant = lambda name, array: jnp.asarray(array)
        accumulators: list[Any] = []
        integers = lax_int.lower_region(eqn, values, weights, constant, accumulators.append)
        pairs = zip(integers, _compat.bind(eqn, values), strict=True)
        off = [jnp.max(jnp.abs(q.astype(jnp.int32) - s.astype(jnp.int32)), initial=0) for q, s in pairs]
        same = []
        if before:
            activations = iter(x for x, w in zip(values, weights, strict=True) if w is None)
            operands = [next(activations) if w is None else x for x, w in zip(before_values, before, strict=True)]
            again: list[Any] = []
            lax_int.lower_region(other, operands, before, constant, again.append)
            same = [jnp.array_equal(a, b) for a, b in zip(again, accumulators, strict=True)]
        return integers, off, same

    # Without optimization in a third of the time: integers do not depend on it. Simulations in half precision keep
    # their own roundings.
    options = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
    compiled = jax.jit(run, compiler_options=options)
    integers, off, same = compiled(values, [np.zeros(()) if w is None else w for w in before])
    return integers, [int(x) for x in off], all(map(bool, same))


def _beyond_noise(eqn: _compat.JaxprEqn, values: list[Any], integers: list[Any]) -> list[int]:
    """How far a region's integers are from its simulation, less what float32's rounding moves that by."""
    pairs = zip(integers, _compat.bind(eqn, values), simulation_noise(eqn, values), strict=True)
    return [int(np.max(np.abs(np.asarray(q, np.int64) - np.asarray(s, np.int64)) - n, initial=0)) for q, s, n in pairs]


def _outputs(program: Program, probe: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(y, np.float64) for y in program.evaluate(list(probe))]


def _agreement(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """SQNR in dB of the finite numbers; -inf where others (a mask's -inf, say) are not the same in the same places."""
    finite = [np.isfinite(a) & np.isfinite(b) for a, b in zip(before, after, strict=True)]
    rest = [(a[~f], b[~f]) for a, b, f in zip(before, after, finite, strict=True)]
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in rest):
        return float("-inf")
    return sqnr_db(*([x[f] for x, f in zip(xs, finite, strict=True)] for xs in (before, after)))


def _equal(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True))


def _what_changed(name: str, before: Program, after: Program) -> str:
    """The pass's effect in a few words."""
    notes = after.notes
    if name == "equalize":
        moved = [link for link in notes["equalized"]["links"] if link["largest_factor"] > 1]
        return f"{len(moved)} links"
    if name == "rotate":
        rotated = sum("matrix" in stream for stream in notes["rotated"].values())
        return f"{rotated} of {len(notes['rotated'])} streams"
    if name == "absorb_bias":
        return f"{len(notes['absorbed'])} biases"
    if name == "migrate":
        return f"{len(notes['migrated'])} places"
    if name == "partition":
        regions = sum(e.primitive is ops.region_p for e in after.eqns)
        return f"{regions} regions, {len(notes['islands'])} islands"
    if name == "observe":
        return f"{sum(e.primitive is ops.observe_p for e in after.eqns)} values observed"
    if name == "round_weights":
        left = f", {len(notes['left_nearest'])} left nearest" if notes["left_nearest"] else ""
        return _errors_before_and_after([(e["nearest"], e["rounded"]) for e in notes["rounded"].values()]) + left
    if name == "insert_qdq":
        scales = _errors_before_and_after([(e["largest"], e["chosen"]) for e in notes.get("scaled", {}).values()])
        chosen = f", scales chosen for {scales}" if "scaled" in notes else ""
        return f"{sum(e.primitive is ops.fake_quantize_p for e in after.eqns)} pairs{chosen}"
    if name == "correct_bias":
        return f"{len(notes['corrected'])} biases"
    if name == "fuse":
        return f"{notes['pairs_before']} pairs per op before, {notes['pairs_after']} left"
    if name == "choose_ranges":
        return f"{sum(map(len, notes['ranges'].values()))} ranges chosen"
    if name == "assign_precision":
        return f"{len(notes['types'])} regions typed"
    return f"{len(before.eqns)} -> {len(after.eqns)} equations"


def _errors_before_and_after(errors: Sequence[tuple[float, float]]) -> str:
    """Of layers, how many there are, and by what factor their squared error changed: the geometric mean."""
    factors = [after / before for before, after in errors if before > 0 and after > 0]
    mean = np.exp(np.mean(np.log(factors))) if factors else 1.0
    return f"{len(errors)} layers, squared error times {mean:.3g}"


def retracing_manager() -> PassManager:
    """For a model traced once more at other shapes: types are checked, but its dumps stand already."""
    return PassManager("types", dumper=Dumper(environment=False))


class _Row:
    """Runs passes one behind the other, each with those behind it that decide by data and that the recipe wants.

    Attributes:
      found: name of a pass -> the program after it.
    """

    def __init__(self, manager: PassManager, recipe: Recipe, data: Data | None, found: Mapping[str, Program]) -> None:
        self._manager, self._recipe, self._data = manager, recipe, data or Data()
        self._wanted = [p for p in DATA_PASSES if p.wanted(recipe)]
        self.found = dict(found)

    def run(self, name: str, program: Program) -> Program:
        """The program after a pass of the pipeline, as the recipe or a decision has it."""
        decided = next((p for p in self._wanted if p.name == name), None)
        apply = self._recipe if decided is None else decided.on(self._recipe, self._data, self.found)
        self.found[name] = self._manager.run(name, program, apply)
        return self.behind(name, self.found[name])

    def behind(self, name: str, program: Program) -> Program:
        """The program after the passes that follow the one of that name."""
        for data_pass in self._wanted:
            if data_pass.behind == name:
                apply = data_pass.on(self._recipe, self._data, self.found)
                program = self.found[data_pass.name] = self._manager.run(data_pass.name, program, apply)
        return program


def float_passes(manager: PassManager, program: Program, recipe: Recipe, data: Data | None = None) -> Program:
    """From the traced program to one with observers."""
    row = _Row(manager, recipe, data, {})
    wanted = {"rotate": recipe.rotate, "equalize": recipe.equalizes != "nowhere"}
    for name in FLOAT_PASSES:
        program = row.run(name, program) if wanted.get(name, True) else row.behind(name, program)
    return program


def integer_passes(
    manager: PassManager, program: Program, recipe: Recipe, data: Data | None = None
) -> dict[str, Program]:
    """From the calibrated program to the one that is ready to lower; pass name -> program after it."""
    if recipe.bias_correction is not None:
        program = manager.run("add_biases", program, add_biases.add_biases)
    row = _Row(manager, recipe, data, {"observe": program})
    for name in INTEGER_PASSES:
        program = row.run(name, program)
    manager.check_integers(row.found["fuse"], row.found["fold_zero_points"])
    del row.found["observe"]
    return row.found


def simulation(found: Mapping[str, Program]) -> Program:
    """Of the programs that `integer_passes` found, the last in float: what the integers are made from."""
    return next(found[name] for name in reversed(_SIMULATED) if name in found)
