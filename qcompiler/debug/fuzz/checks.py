"""What the numeric contract promises of a compiled function, checked on one batch of inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.debug import reference
from qcompiler.debug.fuzz.stages import Stages
from qcompiler.debug.noise import simulation_noise, soft_noise
from qcompiler.debug.report import islands_of
from qcompiler.ir import _compat, replay
from qcompiler.ir.program import Program

#: XLA compiles in half of the time so; the integers do not depend on it.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


class CheckFailed(AssertionError):
    """A promise is broken.

    Attributes:
      promise: which, in words that do not depend on the program.
    """

    def __init__(self, promise: str, details: str) -> None:
        super().__init__(f"{promise}: {details}")
        self.promise = promise


@dataclasses.dataclass
class Findings:
    """What `check` measured where it found nothing wrong.

    Attributes:
      codes: the results, as codes.
      regions: number of regions.
      elements, off_by_one: of all regions together: result elements, and those one step away from the simulation.
      worst: region id -> largest distance from the simulation, in steps.
    """

    codes: list[np.ndarray]
    regions: int = 0
    elements: int = 0
    off_by_one: int = 0
    worst: dict[str, int] = dataclasses.field(default_factory=dict)


def check(stages: Stages, inputs: Sequence[Any], thorough: bool = True) -> Findings:
    """Raises `CheckFailed` unless everything holds that the numeric contract promises.

    - No equation stayed float, and no result is NaN.
    - Every equation of the folded program, lowered and jitted as one program, gives the integers of the reference on
      the same operands: entries, regions, changes of type, exits.
    - Every region is within one step of its own body in float32.
    - Every accumulator and result of a region's body is that of the fused program's.
    - If `thorough`, moreover: the integer program as users get it, fully optimized, gives the integers of the
      reference, and the bodies once more as JAX computes them instead of NumPy.

    Args:
      stages: of `compile_stages`.
      inputs: flat float inputs.
      thorough: see above; compiles thrice as much.
    """
    islands = islands_of(stages.folded)
    if islands:
        raise CheckFailed("an equation stays float", f"{[(i.primitive, i.reason) for i in islands]}")
    weights, watched = list(stages.watched.weights.values()), stages.watched.jaxpr
    lowered = jax.jit(
        lambda weights, inputs: jax.core.eval_jaxpr(_compat.open_jaxpr(watched), [], *weights, *inputs),
        compiler_options=FAST_COMPILE,
    )
    results = [np.asarray(r) for r in lowered(weights, list(inputs))]
    values = _check_equations(stages.folded, inputs, results)
    regions = [_region_operands(p, inputs, results) for p in (stages.folded, stages.fused)]
    findings = Findings(_result_codes(stages.folded, values))
    simulations = [[reference.simulate(eqn, operands) for eqn, operands, _ in found] for found in regions]
    _check_simulations(regions[0], *simulations, findings)
    if thorough:
        codes = reference.input_codes(stages.folded, inputs)
        wide = any(map(_holds_wide, stages.folded.eqns))
        expected = findings.codes if wide else reference.evaluate(stages.folded, codes, io="int")
        got = [np.asarray(r) for r in jax.jit(stages.lowered)(*codes)]
        assert_same(got, expected, "the integer program against the reference")
        findings.codes = expected
        _check_simulations(regions[0], *map(_simulate_by_jax, regions), Findings([]))
    return findings


def _check_equations(program: Program, inputs: Sequence[Any], results: Sequence[np.ndarray]) -> dict[Any, Any]:
    """Every equation against the reference on the operands that the lowered program had; variable -> value."""
    env, remaining = _arguments(program, inputs), iter(results)
    for eqn in program.eqns:
        operands = [_read(env, v) for v in eqn.invars]
        got = [next(remaining) for _ in eqn.outvars]
        expected = reference.equation(eqn, operands)
        name = eqn.primitive.name
        if name == "qc_region" and eqn.params["kind"] == "wide":
            _assert_near(got, expected, eqn, operands)
        elif name == "qc_region":
            assert_same(got, expected, f"a {eqn.params['kind']} region against the reference", eqn.params["id"])
        elif not _holds_wide(eqn):
            assert_same(got, expected, f"{name} against the reference")
        if name == "qc_dequantize" and not all(np.isfinite(g).all() for g in got):
            raise CheckFailed("a result is NaN or infinite", program.ids[eqn.outvars[0]])
        env.update(zip(eqn.outvars, got, strict=True))
    return env


def _holds_wide(eqn: Any) -> bool:
    """Whether it is a wide region, or a loop with one, whose next step goes on from what may be one step off."""
    inside = [e for sub in _compat.sub_jaxprs(eqn) for e in _compat.open_jaxpr(sub).eqns]
    return eqn.params.get("kind") == "wide" or ("kind" not in eqn.params and any(map(_holds_wide, inside)))


def _region_operands(
    program: Program, inputs: Sequence[Any], results: Sequence[np.ndarray]
) -> list[tuple[Any, list[np.ndarray], list[np.ndarray]]]:
    """(region, operands, lowered results) of every region of a program with the equations of the folded one."""
    env, remaining, found = _arguments(program, inputs), iter(results), []
    for eqn in program.eqns:
        got = [next(remaining) for _ in eqn.outvars]
        if eqn.primitive.name == "qc_region":
            found.append((eqn, [_read(env, v) for v in eqn.invars], got))
        env.update(zip(eqn.outvars, got, strict=True))
    return found


def _check_simulations(regions: list[Any], folded: list[Any], fused: list[Any], findings: Findings) -> None:
    """The distance of lowered regions from their bodies, and of those from the bodies before folding zero points."""
    for (eqn, operands, lowered), (simulated, accumulators), (before, accumulators_before) in zip(
        regions, folded, fused, strict=True
    ):
        name, kind = eqn.params["id"], eqn.params["kind"]
        assert_same(accumulators, accumulators_before, f"accumulators of a {kind} region, folded against fused", name)
        assert_same(simulated, before, f"the body of a {kind} region, folded against fused", name)
        findings.regions += 1
        distances = [
            np.abs(codes.astype(np.int64) - np.asarray(near).astype(np.int64))
            for codes, near in zip(lowered, simulated, strict=True)
        ]
        if any(off.max(initial=0) > 1 for off in distances):
            noise = simulation_noise(eqn, operands)
            distances = [np.maximum(off - n, np.minimum(off, 1)) for off, n in zip(distances, noise, strict=True)]
        for off in distances:
            findings.elements += off.size
            findings.off_by_one += int(np.count_nonzero(off))
            findings.worst[name] = max(findings.worst.get(name, 0), int(off.max(initial=0)))
        if findings.worst[name] > 1:
            raise CheckFailed(f"a {kind} region against its simulation", f"{findings.worst[name]} steps off in {name}")


def _simulate_by_jax(regions: list[Any]) -> list[Any]:
    """`reference.simulate` of every region, by one jitted program."""

    def run(operands: list[list[Any]]) -> list[Any]:
        found = []
        for (eqn, _, _), values in zip(regions, operands, strict=True):
            accumulators: list[Any] = []

            def watch(inner: Any, xs: list[Any], accumulators: list[Any] = accumulators) -> None:
                if inner.primitive.name == "qc_dequantize" and inner.params["type"].bits == 32:
                    accumulators.append(xs[0])

            found.append((replay.evaluate(eqn.params["body"], values, watch, keep_source=False), accumulators))
        return found

    return jax.device_get(jax.jit(run, compiler_options=FAST_COMPILE)([operands for _, operands, _ in regions]))


def _arguments(program: Program, inputs: Sequence[Any]) -> dict[Any, Any]:
    return dict(zip(program.invars, [np.asarray(x) for x in (*program.weights.values(), *inputs)], strict=True))


def _read(env: dict[Any, Any], atom: Any) -> Any:
    return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, _compat.Literal) else env[atom]


def _result_codes(program: Program, env: dict[Any, Any]) -> list[np.ndarray]:
    """The results in codes, where they are dequantized last."""

    def of(var: Any) -> Iterator[np.ndarray]:
        eqn = program.producer.get(var) if isinstance(var, _compat.Var) else None
        yield _read(env, eqn.invars[0] if eqn is not None and eqn.primitive.name == "qc_dequantize" else var)

    return [code for var in program.outvars for code in of(var)]


def _assert_near(got: Sequence[Any], expected: Sequence[Any], eqn: Any, operands: Sequence[Any]) -> None:
    """Raises `CheckFailed` unless codes are within one step and truth values equal, as far as 30 bits can tell."""
    distances = [np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)) for a, b in zip(got, expected, strict=True)]
    most = [int(np.asarray(a).dtype.kind != "b") for a in got]
    if any(np.max(off, initial=0) > m for off, m in zip(distances, most, strict=True)):
        noise = soft_noise(eqn, operands)
        most = [m + n for m, n in zip(most, noise, strict=True)]
    for off, m in zip(distances, most, strict=True):
        if np.any(off > m):
            raise CheckFailed("a wide region against float64", f"{off.max()} steps off in {eqn.params['id']}")


def assert_same(got: Sequence[Any], expected: Sequence[Any], promise: str, where: str = "") -> None:
    """Raises `CheckFailed` unless the arrays are equal in shape, dtype and every bit."""
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        what = f"{where}, result {k}" if where else f"result {k}"
        if a.shape != b.shape or a.dtype != b.dtype:
            raise CheckFailed(promise, f"{what} is {a.dtype}{a.shape}, not {b.dtype}{b.shape}")
        if a.tobytes() != b.tobytes():
            bad = np.argwhere(a != b)
            first = tuple(int(n) for n in bad[0]) if len(bad) else ()
            raise CheckFailed(
                promise,
                f"{what} differs in {len(bad)} of {a.size} elements, first at {first}: {a[first]} instead of "
                f"{b[first]}",
            )
