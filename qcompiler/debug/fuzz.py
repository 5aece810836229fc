"""Random programs through the whole compiler, their integers checked against the reference.

    python -m qcompiler.debug.fuzz --count 200 --seed 0

A program is a list of steps drawn from a seed, printed as text when a check fails together with the command that makes
it again. The checks are `check`'s, which serves for any function.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler import ops
from qcompiler.backends import lax_int
from qcompiler.debug import reference
from qcompiler.errors import OverflowProofError
from qcompiler.ir import replay, tracing
from qcompiler.ir.program import Program
from qcompiler.numerics.types import QuantType
from qcompiler.passes.assign_precision import assign_precision
from qcompiler.passes.fold_norms import fold_norms
from qcompiler.passes.fold_zero_points import fold_zero_points
from qcompiler.passes.fuse import fuse
from qcompiler.passes.insert_qdq import insert_qdq
from qcompiler.passes.observe import collect, observe, without_observers
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify
from qcompiler.recipe import Recipe, named


@dataclasses.dataclass(frozen=True)
class Stages:
    """One function at the stages that the checks compare."""

    float: Program
    fused: Program
    folded: Program
    lowered: Program


def compile_stages(
    fun: Callable[..., Any], weights: Any, inputs: Sequence[Any], recipe: Recipe | None = None, stats: Any = None
) -> Stages:
    """Compiles `fun(weights, *inputs)`, calibrated on these inputs (or with `stats`), down to `io="int"` integers."""
    recipe = recipe or Recipe()
    names = tuple(f"x{k}" for k in range(len(inputs)))
    traced = fold_norms(simplify(tracing.trace(fun, weights, tuple(inputs), parameter_names=names)))
    program = partition(traced)
    program = collect(observe(program), [list(inputs)]) if stats is None else program.replace(stats=stats)
    program = assign_precision(without_observers(program), recipe)
    fused = fuse(insert_qdq(program, recipe.estimator_for))
    folded = fold_zero_points(fused)
    return Stages(traced, fused, folded, lax_int.lower(folded, io="int"))


@dataclasses.dataclass
class Findings:
    """What `check` measured where it found nothing wrong.

    Attributes:
      codes: the results, as codes.
      elements, off_by_one: of all regions together: result elements, and those one step away from the simulation.
      worst: region id -> largest distance from the simulation, in steps.
    """

    codes: list[np.ndarray]
    elements: int = 0
    off_by_one: int = 0
    worst: dict[str, int] = dataclasses.field(default_factory=dict)


def check(stages: Stages, inputs: Sequence[Any]) -> Findings:
    """Raises AssertionError unless everything holds that the numeric contract promises.

    - No equation stayed float, and no result is NaN.
    - The lowered program, jitted, gives the integers of the reference.
    - Every lowered region gives those of the reference on the same operands, within one step of the region's own body.
    - Every accumulator and result of a region of the folded program is that of the fused one.

    Args:
      stages: of `compile_stages`.
      inputs: flat float inputs.
    """
    islands = stages.folded.notes["islands"]
    assert not islands, f"islands: {[(i['id'], i['reason']) for i in islands]}"
    codes = reference.input_codes(stages.folded, inputs)
    expected = reference.evaluate(stages.folded, codes, io="int")
    got = [np.asarray(r) for r in jax.jit(stages.lowered)(*codes)]
    assert_same(got, expected, "jitted integers against the reference")
    findings = Findings(expected)
    results, runs = run_regions(stages, inputs)
    for run in runs:
        name = run.eqn.params["id"]
        what = f"region {name} ({run.eqn.params['kind']})"
        assert_same(run.lowered, reference.region(run.eqn, run.operands), f"{what} against the reference")
        assert_same(run.accumulators, run.unfolded_accumulators, f"accumulators of {what}, folded against fused")
        assert_same(run.simulated, run.unfolded, f"{what}, folded against fused")
        for lowered, simulated in zip(run.lowered, run.simulated, strict=True):
            off = np.abs(lowered.astype(np.int64) - simulated.astype(np.int64))
            findings.elements += off.size
            findings.off_by_one += int(np.count_nonzero(off))
            findings.worst[name] = max(findings.worst.get(name, 0), int(off.max(initial=0)))
        assert findings.worst[name] <= 1, f"{what} is {findings.worst[name]} steps away from its simulation"
    reals = reference.evaluate(stages.folded, inputs)
    assert all(np.isfinite(r).all() for r in reals), "a result is NaN or infinite"
    assert_same(results, reals, "the exit against the reference")
    return findings


def assert_same(got: Sequence[Any], expected: Sequence[Any], what: str) -> None:
    """Raises AssertionError unless the arrays are equal in shape, dtype and every bit."""
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype, (
            f"{what}: result {k} is {a.dtype}{a.shape}, not {b.dtype}{b.shape}"
        )
        if a.tobytes() != b.tobytes():
            bad = np.argwhere(a != b)
            first = tuple(bad[0]) if len(bad) else ()
            raise AssertionError(
                f"{what}: result {k} differs in {len(bad)} of {a.size} elements, first at {first}: "
                f"{a[first]} instead of {b[first]}"
            )


@dataclasses.dataclass
class RegionRun:
    """What one region of the folded program did.

    Attributes:
      eqn: the region.
      operands: what it read, weights and codes.
      lowered: the backend's integers, which the rest of the program went on with.
      simulated: its body's.
      accumulators: int32 values that its body turned into reals.
      unfolded, unfolded_accumulators: the results and accumulators of the fused program's body.
    """

    eqn: Any
    operands: list[Any]
    lowered: list[Any]
    simulated: list[Any]
    accumulators: list[Any]
    unfolded: list[Any]
    unfolded_accumulators: list[Any]


def run_regions(stages: Stages, inputs: Sequence[Any], jit: bool = True) -> tuple[list[Any], list[RegionRun]]:
    """The folded program's float results with every region lowered on its own, and what each did; one compilation."""
    eqns = [e for e in stages.folded.eqns if e.primitive is ops.region_p]

    def run(folded_weights: list[Any], fused_weights: list[Any], inputs: list[Any]) -> Any:
        traced: list[Any] = []
        results = _replay(stages.folded, folded_weights, inputs, traced, None)
        unfolded: list[Any] = []
        _replay(stages.fused, fused_weights, inputs, unfolded, [t[1] for t in traced])
        return results, [(*t, *u[2:]) for t, u in zip(traced, unfolded, strict=True)]

    args = [list(p.weights.values()) for p in (stages.folded, stages.fused)]
    # Compiled without optimization, in a third of the time; integers do not depend on it.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0}) if jit else run
    results, traced = jax.device_get(run(*args, list(inputs)))
    return results, [RegionRun(eqn, *t) for eqn, t in zip(eqns, traced, strict=True)]


