"""Makes a failing program smaller while it fails in the same way.

    shrink(case, failure)              # -> (smaller case, what it raises)

Rounds of simpler programs, the largest cuts first: fewer results, a value in place of the steps that compute it, a step
replaced by what it reads, one sample, smaller arrays, plain options, plain numbers. The first that fails is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from qcompiler.debug.fuzz.cases import Case, Step, as_real
from qcompiler.debug.fuzz.checks import CheckFailed
from qcompiler.debug.fuzz.generator import run_step
from qcompiler.debug.fuzz.running import run_case

#: What options are without effect, by their names.
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "padding": lambda old: "VALID",
    "window_strides": lambda old: (1,) * len(old),
    "lhs_dilation": lambda old: (1,) * len(old),
    "rhs_dilation": lambda old: (1,) * len(old),
    "feature_group_count": lambda old: 1,
    "layout": lambda old: "last",
    "stride": lambda old: 1,
    "start": lambda old: 0,
    "window": lambda old: 2,
    "scale": lambda old: 1.0,
    "shift": lambda old: 0.0,
}


def shrink(case: Case, failure: CheckFailed, tries: int = 200) -> tuple[Case, CheckFailed]:
    """The smallest program found that breaks the same promise.

    Args:
      case: a failing program.
      failure: what it raised.
      tries: how many programs to run at most.
    """
    smaller = True
    while smaller:
        smaller = False
        for cuts in (_results, _inputs_for_values, _without_steps, _sizes, _options, _numbers):
            again = True
            while again:
                again = False
                for candidate in cuts(case):
                    if tries == 0:
                        return case, failure
                    tries -= 1
                    found = _fails(candidate, failure.promise)
                    if found is not None:
                        case, failure, smaller, again = candidate, found, True, True
                        break
    return case, failure


def _fails(case: Case, promise: str) -> CheckFailed | None:
    try:
        run_case(case)
    except CheckFailed as failure:
        return failure if failure.promise == promise else None
    return None


def trimmed(case: Case) -> Case:
    """The program without the steps and inputs that its results do not need."""
    first = len(case.inputs)
    needed = set(case.results)
    for k in reversed(range(len(case.steps))):
        if first + k in needed:
            needed.update(case.steps[k].reads)
    kept = [k for k in range(first + len(case.steps)) if k in needed]
    new = {old: k for k, old in enumerate(kept)}
    steps, weights = [], {}
    for k, step in enumerate(case.steps):
        if first + k in new:
            if str(k) in case.weights:
                weights[str(len(steps))] = case.weights[str(k)]
            steps.append(dataclasses.replace(step, reads=tuple(new[r] for r in step.reads)))
    inputs = [x for k, x in enumerate(case.inputs) if k in new]
    origin = case.origin if case.origin.startswith("shrunk from: ") else f"shrunk from: {case.origin}"
    changes = {"origin": origin, "steps": steps, "weights": weights, "inputs": inputs}
    return dataclasses.replace(case, results=[new[r] for r in case.results], **changes)


def values_of(case: Case) -> list[np.ndarray]:
    """All values of a program, computed in NumPy."""
    values = [as_real(x) for x in case.inputs]
    for k, step in enumerate(case.steps):
        values.append(run_step(step, [values[r] for r in step.reads], case.weights.get(str(k), {})))
    return values


def _results(case: Case) -> Iterator[Case]:
    """One result, any value; then one result less."""
    if len(case.steps) == 0:
        return
    for k in range(len(case.inputs), len(case.inputs) + len(case.steps)):
        if case.results != [k]:
            yield trimmed(dataclasses.replace(case, results=[k]))
    if len(case.results) > 1:
        for k in range(len(case.results)):
            yield trimmed(dataclasses.replace(case, results=case.results[:k] + case.results[k + 1 :]))


def _inputs_for_values(case: Case) -> Iterator[Case]:
    """The value of a step as an input, the last steps first."""
    values, first = values_of(case), len(case.inputs)
    for k in reversed(range(len(case.steps))):
        at = first + k
        if at in case.results:
            continue
        # The new input comes before all steps: what was value v is v + 1, but the value itself, which is the input.
        moved = lambda v, at=at: first if v == at else v if v < first else v + 1
        steps = [dataclasses.replace(s, reads=tuple(map(moved, s.reads))) for s in case.steps]
        changes = {"steps": steps, "inputs": [*case.inputs, values[at]], "results": [moved(r) for r in case.results]}
        smaller = trimmed(dataclasses.replace(case, **changes))
        if len(smaller.steps) < len(case.steps):
            yield smaller


def _without_steps(case: Case) -> Iterator[Case]:
    """A step's operand in place of its result; a sum of fewer operands."""
    first = len(case.inputs)
    for k in reversed(range(len(case.steps))):
        for operand in dict.fromkeys(case.steps[k].reads):
            moved = lambda v, at=first + k, operand=operand: operand if v == at else v
            steps = [dataclasses.replace(s, reads=tuple(map(moved, s.reads))) for s in case.steps]
            results = list(dict.fromkeys(map(moved, case.results)))
            if all(r >= first for r in results):
                yield trimmed(dataclasses.replace(case, steps=steps, results=results))
        reads = case.steps[k].reads
        if len(reads) > 2:
            for at in range(len(reads)):
                step = dataclasses.replace(case.steps[k], reads=reads[:at] + reads[at + 1 :])
                yield trimmed(_with_step(case, k, step))


