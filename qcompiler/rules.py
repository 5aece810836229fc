"""`Rule`: what a recipe says of the layers that match, and checks of types, ranges and encodings that may be said."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler import granularity as granularities
from qcompiler import range_choice
from qcompiler.errors import RecipeError
from qcompiler.granularity import Granularity
from qcompiler.ir.patterns import matches
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.ranges import Estimator
from qcompiler.numerics.types import LARGEST_SCALE, SMALLEST_SCALE, QuantType

#: Most bits of what the integer backend reads: products are of int8 (an int16 activation as two of them), and a table
#: has at most 4,096 entries.
MOST_BITS = {"weight": 8, "activation": 16, "stream": 16, "index": 12, "output": 16}

#: Floats in which a layer can be kept; True means what the model has.
FLOATS = (True, "float32", "bfloat16", "float16")


def check_type(role: str, what: str, qtype: Any) -> None:
    """Raises `RecipeError` unless it is a type for a whole operand that the backend has integers for."""
    if not isinstance(qtype, QuantType):
        raise RecipeError(f"the {what} is a qc.QuantType, got {qtype!r}")
    if qtype.bits > MOST_BITS[role]:
        most = MOST_BITS[role]
        raise RecipeError(
            f"the {what} {qtype.name} has {qtype.bits} bits; the integer backend takes at most {most} there"
        )
    if qtype.axis:
        where = "weights get theirs per layer from `granularity`" if role == "weight" else "activations have none"
        raise RecipeError(f"the {what} has axis={qtype.axis}: {where}")


def estimator_of(which: Any) -> Estimator:
    """The estimator of a name, of `(low, high)`, or the estimator itself.

    Raises:
      RecipeError: it is none of these.
    """
    try:
        if isinstance(which, tuple | list):
            low, high = which
            return FixedRange(float(low), float(high))
        return range_choice.estimator(which)
    except (TypeError, ValueError, RecipeError) as error:
        raise RecipeError(f"a range is (low, high), the name of an estimator, or an estimator: {error}") from error


def check_encoding(encoding: Encoding, what: str) -> None:
    """Raises `RecipeError` unless its numbers can turn codes into reals; `what` begins the message."""
    scale, zero, qtype = np.asarray(encoding.scale), np.asarray(encoding.zero_point), encoding.type
    if not scale.size or not (np.isfinite(scale) & (scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)).all():
        raise RecipeError(
            f"{what} has scales that are no numbers from {SMALLEST_SCALE:.3g} to {LARGEST_SCALE:.3g}: "
            f"{scale.ravel()[:4]}"
        )
    if zero.dtype.kind not in "iu" or zero.size not in (1, scale.size):
        raise RecipeError(f"{what} has {zero.size} zero points of {zero.dtype} for {scale.size} scales")
    if ((zero < qtype.qmin) | (zero > qtype.qmax)).any() or (qtype.symmetric and zero.any()):
        allowed = "0" if qtype.symmetric else f"{qtype.qmin} to {qtype.qmax}"
        raise RecipeError(f"{what} has zero points that {qtype.name} cannot hold: {zero.ravel()[:4]}, not {allowed}")


@dataclasses.dataclass(frozen=True, repr=False)
class Rule:
    r"""What to do with the layers that match; the first rule that matches a layer decides.

    A pattern is a glob, or a compiled `re.Pattern`, which must match the whole text.

    Attributes:
      path: pattern of the module path (`encoder/*/mlp*`); `*` matches everything, the empty path too.
      primitive: pattern of the primitive (`dot_general`, `conv*`).
      weight: type of the weights, or None for the recipe's.
      activation: type of the operands of products, or None for the recipe's.
      granularity: of the weights, a name or a `Granularity`, or None for the recipe's.
      keep_float: leave the layer in float (an island): True, as the model has it, or computed in `float32`, `bfloat16`
        or `float16`, its weights stored so.
      shape: pattern of the weight's shape as the program holds it: `3x3x*x64` or `re.compile(r"1x1x\d+x\d+")`. A layer
        without weights has the empty shape.
      activation_range: of what the layer reads: `(low, high)`, the name of an estimator, an estimator, or an
        `Encoding`, which gives the type of the operands of products as well; None for the recipe's. Another layer that
        reads the same value in the same type reads it so, too: it is stored once. With `(low, high)` no
        `activation_sqnr` widens the type.
      weight_range: the same of the weights, an estimator for each channel or group of its own.

    Raises:
      RecipeError: an attribute is of the wrong kind, a type has no integers in the backend, or layers are kept in float
        and given types as well.
    """

    path: str | re.Pattern[str] = "*"
    primitive: str | re.Pattern[str] = "*"
    weight: QuantType | None = None
    activation: QuantType | None = None
    granularity: str | Granularity | None = None
    keep_float: bool | str = False
    shape: str | re.Pattern[str] = "*"
    activation_range: str | tuple[float, float] | Estimator | Encoding | None = None
    weight_range: str | tuple[float, float] | Estimator | Encoding | None = None

    def __post_init__(self) -> None:
        for name in ("path", "primitive", "shape"):
            if not isinstance(getattr(self, name), str | re.Pattern):
                raise RecipeError(
                    f"{name} of a rule is a glob such as 'head*', or a compiled re.Pattern; got {getattr(self, name)!r}"
                )
        names = ("weight", "activation", "granularity", "activation_range", "weight_range")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if "granularity" in given:
            object.__setattr__(self, "granularity", granularities.named(given["granularity"]))
        for role in ("activation", "weight"):
            if role in given:
                check_type(role, f"{role} type of a rule", given[role])
            range_ = given.get(f"{role}_range")
            if isinstance(range_, Encoding):
                check_encoding(range_, f"{role}_range of a rule")
                if role in given and (given[role].bits, given[role].symmetric) != (
                    range_.type.bits,
                    range_.type.symmetric,
                ):
                    raise RecipeError(
                        f"a rule for {self.path!r} gives {role}s the type {given[role].name} and an encoding of "
                        f"{range_.type.name}: drop one of the two"
                    )
            elif range_ is not None:
                object.__setattr__(self, f"{role}_range", estimator_of(range_))
        if self.keep_float not in (False, *FLOATS):
            raise RecipeError(f"keep_float is True, False, {', '.join(map(repr, FLOATS[1:]))}, got {self.keep_float!r}")
        if self.keep_float and given:
            raise RecipeError(
                f"a rule for {self.path!r} keeps layers in float and gives them a {', a '.join(given)}: "
                "drop one of the two"
            )

    def matches(self, region_id: str, shape: str | None = None) -> bool:
        """Whether the rule speaks of the region with this id.

        Args:
          region_id: `path/primitive#occurrence`.
          shape: of its weight, `3x3x64x64`, empty without one; None where it is not known.

        Raises:
          ValueError: the rule has a shape, and that of the region is not known.
        """
        if shape is None and self.shape != "*":
            raise ValueError(f"whether {self} matches {region_id} depends on the shape of its weight")
        path, _, name = region_id.rpartition("/")
        texts = ((self.path, path), (self.primitive, name.partition("#")[0]), (self.shape, shape or ""))
        return all(matches(pattern, text) for pattern, text in texts)

    def __repr__(self) -> str:
        given = (
            (f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        )
        return f"Rule({', '.join(f'{name}={value!r}' for name, value in given)})"


@dataclasses.dataclass(frozen=True)
class Supergroup:
    """Ops in a row, each reading the one before, that are one: what they hand on among themselves is not quantized.

    Attributes:
      ops: names as ONNX has them (`Conv`, `Relu`), at least two.
      fuse: False: they are not one, so each result is quantized.
    """

    ops: tuple[str, ...]
    fuse: bool = True

    def __post_init__(self) -> None:
        ops = tuple(self.ops) if isinstance(self.ops, Sequence) and not isinstance(self.ops, str) else ()
        if len(ops) < 2 or not all(isinstance(op, str) for op in ops):
            raise RecipeError(
                f"the ops of a supergroup are at least two names such as ('Conv', 'Relu'); got {self.ops!r}"
            )
        object.__setattr__(self, "ops", ops)
