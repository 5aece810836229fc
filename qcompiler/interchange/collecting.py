"""The encodings that a quantized program has, by the names that a recipe can give them under."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.errors import RecipeError
from qcompiler.ir import _compat, loops
from qcompiler.ir.program import Program
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import BIAS


@dataclasses.dataclass(frozen=True)
class Encodings:
    """Name -> encoding.

    Attributes:
      activations: of values between ops; where one is stored in several types, the widest has its name and each other
        one has `name@type`.
      params: of weights; where two layers read one in different scales, the second has `name@layer`.
      biases: int32, at the scale that follows from input and weight.
      shapes: shape of each weight and bias.
    """

    activations: Mapping[str, Encoding]
    params: Mapping[str, Encoding]
    biases: Mapping[str, Encoding]
    shapes: Mapping[str, tuple[int, ...]]

    def renamed(self, names: Mapping[str, str]) -> Encodings:
        """The same under other names, which stand before `@`, too.

        Raises:
          RecipeError: two would get one name.
        """

        def other(name: str) -> str:
            start, at, which = name.rpartition("@")
            return names.get(name) or (f"{names[start]}{at}{which}" if start in names else name)

        taken: dict[str, str] = {}
        for name in (*self.activations, *self.params, *self.biases):
            if taken.setdefault(other(name), name) != name:
                raise RecipeError(f"{taken[other(name)]} and {name} would both be called {other(name)!r}")
        renamed = lambda field: {other(name): value for name, value in field.items()}
        return Encodings(*map(renamed, (self.activations, self.params, self.biases, self.shapes)))


def encodings_of(assigned: Program, inserted: Program) -> Encodings:
    """The encodings of a program.

    Args:
      assigned: after `assign_precision`.
      inserted: after `insert_qdq`.
    """
    activations: dict[str, dict[str, Encoding]] = {}
    params: dict[str, Encoding] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    weights: dict[str, np.ndarray] = {}
    for part in loops.nested(inserted):
        weights |= part.weights
        weight_of = part.weight_of
        for eqn in part.eqns:
            if eqn.primitive is not ops.fake_quantize_p:
                continue
            value: Any = eqn.invars[0]
            scale, zero = (weight_of[v] for v in eqn.invars[1:] if isinstance(v, _compat.Var))
            encoding = Encoding(eqn.params["type"], np.asarray(part.weights[scale]), np.asarray(part.weights[zero]))
            owner, _, rest = scale.removesuffix("/scale").rpartition(f":{encoding.type.name}")
            if value in weight_of and owner == weight_of[value]:
                params[owner + rest] = encoding
                shapes[owner + rest] = value.aval.shape
            else:
                activations.setdefault(owner, {})[encoding.type.name] = encoding
    biases = _biases(assigned, weights, shapes)
    return Encodings(dict(_named(activations)), params, biases, shapes)


def _named(activations: Mapping[str, Mapping[str, Encoding]]) -> Iterator[tuple[str, Encoding]]:
    """(name, encoding) of each value in each of its types."""
    for owner, by_type in activations.items():
        widest = max(by_type.values(), key=lambda e: e.type.bits)
        for which, encoding in by_type.items():
            yield (owner if encoding is widest else f"{owner}@{which}"), encoding


def _biases(
    assigned: Program, weights: Mapping[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> dict[str, Encoding]:
    found: dict[str, Encoding] = {}
    for part in loops.nested(assigned):
        for eqn in part.eqns:
            region = eqn.params.get("id")
            for var, role in zip(eqn.invars, eqn.params.get("roles", ()), strict=False):
                scale = weights.get(f"{region}:accumulator/scale")
                if role != "bias" or scale is None or var not in part.ids:
                    continue
                name = part.ids[var].removeprefix("weight:")
                name += f"@{region}" if name in found else ""
                axis = tuple(d for d, n in enumerate(np.shape(scale)) if n > 1)
                qtype = dataclasses.replace(BIAS, axis=axis)
                found[name] = Encoding(qtype, np.asarray(scale), np.zeros(np.shape(scale), np.int32))
                shapes[name] = np.shape(scale)
    return found
