"""Random programs, drawn from a seed in NumPy alone, so that a seed gives the same program everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.debug import reference
from qcompiler.debug.fuzz.cases import RECIPES, Case, Step, as_real
from qcompiler.debug.fuzz.drawing import KINDS
from qcompiler.debug.fuzz.steps import STEPS

#: Larger values of a program are not made, nor larger numbers in them.
MOST_ELEMENTS = 20_000
MOST_MAGNITUDE = 1e12


def random_case(
    seed: int, steps: int | None = None, recipe: str | None = None, batch: int = 2, thorough: bool = False
) -> Case:
    """The random program of a seed.

    Args:
      seed: what everything is drawn from.
      steps: how many; None: 1 to 12, by the seed.
      recipe: name in `RECIPES`; None: all in turn, by the seed.
      batch: leading dimension of the inputs.
      thorough: see `check`.
    """
    names = list(RECIPES)
    origin = f"python -m qcompiler.debug.fuzz --count 1 --seed {seed}"
    origin += "" if steps is None else f" --steps {steps}"
    origin += "" if recipe is None else f" --recipe {recipe}"
    generator = Generator(seed, steps or seed % 12 + 1, batch)
    return generator.case(origin, recipe or names[seed % len(names)], thorough)


def run_step(step: Step, operands: Sequence[np.ndarray], held: dict[str, np.ndarray]) -> np.ndarray:
    """The value of a step, computed in NumPy.

    Raises:
      TypeError, ValueError: the step does not take operands of these shapes.
    """
    apply = functools.partial(STEPS[step.name], **step.options)
    jaxpr = jax.make_jaxpr(lambda operands, held: apply(*operands, held))(list(operands), held)
    flat = [*operands, *(held[name] for name in sorted(held))]
    return reference.evaluate_floats(jaxpr, flat)[0]


class Generator:
    """Grows a program step by step, looking at the values it has so far."""

    def __init__(self, seed: int, steps: int, batch: int) -> None:
        self.rng = np.random.default_rng([seed, steps])
        self.asked = steps
        self.inputs = [self.input(batch, self.shape())]
        if self.rng.random() < 0.2:
            same = self.rng.random() < 0.7
            self.inputs.append(self.input(batch, self.inputs[0].shape[1:] if same else self.shape()))
        self.steps: list[Step] = []
        self.weights: dict[str, dict[str, np.ndarray]] = {}
        self.values = [as_real(x) for x in self.inputs]

    def shape(self) -> tuple[int, ...]:
        """Images, mostly; tokens; now and then a volume or a vector."""
        kind = self.rng.random()
        if kind < 0.6:
            return self.pick((4, 5, 8)), self.pick((4, 5, 7)), self.pick((1, 3, 8, 8, 20))
        if kind < 0.9:
            return self.pick((3, 6, 9)), self.pick((4, 8))
        return (self.pick((2, 4)), 3, 4, self.pick((1, 4))) if kind < 0.95 else (self.pick((1, 5, 16)),)

    def input(self, batch: int, shape: tuple[int, ...]) -> np.ndarray:
        kind = self.rng.random()
        if kind < 0.05:
            return self.rng.integers(0, 256, (batch, *shape), np.uint8)
        if kind < 0.08:
            return self.rng.random((batch, *shape)) < 0.4
        size = float(10.0 ** self.rng.uniform(-2, 2))
        shift = self.pick((0.0, 0.0, 0.7, 3.0)) * size
        return (self.rng.normal(size=(batch, *shape)) * size + shift).astype(np.float32)

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def case(self, origin: str, recipe: str, thorough: bool) -> Case:
        while len(self.steps) < self.asked:
            self.step()
        read = {k for step in self.steps for k in step.reads}
        made = range(len(self.inputs), len(self.values))
        # Ends of the program, and now and then a value that is read as well.
        results = [k for k in made if k not in read or self.chance(0.05)]
        return Case(origin, recipe, self.steps, self.weights, self.inputs, results, thorough)

    def step(self) -> None:
        """Appends one step, mostly on the last value, unless its result is too large, or zero everywhere."""
        last = len(self.values) - 1
        source = last if self.chance(0.75) else int(self.rng.integers(len(self.values)))
        x = self.values[source]
        name = self.pick([n for n, (weight, fits, _) in KINDS.items() if fits(x) for _ in range(weight)])
        drawn = KINDS[name][2](self, source, x)
        if drawn is None:
            return
        reads, options, held = drawn
        step = Step(name, reads, options)
        held = {k: np.asarray(v, np.float32) for k, v in held.items()}
        value = run_step(step, [self.values[r] for r in reads], held)
        if not np.isfinite(value).all() or np.abs(value).max(initial=0) > MOST_MAGNITUDE or not value.size:
            return
        # What is zero everywhere has no range: its scale, and how finely what follows is summed, would be a guess.
        if value.size > MOST_ELEMENTS or not np.any(value):
            return
        if held:
            self.weights[str(len(self.steps))] = held
        self.steps.append(step)
        self.values.append(value)

    def alike(self, fits: Callable[[np.ndarray], bool]) -> list[int]:
        """The values of which something holds."""
        return [k for k, v in enumerate(self.values) if fits(v)]

    def kernel(
        self, shape: tuple[int, ...], depth: int, size: float, bias: bool = True, features: int = -1
    ) -> dict[str, Any]:
        """A kernel of any size with channels of different sizes, and a bias that does not drown what it is added to."""
        kernel = self.rng.normal(size=shape) * 10.0 ** self.rng.uniform(-3, 2)
        by_channel = np.moveaxis(kernel, features, -1)
        if self.chance(0.3):
            by_channel *= 10.0 ** self.rng.uniform(-2, 0, size=shape[features])
        if self.chance(0.1):
            by_channel[..., 0] = 0
        held = {"kernel": kernel}
        if bias and self.chance(0.6):
            reach = np.abs(by_channel).reshape(-1, shape[features]).max(axis=0) * size * depth**0.5
            held["bias"] = self.rng.normal(size=shape[features]) * reach * 10.0 ** self.rng.uniform(-3, 1)
        return held