def _replay(program: Program, weights: list[Any], inputs: list[Any], seen: list[Any], instead: Any) -> list[Any]:
    """Evaluates a program, noting of each region (operands, results, those of its body, accumulators).

    A region's results are the lowered ones, or its entry in `instead`.
    """
    weight_of = program.weight_of

    def rule(eqn: Any, values: list[Any]) -> list[Any] | None:
        if eqn.primitive is ops.requantize_p:
            return [lax_int.lower_requantize(program, eqn, values)]
        if eqn.primitive is not ops.region_p:
            return None
        held = [program.weights.get(weight_of.get(v)) for v in eqn.invars]
        accumulators: list[Any] = []

        def watch(inner: Any, xs: list[Any]) -> None:
            if inner.primitive is ops.dequantize_p and inner.params["type"].bits == 32:
                accumulators.append(xs[0])

        simulated = replay.evaluate(eqn.params["body"], values, watch, keep_source=False)
        if instead is not None:
            results = instead[len(seen)]
        else:
            results = lax_int.lower_region(eqn, values, held, lambda name, array: jnp.asarray(array))
        seen.append((values, results, simulated, accumulators))
        return results

    return replay.evaluate(program.jaxpr, [*weights, *inputs], rule, keep_source=False)


# Random programs

#: Recipes that programs are tried with, by name.
RECIPES: dict[str, Recipe] = {
    **{name: named(name) for name in ("default", "litert", "per_tensor")},
    # Few bits, and a zero point that is none.
    "narrow": Recipe(
        weight=QuantType(4, symmetric=True),
        activation=QuantType(6),
        stream=QuantType(12),
        index=QuantType(8, symmetric=True),
        output=QuantType(7),
    ),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a random program: `name(values[k] for k in reads, weights[str(own position)], **options)`."""

    name: str
    reads: tuple[int, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}({', '.join(f'v{k}' for k in self.reads)}{'; ' if options else ''}{options})"


@dataclasses.dataclass(frozen=True)
class Case:
    """A random program.

    Attributes:
      seed, steps_asked: make the same program again.
      recipe: name in `RECIPES`.
      steps: value 0 is the input, value k + 1 the result of step k.
      weights: step -> arrays.
      inputs: one array; its leading dimension is the batch.
      results: the values that nothing reads.
    """

    seed: int
    steps_asked: int
    recipe: str
    steps: list[Step]
    weights: dict[str, dict[str, np.ndarray]]
    inputs: list[np.ndarray]
    results: list[int]

    def __call__(self, weights: Any, x: Any) -> list[Any]:
        """The program as a JAX function."""
        values = [x]
        for k, step in enumerate(self.steps):
            values.append(_STEPS[step.name](*(values[r] for r in step.reads), weights.get(str(k), {}), **step.options))
        return [values[k] for k in self.results]

    def __str__(self) -> str:
        lines = [
            f"python -m qcompiler.debug.fuzz --count 1 --seed {self.seed} --steps {self.steps_asked}"
            f" --recipe {self.recipe}"
        ]
        lines.append(f"  v0 = input float32{self.inputs[0].shape}, up to {np.abs(self.inputs[0]).max():.3g}")
        for k, step in enumerate(self.steps):
            held = self.weights.get(str(k), {})
            sizes = ", ".join(f"{n} float32{w.shape} up to {np.abs(w).max():.3g}" for n, w in held.items())
            lines.append(f"  v{k + 1} = {step}" + (f"    # {sizes}" if sizes else ""))
        return "\n".join([*lines, f"  return {', '.join(f'v{k}' for k in self.results)}"])


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "square": jnp.square,
}


def _conv(x: Any, held: Any, **options: Any) -> Any:
    y = jax.lax.conv_general_dilated(x, held["kernel"], dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    return y + held["bias"] if "bias" in held else y


def _dot(x: Any, held: Any) -> Any:
    y = x @ held["kernel"]
    return y + held["bias"] if "bias" in held else y


def _pool(x: Any, held: Any, window: int, stride: int, padding: str) -> Any:
    dims, strides = (1, window, window, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, dims, strides, padding)


_STEPS: dict[str, Callable[..., Any]] = {
    "conv": _conv,
    "dot": _dot,
    "left_dot": lambda x, held: jnp.einsum("ij,bjk->bik", held["kernel"], x),
    "attend": lambda x, y, held: jnp.einsum("bik,bjk->bij", x, y),
    "act": lambda x, held, name: _ACTIVATIONS[name](x),
    "clip": lambda x, held, low, high: jnp.clip(x, low, high),
    "channel_affine": lambda x, held: x * held["scale"] + held["shift"],
    "affine": lambda x, held, scale, shift: x * scale + shift,
    "add": lambda x, y, held: x + y,
    "sub": lambda x, y, held: x - y,
    "add_mean": lambda x, held, axes: x + jnp.broadcast_to(jnp.mean(x, axes, keepdims=True), x.shape),
    "max_pool": _pool,
    "mean": lambda x, held, axes: jnp.mean(x, axes),
    "max": lambda x, held, axes: jnp.max(x, axes),
    "reshape": lambda x, held, shape: x.reshape(x.shape[0], *shape),
    "transpose": lambda x, held, order: x.transpose(order),
    "flip": lambda x, held, axis: jnp.flip(x, axis),
    "slice": lambda x, held, axis: jax.lax.slice_in_dim(x, 0, x.shape[axis], stride=2, axis=axis),
}


class _Generator:
    def __init__(self, seed: int, steps: int, batch: int) -> None:
        self.rng = np.random.default_rng([seed, steps])
        self.seed, self.asked = seed, steps
        # A conv net with few channels, or tokens; sizes from few, so that JAX compiles few ops.
        image = self.rng.random() < 0.65
        shape = (self.pick((4, 5, 8)), self.pick((4, 5)), self.pick((1, 3, 8))) if image else (self.pick((3, 6)), 8)
        size = float(10.0 ** self.rng.uniform(-2, 2))
        shift = self.pick((0.0, 0.0, 0.7, 3.0)) * size
        x = (self.rng.normal(size=(batch, *shape)) * size + shift).astype(np.float32)
        self.inputs, self.steps, self.weights = [x], [], {}
        self.values = [x]

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def case(self, recipe: str) -> Case:
        while len(self.steps) < self.asked:
            self.step()
        read = {k for step in self.steps for k in step.reads}
        results = [k for k in range(1, len(self.values)) if k not in read] or [0]
        return Case(self.seed, self.asked, recipe, self.steps, self.weights, self.inputs, results)

    def step(self) -> None:
        """Appends one step; mostly on the last value."""
        source = len(self.values) - 1 if self.rng.random() < 0.75 else int(self.rng.integers(len(self.values)))
        x = self.values[source]
        names = ["act", "act", "clip", "channel_affine", "affine", "add", "add", "sub", "add_mean", "flip"]
        if x.ndim == 4:
            names += ["conv"] * 6 + ["max_pool", "mean", "max", "reshape", "transpose", "slice"]
        elif x.ndim == 3:
            names += ["dot"] * 4 + ["left_dot", "attend", "attend", "mean", "max", "reshape", "transpose", "slice"]
        else:
            names += ["dot"] * 4
        name = self.pick(names)
        reads, options, held = (source,), {}, {}
        size = max(float(np.abs(x).mean()), 1e-6)
        if name == "conv":
            options, held = self.conv(x, size)
        elif name == "dot":
            held = self.product((x.shape[-1], self.pick((1, 4, 8))), x.shape[-1], size)
        elif name == "left_dot":
            held = self.product((self.pick((1, 4)), x.shape[1]), x.shape[1], size, bias=False)
        elif name in ("add", "sub", "attend"):
            same = [k for k, v in enumerate(self.values) if v.shape == x.shape]
            if name == "attend":
                same = [
                    k
                    for k in range(len(self.values))
                    if self.values[k].ndim == 3 and self.values[k].shape[2] == x.shape[2]
                ]
            reads = (source, self.pick(same))
        elif name == "act":
            options = {"name": self.pick(list(_ACTIVATIONS))}
        elif name == "clip":
            low = round(float(-size * self.rng.uniform(0, 2)), 4)
            options = {"low": low, "high": round(float(size * self.rng.uniform(0.5, 3)), 4)}
        elif name == "channel_affine":
            scale = self.rng.normal(size=x.shape[-1]) * 10.0 ** self.rng.uniform(-2, 2)
            held = {"scale": scale, "shift": self.rng.normal(size=x.shape[-1]) * np.abs(scale).max() * size}
        elif name == "affine":
            scale = self.pick((-1.0, 2.0, 0.5, 1.0, round(float(self.rng.normal()), 3) or 1.0))
            options = {"scale": scale, "shift": self.pick((0.0, round(float(self.rng.normal() * size), 4)))}
        elif name == "max_pool":
            options = {
                "window": self.pick((2, 3)),
                "stride": self.pick((1, 2)),
                "padding": self.pick(("SAME", "VALID")),
            }
            if min(x.shape[1:3]) < 3:
                options["padding"] = "SAME"
        elif name in ("mean", "max", "add_mean"):
            options = {"axes": {4: (1, 2), 3: (1,), 2: (1,)}[x.ndim]}
            if x.ndim == 2 or (name == "add_mean" and self.rng.random() < 0.5):
                options = {"axes": (x.ndim - 1,)}
        elif name == "reshape":
            flat = int(np.prod(x.shape[1:]))
            shape = (
                (flat,)
                if x.ndim == 3 or (flat < 64 and self.rng.random() < 0.5)
                else (flat // x.shape[-1], x.shape[-1])
            )
            options = {"shape": shape}
        elif name == "transpose":
            options = {"order": (0, 2, 1, 3) if x.ndim == 4 else (0, 2, 1)}
        elif name in ("flip", "slice"):
            options = {"axis": int(self.rng.integers(1, x.ndim))}
        step = Step(name, reads, options)
        held = {k: np.asarray(v, np.float32) for k, v in held.items()}
        value = np.asarray(_STEPS[name](*(self.values[r] for r in reads), held, **options))
        if not np.isfinite(value).all() or np.abs(value).max() > 1e12 or value.size > 20_000:
            return
        if held:
            self.weights[str(len(self.steps))] = held
        self.steps.append(step)
        self.values.append(value)

    def product(self, shape: tuple[int, ...], depth: int, size: float, bias: bool = True) -> dict[str, Any]:
        """A kernel of any size with channels of different sizes, and a bias that does not drown what it is added to."""
        scale = 10.0 ** self.rng.uniform(-3, 2)
        kernel = self.rng.normal(size=shape) * scale
        if self.rng.random() < 0.3:
            kernel = kernel * 10.0 ** self.rng.uniform(-2, 0, size=shape[-1])
        if self.rng.random() < 0.1:
            kernel[..., 0] = 0
        held = {"kernel": kernel}
        if bias and self.rng.random() < 0.6:
            reach = np.abs(kernel).reshape(-1, shape[-1]).max(axis=0) * size * depth**0.5
            held["bias"] = self.rng.normal(size=shape[-1]) * reach * 10.0 ** self.rng.uniform(-3, 1)
        return held

    def conv(self, x: np.ndarray, size: float) -> tuple[dict[str, Any], dict[str, Any]]:
        channels = x.shape[-1]
        window = (self.pick((1, 2, 3)), self.pick((1, 3)))
        groups = self.pick((1, 1, 1, channels, 2 if channels % 2 == 0 else 1))
        features = channels if groups == channels and channels > 1 else self.pick((1, 4, 8))
        features = features if features % groups == 0 else groups
        spread = self.pick(((1, 1), (1, 1), (2, 1)))
        reach = [(k - 1) * d + 1 for k, d in zip(window, spread, strict=True)]
        padding: Any = self.pick(("SAME", "VALID", ((0, 1), (2, 0)), ((1, 1), (1, 1))))
        if any(k > n for k, n in zip(reach, x.shape[1:3], strict=True)):
            padding = "SAME"
        options = {
            "window_strides": self.pick(((1, 1), (1, 1), (2, 2), (1, 2))),
            "padding": padding,
            "rhs_dilation": spread,
            "feature_group_count": groups,
        }
        depth = window[0] * window[1] * channels // groups
        return options, self.product((*window, channels // groups, features), depth, size)


def random_case(seed: int, steps: int = 8, recipe: str = "default", batch: int = 2) -> Case:
    """The random program of a seed, with `steps` steps, all of which its results need."""
    return _Generator(seed, steps, batch).case(recipe)


def run_case(case: Case) -> Findings | None:
    """Compiles and checks a random program; None where a proof of the integers fails, which the compiler may say.

    Raises:
      AssertionError: a check failed; the message holds the program and the command that makes it again.
    """
    try:
        return check(compile_stages(case, case.weights, case.inputs, RECIPES[case.recipe]), case.inputs)
    except OverflowProofError:
        return None
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{case}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the number of programs that failed."""
    parser = argparse.ArgumentParser(prog="python -m qcompiler.debug.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="number of programs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first; the others follow")
    parser.add_argument("--steps", type=int, default=None, help="steps of a program; default: 1 to 12, by the seed")
    parser.add_argument("--recipe", choices=list(RECIPES), default=None, help="default: all in turn")
    arguments = parser.parse_args(argv)
    names = [arguments.recipe] if arguments.recipe else list(RECIPES)
    failed = refused = elements = off = 0
    start = time.perf_counter()
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        try:
            found = run_case(random_case(seed, arguments.steps or seed % 12 + 1, names[seed % len(names)]))
        except AssertionError as error:
            failed += 1
            print(f"FAILED {error}\n", file=sys.stderr)
            continue
        if found is None:
            refused += 1
        else:
            elements, off = elements + found.elements, off + found.off_by_one
    print(
        f"{arguments.count} programs, {failed} failed, {refused} refused for overflow, {elements} elements of regions, "
        f"{off} of them one step from the simulation, {time.perf_counter() - start:.0f} s"
    )
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