def _with_step(case: Case, k: int, step: Step) -> Case:
    return dataclasses.replace(case, steps=[*case.steps[:k], step, *case.steps[k + 1 :]])


def _sizes(case: Case) -> Iterator[Case]:
    """Every axis of a size cut to the same smaller size, since equal sizes mostly belong together; then single axes."""
    arrays = [*case.inputs, *(w for held in case.weights.values() for w in held.values())]
    for size in sorted({n for a in arrays for n in a.shape if n > 1}, reverse=True):
        for smaller in sorted({1, size // 2, size - 1}):
            cut = lambda a, size=size, smaller=smaller: a[tuple(slice(smaller if n == size else n) for n in a.shape)]
            options = lambda o, size=size, smaller=smaller: _replaced(o, size, smaller)
            yield _with_arrays(case, [cut(x) for x in case.inputs], lambda k, n, w, cut=cut: cut(w), options)
    for k, x in enumerate(case.inputs):
        for axis, size in enumerate(x.shape):
            for smaller in sorted({1, size // 2, size - 1} - {0, size}):
                part = x[(slice(None),) * axis + (slice(smaller),)]
                yield _with_arrays(case, [*case.inputs[:k], part, *case.inputs[k + 1 :]], lambda k, n, w: w)
    for step, held in case.weights.items():
        axes = {(name, axis, size) for name, w in held.items() for axis, size in enumerate(w.shape) if size > 1}
        for name, axis, size in sorted(axes):
            for smaller in sorted({1, size // 2} - {size}):
                change = lambda k, n, w, step=step, name=name, axis=axis, smaller=smaller: (
                    w[(slice(None),) * axis + (slice(smaller),)] if (k, n) == (step, name) else w
                )
                yield _with_arrays(case, case.inputs, change)


def _replaced(options: dict[str, Any], size: int, smaller: int) -> dict[str, Any]:
    """Shapes and groups follow the sizes of the arrays."""
    number = lambda n: smaller if n == size else n
    return {
        k: tuple(map(number, v)) if k == "shape" else number(v) if k == "feature_group_count" and v > 1 else v
        for k, v in options.items()
    }


def _with_arrays(
    case: Case,
    inputs: Sequence[np.ndarray],
    change: Callable[[str, str, np.ndarray], np.ndarray],
    options: Callable[[dict[str, Any]], dict[str, Any]] = lambda options: options,
) -> Case:
    weights = {k: {n: change(k, n, w) for n, w in held.items()} for k, held in case.weights.items()}
    steps = [dataclasses.replace(s, options=options(s.options)) for s in case.steps]
    return trimmed(dataclasses.replace(case, inputs=list(inputs), weights=weights, steps=steps))


def _options(case: Case) -> Iterator[Case]:
    """Options without effect; no bias; the default recipe; a quick check."""
    if case.thorough:
        yield trimmed(dataclasses.replace(case, thorough=False))
    if case.recipe != "default":
        yield trimmed(dataclasses.replace(case, recipe="default"))
    for k, step in enumerate(case.steps):
        for name, old in step.options.items():
            plain = _PLAIN[name](old) if name in _PLAIN else old
            if plain != old:
                yield trimmed(_with_step(case, k, dataclasses.replace(step, options={**step.options, name: plain})))
        if "bias" in case.weights.get(str(k), {}):
            weights = {**case.weights, str(k): {"kernel": case.weights[str(k)]["kernel"]}}
            yield trimmed(dataclasses.replace(case, weights=weights))


def _numbers(case: Case) -> Iterator[Case]:
    """Ones, zeros, or few digits in place of the numbers of one array."""
    for k, x in enumerate(case.inputs):
        for plain in _plainer(x):
            yield _with_arrays(case, [*case.inputs[:k], plain, *case.inputs[k + 1 :]], lambda k, n, w: w)
    for step, held in case.weights.items():
        for name, w in held.items():
            for plain in _plainer(w):
                change = lambda k, n, old, step=step, name=name, plain=plain: plain if (k, n) == (step, name) else old
                yield _with_arrays(case, case.inputs, change)


def _plainer(x: np.ndarray) -> Iterable[np.ndarray]:
    if x.dtype.kind != "f":
        return []
    with np.errstate(divide="ignore"):
        unit = 10.0 ** np.floor(np.log10(np.where(x == 0, 1, np.abs(x))))
    candidates = [np.ones_like(x), np.zeros_like(x), (np.rint(x / unit) * unit).astype(x.dtype)]
    # What is plain already is not made otherwise, so that no two forms follow each other for ever.
    simple = next((k for k, c in enumerate(candidates) if np.array_equal(x, c)), len(candidates))
    return candidates[:simple]
