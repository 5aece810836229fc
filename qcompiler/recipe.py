"""`Recipe`: which types and range estimators a program gets, with rules and encodings that override them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import range_choice as range_choices
from qcompiler import rounding as roundings
from qcompiler.errors import RecipeError
from qcompiler.ir.patterns import matches
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.ranges import Estimator, MinMax
from qcompiler.numerics.types import (
    ACTIVATION,
    INDEX,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    STREAM,
    WEIGHT,
    QuantType,
)


@dataclasses.dataclass(frozen=True)
class Granularity:
    """Which elements of a weight share a scale and a zero point.

    Attributes:
      channel_group: so many consecutive output channels; 1: each has its own; None: all share one, per tensor. Of a
        weight with several channel dimensions (heads and features), those along the last in the result are grouped.
      input_group: so many consecutive weights of a channel, along what a product sums over, share a step and a zero
        point of their own; the steps are integer multiples of the channel's scale, so that sums stay int32
        (`numerics.groups`). A kernel of fewer input channels has neighbouring taps in its groups. None: one group. A
        weight whose channels have no more elements than that has one group, as have weights of 7 and 8 bits, whose
        steps are those of int8 itself.

    Raises:
      RecipeError: a group is of less than 1.
    """

    channel_group: int | None = 1
    input_group: int | None = None

    def __post_init__(self) -> None:
        for name, what in (("channel_group", "channels"), ("input_group", "weights")):
            size = getattr(self, name)
            if size is not None and not (isinstance(size, int) and size >= 1):
                raise RecipeError(f"{name} is a number of {what} of at least 1, or None; got {size!r}")


#: Granularities that have a name.
GRANULARITIES = {
    "tensor": Granularity(channel_group=None),
    "channel": Granularity(),
    **{f"group{n}": Granularity(input_group=n) for n in (32, 64, 128)},
}

#: Most bits of what the integer backend reads: products are of int8 (an int16 activation as two of them), and a table
#: has at most 4,096 entries.
MOST_BITS = {"weight": 8, "activation": 16, "stream": 16, "index": 12, "output": 16}

#: Floats in which a layer can be kept; True means what the model has.
FLOATS = (True, "float32", "bfloat16", "float16")


def _granularity(which: str | Granularity) -> Granularity:
    if isinstance(which, Granularity):
        return which
    if not isinstance(which, str) or which not in GRANULARITIES:
        known = ", ".join(map(repr, sorted(GRANULARITIES)))
        raise RecipeError(f"unknown granularity {which!r}; known: {known}, or pass a qc.Granularity")
    return GRANULARITIES[which]


def _check_type(role: str, what: str, qtype: Any) -> None:
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


def _estimator(which: Any) -> Estimator:
    """The estimator of a name, of `(low, high)`, or the estimator itself."""
    try:
        if isinstance(which, tuple | list):
            low, high = which
            return FixedRange(float(low), float(high))
        return range_choices.estimator(which)
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
            object.__setattr__(self, "granularity", _granularity(given["granularity"]))
        for role in ("activation", "weight"):
            if role in given:
                _check_type(role, f"{role} type of a rule", given[role])
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
                object.__setattr__(self, f"{role}_range", _estimator(range_))
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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Types and estimators of a whole program.

    Attributes:
      weight: type of weights of products, 2 to 8 bits, symmetric or affine. Affine weights cost a sum over each window
        of the input at run time. `axis` and `block_size` are set per layer from `granularity`.
      granularity: which elements of a weight share a scale: `channel`, `tensor`, `group32`, `group64`, `group128` (so
        many along the input, for 2 to 6 bits), or a `Granularity`.
      activation: type of the operands of products, 2 to 16 bits, symmetric or affine. More than 8 bits cost two int8
        products, and four where both operands are activations.
      stream: type of what lives between products: residual terms, operands of sums and of islands.
      index: type of a table's index.
      output: type of the results.
      activation_range: estimator for 8 bits and fewer: `minmax`, `moving_average`, `percentile`, `mse`, `entropy`, or
        an `Estimator`.
      index_range: estimator for 9 to 12 bits, of which a table makes use of every one.
      stream_range: estimator for wider types, which have bits to spare for values that calibration did not see.
      ranges: how ranges of what products read are chosen where one estimator is not enough: `output_error`, `tiers`, an
        `OutputError` or `Tiers`; None: by the estimators alone.
      activation_sqnr: an activation that meets weights, and whose signal over noise in 8 bits or fewer were less, in
        dB, is stored as `stream`, at the cost of a second int8 product; None: never.
      pair_sqnr: the same for the operands of a product of two activations.
      equalize: cross-layer equalization and absorption of high biases, before calibration; None: only with weights per
        tensor, which need it.
      rounding: how weights are rounded to codes: `nearest`, `adaround`, `gptq`, `seq_mse` (which chooses scales), or
        the method with options: `qc.AdaRound(...)` and so on. All but `nearest` read calibration samples.
      bias_correction: shift the biases of products by their mean error on calibration samples: `empirical` (the whole
        error, layer after layer), `analytic` (that of the weights alone; without samples behind a norm), or None.
      rules: overrides, first match wins.
      encodings: what single values and weights are given: pattern of a value id (`input:x`, `stem/dot_general#0`) or of
        a weight's name -> an `Encoding`, or a `QuantType` alone, whose range is then calibrated. A name that is spelled
        out goes before patterns, the first pattern that matches before others. Whoever reads the value reads it so; a
        value that is to have several encodings has `id@int8` for readers that want that type. Encodings come from
        `qcompiler.interchange.load`, mostly.
      supergroups: rows of ops that are to be one integer op; where the regions say otherwise, the report does.
      precision: types chosen by data for the layers that no rule decides: a `Precision` (what to choose from, under
        which budget), or an `Assignment` of it or the path of its file, which are applied as they stand.
      migrate: move channel scales between operands of products, from norms into weights above all, where it lowers the
        products' error on the calibration data; None: no.

    Raises:
      RecipeError: a type that the backend has no integers for, or an unknown granularity, estimator or method.
    """

    weight: QuantType = WEIGHT
    granularity: str | Granularity = "channel"
    activation: QuantType = ACTIVATION
    stream: QuantType = STREAM
    index: QuantType = INDEX
    output: QuantType = STREAM
    activation_range: str | Estimator = "mse"
    index_range: str | Estimator = dataclasses.field(default_factory=lambda: MinMax(margin=1.25))
    # Not 2, at which the largest value seen would lie half way between two codes.
    stream_range: str | Estimator = dataclasses.field(default_factory=lambda: MinMax(margin=1.9))
    ranges: str | range_choices.OutputError | range_choices.Tiers | None = None
    activation_sqnr: float | None = 24.0
    pair_sqnr: float | None = 35.0
    equalize: bool | None = None
    rounding: str | roundings.Rounding | None = "nearest"
    bias_correction: str | None = None
    rules: tuple[Rule, ...] = ()
    encodings: Mapping[str | re.Pattern[str], Encoding | QuantType] = dataclasses.field(
        default_factory=dict, hash=False
    )
    supergroups: tuple[Supergroup, ...] = ()
    precision: Any = dataclasses.field(default=None, hash=False)
    migrate: bool | None = None

    def __post_init__(self) -> None:
        if self.precision is not None:
            # Precision speaks of candidates, which are made of rules.
            from qcompiler.precision import named as precision_named

            object.__setattr__(self, "precision", precision_named(self.precision))
        for role in MOST_BITS:
            _check_type(role, f"{role} type", getattr(self, role))
        object.__setattr__(self, "granularity", _granularity(self.granularity))
        object.__setattr__(self, "rounding", roundings.named(self.rounding))
        if self.bias_correction not in (None, "empirical", "analytic"):
            raise RecipeError(
                f"unknown bias_correction {self.bias_correction!r}; known: 'analytic', 'empirical', or None for none"
            )
        for estimator in (self.activation_range, self.index_range, self.stream_range):
            _estimator(estimator)
        object.__setattr__(self, "ranges", range_choices.named(self.ranges))
        rules = (self.rules,) if isinstance(self.rules, Rule) else tuple(self.rules)
        if wrong := [r for r in rules if not isinstance(r, Rule)]:
            raise RecipeError(f"rules are qc.Rule objects, got {wrong[0]!r}")
        object.__setattr__(self, "rules", rules)
        self._check_encodings()
        if others := [g for g in self.supergroups if not isinstance(g, Supergroup)]:
            raise RecipeError(f"supergroups are qc.Supergroup objects, got {others[0]!r}")
        object.__setattr__(self, "supergroups", tuple(self.supergroups))

    def _check_encodings(self) -> None:
        if not isinstance(self.encodings, Mapping):
            raise RecipeError(f"encodings map names to qc.Encoding objects, got {self.encodings!r}")
        object.__setattr__(self, "encodings", dict(self.encodings))
        for name, given in self.encodings.items():
            if not isinstance(name, str | re.Pattern):
                raise RecipeError(f"encodings are given by name, glob or compiled re.Pattern; got {name!r}")
            if not isinstance(given, Encoding | QuantType):
                raise RecipeError(f"the encoding of {name!r} is a qc.Encoding, or a qc.QuantType; got {given!r}")
            if isinstance(given, Encoding):
                check_encoding(given, f"the encoding of {name!r}")

    def estimator_for(self, qtype: QuantType) -> Estimator:
        """The range estimator for values of a type."""
        by_bits = self.activation_range if qtype.bits <= 8 else self.index_range
        return _estimator(self.stream_range if qtype.bits > MOST_BITS["index"] else by_bits)

    def rule_for(self, region_id: str, shape: str | None = None) -> Rule | None:
        """The first rule that matches a region; see `Rule.matches`."""
        return next((r for r in self.rules if r.matches(region_id, shape)), None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe as JSON, which `load` reads; the file is replaced whole or not at all.

        Raises:
          RecipeError: a field holds what a file cannot.
          OSError: the file cannot be written.
        """
        from qcompiler import recipe_files

        recipe_files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe that `save`, or a person, wrote.

        Raises:
          RecipeError: it is no such file, of another version, or holds what no recipe has; says where.
          OSError: the file cannot be read.
        """
        from qcompiler import recipe_files

        return recipe_files.load(path)

    @property
    def rounding_method(self) -> Any:
        """How weights are rounded: a `rounding.Rounding`, or None for the nearest codes."""
        return roundings.named(self.rounding)

    @property
    def range_choice(self) -> range_choices.OutputError | range_choices.Tiers:
        """How ranges are chosen, where the recipe has a way."""
        return range_choices.named(self.ranges) or range_choices.OutputError()

    @property
    def equalizes(self) -> bool:
        """Whether the equalize pass runs."""
        return _granularity(self.granularity).channel_group is None if self.equalize is None else self.equalize

    @property
    def migrates(self) -> bool:
        """Whether the migrate pass runs."""
        return bool(self.migrate)


#: The LiteRT 8-bit rules: every activation in 8 bits, affine per tensor; weights per channel, symmetric, [-127, 127].
LITERT = Recipe(
    stream=ACTIVATION,
    index=ACTIVATION,
    output=ACTIVATION,
    activation_range="minmax",
    activation_sqnr=None,
    pair_sqnr=None,
)

#: LiteRT's 16x8 mode: every activation in 16 bits, symmetric; weights in 8. Near float accuracy, at two int8 products
#: per layer. Tables keep their 12-bit index.
INT16X8 = Recipe(activation=STREAM)

#: The recipes that have a name. `default`: int8 into products and int16 between them, weights symmetric per channel.
#: `per_tensor`: one scale per weight, after cross-layer equalization.
NAMED = {"default": Recipe(), "litert": LITERT, "int16x8": INT16X8, "per_tensor": Recipe(granularity="tensor")}


def named(recipe: Any) -> Recipe:
    """The recipe of a name, or the recipe itself.

    Raises:
      RecipeError: no recipe of that name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None:
        return NAMED["default"]
    if not isinstance(recipe, str) or recipe not in NAMED:
        raise RecipeError(f"unknown recipe {recipe!r}; known: {', '.join(sorted(NAMED))}, or pass a qc.Recipe")
    return NAMED[recipe]
