"""`Candidate`: one way of storing the operands of a layer, among which sensitivity analysis and solvers choose.

Names follow the weights: `int4` and `int8` are such weights beside int8 activations, `int4_group32` has a step for
every 32 of them along the input, `int16` is int8 weights beside int16 activations (16x8).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from qcompiler import json_files
from qcompiler.errors import QuantizationError, RecipeError
from qcompiler.granularity import Granularity
from qcompiler.numerics.types import ACTIVATION, STREAM, WEIGHT, QuantType
from qcompiler.rules import Rule

#: Floats in which a layer may stay, and the bits of one number.
FLOAT_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Types of a layer's operands.

    Attributes:
      weight: of the weights, without `axis`, which the layer sets; None: they stay real.
      activation: of the activations that meet them, or each other; None: they stay real.
      granularity: which weights share a scale: `channel`, `tensor`, or a `Granularity`.
      float_dtype: of what stays real: `float32`, `bfloat16` or `float16`.

    Raises:
      RecipeError: a type that the backend has no integers for, an unknown granularity or float.
    """

    weight: QuantType | None = None
    activation: QuantType | None = None
    granularity: str | Granularity = "channel"
    float_dtype: str = "float32"

    def __post_init__(self) -> None:
        # A rule checks the same types.
        rule = Rule(weight=self.weight, activation=self.activation, granularity=self.granularity)
        object.__setattr__(self, "granularity", rule.granularity)
        if self.float_dtype not in FLOAT_BITS:
            raise RecipeError(f"unknown float_dtype={self.float_dtype!r}; known: {', '.join(FLOAT_BITS)}")

    @property
    def is_float(self) -> bool:
        """Whether the whole layer stays real."""
        return self.weight is None and self.activation is None

    @property
    def weight_bits(self) -> int:
        """Bits of one weight, its scale not counted."""
        return FLOAT_BITS[self.float_dtype] if self.weight is None else self.weight.bits

    @property
    def activation_bits(self) -> int:
        """Bits of one activation."""
        return FLOAT_BITS[self.float_dtype] if self.activation is None else self.activation.bits

    def rule(self, path: str, primitive: str = "*") -> Rule:
        """The recipe rule that gives layers this candidate.

        Args:
          path, primitive: globs, as `Rule` has them.

        Raises:
          RecipeError: recipes have no such rule: one operand real and the other quantized.
        """
        if self.is_float:
            return Rule(path, primitive, keep_float=self.float_dtype)
        if self.weight is None or self.activation is None:
            raise RecipeError(f"no rule of a recipe says {self}: a layer is all integers, or all float")
        return Rule(path, primitive, weight=self.weight, activation=self.activation, granularity=self.granularity)

    def to_json(self) -> dict[str, Any]:
        """The fields that are not at their defaults, as JSON has them; see `from_json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: dataclasses.asdict(value) if isinstance(value, QuantType | Granularity) else value
            for name, value in fields.items()
            if value != getattr(_REAL, name)
        }

    @classmethod
    def from_json(cls, data: Any, where: str) -> Candidate:
        """The candidate that `to_json`, or a person, wrote.

        Args:
          data: field -> value, types and granularities by their own fields; names stand for granularities, too.
          where: what it is, in messages.

        Raises:
          RecipeError: an unknown field, or one that no candidate can have; says where.
        """
        made = json_files.fields_of(cls, data, where)
        kinds: dict[str, type] = {"weight": QuantType, "activation": QuantType, "granularity": Granularity}
        try:
            for field, kind in kinds.items():
                if isinstance(made.get(field), Mapping):
                    made[field] = kind(**json_files.fields_of(kind, made[field], f"{field} of {where}"))
            return cls(**made)
        except (QuantizationError, TypeError) as error:
            raise RecipeError(f"{where}: {error}") from error


_REAL = Candidate()

#: Candidates that have a name.
NAMED: Mapping[str, Candidate] = {
    "int4": Candidate(dataclasses.replace(WEIGHT, bits=4), ACTIVATION),
    "int4_group32": Candidate(dataclasses.replace(WEIGHT, bits=4), ACTIVATION, "group32"),
    "int8": Candidate(WEIGHT, ACTIVATION),
    "int16": Candidate(WEIGHT, STREAM),
    "float16": Candidate(float_dtype="float16"),
    "bfloat16": Candidate(float_dtype="bfloat16"),
    "float32": Candidate(),
}


def named(which: Mapping[str, Candidate] | Iterable[str]) -> dict[str, Candidate]:
    """Candidates by name, given names of `NAMED`, or a mapping that has its own.

    Raises:
      RecipeError: a name is unknown, something else than a `Candidate` has a name, or there is none at all.
    """
    if isinstance(which, str):
        which = (which,)
    if not isinstance(which, Mapping):
        names = list(which)
        if unknown := [n for n in names if n not in NAMED]:
            raise RecipeError(f"unknown candidate {unknown[0]!r}; known: {', '.join(NAMED)}, or pass a mapping")
        which = {n: NAMED[n] for n in names}
    if wrong := [n for n, c in which.items() if not isinstance(c, Candidate)]:
        raise RecipeError(f"candidate {wrong[0]!r} is a qc.Candidate, got {which[wrong[0]]!r}")
    if not which:
        raise RecipeError("there are no candidates")
    return dict(which)
