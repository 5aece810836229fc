"""What a random program is: steps on arrays, as data that can be printed, saved and made smaller."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qcompiler.debug.fuzz.steps import STEPS
from qcompiler.numerics.types import QuantType
from qcompiler.recipe import Granularity, Recipe, named

#: Recipes that programs are tried with, by name.
RECIPES: dict[str, Recipe] = {
    **{name: named(name) for name in ("default", "litert", "per_tensor", "int16x8")},
    # Few bits, and a zero point that is none.
    "narrow": Recipe(
        weight=QuantType(4, symmetric=True),
        activation=QuantType(6),
        stream=QuantType(12),
        index=QuantType(8, symmetric=True),
        output=QuantType(7),
    ),
    # The other way round: symmetric operands, affine streams, tables of 10 bits.
    "affine_stream": Recipe(
        weight=QuantType(8, symmetric=True, narrow_range=True),
        activation=QuantType(8, symmetric=True),
        stream=QuantType(16),
        index=QuantType(10),
        output=QuantType(16),
        activation_range="percentile",
    ),
    # Zero points on both sides of every product, and operands in two parts of which one is narrow.
    "affine_weights": Recipe(
        weight=QuantType(7), granularity=Granularity(channel_group=3), activation=QuantType(11), stream=QuantType(11)
    ),
    # Packed weights in small groups of which the last is shorter, with zero points.
    "groups": Recipe(weight=QuantType(4), granularity=Granularity(input_group=3)),
    # The same in bits that do not divide a byte, symmetric, groups over two channels.
    "groups_of_3_bits": Recipe(
        weight=QuantType(3, symmetric=True), granularity=Granularity(channel_group=2, input_group=5)
    ),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a random program: `name(*(values[k] for k in reads), weights[str(own position)], **options)`."""

    name: str
    reads: tuple[int, ...]
    options: dict[str, Any]

    def __str__(self) -> str:
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}({', '.join(f'v{k}' for k in self.reads)}{'; ' if options else ''}{options})"


@dataclasses.dataclass(frozen=True)
class Case:
    """A random program, and what it is run with.

    Attributes:
      origin: how it came about: the command that makes it, or the program that it was shrunk from.
      recipe: name in `RECIPES`.
      steps: values 0 to n - 1 are the n inputs, value n + k is the result of step k.
      weights: str(step) -> name -> array.
      inputs: arrays; their leading dimension is the batch.
      results: the values that the program returns.
      thorough: see `check`.
    """

    origin: str
    recipe: str
    steps: list[Step]
    weights: dict[str, dict[str, np.ndarray]]
    inputs: list[np.ndarray]
    results: list[int]
    thorough: bool = False

    def __call__(self, weights: Any, *inputs: Any) -> list[Any]:
        """The program as a JAX function."""
        values = list(map(as_real, inputs))
        for k, step in enumerate(self.steps):
            values.append(STEPS[step.name](*(values[r] for r in step.reads), weights.get(str(k), {}), **step.options))
        return [values[k] for k in self.results]

    def __str__(self) -> str:
        first = len(self.inputs)
        lines = [f"{self.origin} (recipe {self.recipe})"]
        lines += [f"  v{k} = input {_describe(x)}" for k, x in enumerate(self.inputs)]
        for k, step in enumerate(self.steps):
            held = ", ".join(f"{n} {_describe(w)}" for n, w in self.weights.get(str(k), {}).items())
            lines.append(f"  v{first + k} = {step}" + (f"    # {held}" if held else ""))
        return "\n".join([*lines, f"  return {', '.join(f'v{k}' for k in self.results)}"])


def as_real(x: Any) -> Any:
    """An input as steps read it: bytes as numbers from 0 to 1, truth values as 0 and 1."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    return x.astype(np.float32)


def _describe(array: np.ndarray) -> str:
    if array.size and (array.size <= 4 or array.dtype == bool):
        return f"{array.dtype}{array.shape} {array.ravel()[:4].tolist()}"
    return f"{array.dtype}{array.shape} up to {np.abs(array).max(initial=0):.3g}"
