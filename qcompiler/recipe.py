"""`Recipe`: which types and range estimators a program gets, with rules that override them by module path."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

from qcompiler.errors import RecipeError
from qcompiler.numerics import ranges
from qcompiler.numerics.types import ACTIVATION, INDEX, STREAM, WEIGHT, QuantType


def _check_type(what: str, qtype: Any) -> None:
    """Raises `RecipeError` unless it is a type for a whole operand; the compiler sets axes itself."""
    if not isinstance(qtype, QuantType):
        raise RecipeError(f"the {what} is a qc.QuantType, got {qtype!r}")
    if qtype.axis:
        raise RecipeError(f"the {what} has axis={qtype.axis}, which is set per layer: pass per_channel instead")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What to do with the layers that match; the first rule that matches a layer decides.

    Attributes:
      path: glob on the module path (`encoder/*/mlp*`); `*` matches everything, the empty path too.
      primitive: glob on the primitive (`dot_general`, `conv*`).
      weight: type of the weights, or None for the recipe's.
      activation: type of the operands of products, or None for the recipe's.
      keep_float: leave the layer in float (an island).

    Raises:
      RecipeError: it keeps a layer in float and gives it types, or an attribute is of the wrong kind.
    """

    path: str = "*"
    primitive: str = "*"
    weight: QuantType | None = None
    activation: QuantType | None = None
    keep_float: bool = False

    def __post_init__(self) -> None:
        for name in ("path", "primitive"):
            if not isinstance(getattr(self, name), str):
                raise RecipeError(f"{name} of a rule is a glob such as 'head*', got {getattr(self, name)!r}")
        types = {name: qtype for name in ("weight", "activation") if (qtype := getattr(self, name)) is not None}
        for name, qtype in types.items():
            _check_type(f"{name} type of a rule", qtype)
        if self.keep_float and types:
            raise RecipeError(
                f"a rule for {self.path!r} keeps layers in float and gives them a type of {', '.join(types)}: "
                "drop one of the two"
            )

    def matches(self, region_id: str) -> bool:
        """Whether the rule speaks of the region with this id."""
        path, _, name = region_id.rpartition("/")
        return fnmatch.fnmatchcase(path, self.path) and fnmatch.fnmatchcase(name.partition("#")[0], self.primitive)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Types and estimators of a whole program.

    Attributes:
      weight: type of weights of products. `axis` is set per layer from `per_channel`.
      per_channel: one scale per output channel of a weight, else one per tensor.
      activation: type of the operands of products.
      stream: type of what lives between products: residual terms, operands of sums and of islands.
      index: type of a table's index.
      output: type of the results.
      activation_range: estimator for 8 bits and fewer: `minmax`, `moving_average`, `percentile`, `mse`, `entropy`, or
        an `Estimator`.
      stream_range: estimator for wider types.
      equalize: cross-layer equalization before quantization; None: only with weights per tensor, which need it.
      rules: overrides, first match wins.
    """

    weight: QuantType = WEIGHT
    per_channel: bool = True
    activation: QuantType = ACTIVATION
    stream: QuantType = STREAM
    index: QuantType = INDEX
    output: QuantType = STREAM
    activation_range: str | ranges.Estimator = "mse"
    stream_range: str | ranges.Estimator = dataclasses.field(default_factory=lambda: ranges.MinMax(margin=1.25))
    equalize: bool | None = None
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for role, qtype, most in (
            ("weight", self.weight, 8),
            ("activation", self.activation, 8),
            ("index", self.index, 12),
            ("stream", self.stream, 16),
            ("output", self.output, 16),
        ):
            _check_type(f"{role} type", qtype)
            if qtype.bits > most:
                raise RecipeError(f"{role} type has {qtype.bits} bits; the integer backend takes at most {most} there")
        if not self.weight.symmetric:
            raise RecipeError("affine weights are not supported yet: use QuantType(bits, symmetric=True)")
        for estimator in (self.activation_range, self.stream_range):
            self._estimator(estimator)
        rules = (self.rules,) if isinstance(self.rules, Rule) else tuple(self.rules)
        if wrong := [r for r in rules if not isinstance(r, Rule)]:
            raise RecipeError(f"rules are qc.Rule objects, got {wrong[0]!r}")
        object.__setattr__(self, "rules", rules)

    @staticmethod
    def _estimator(which: str | ranges.Estimator) -> ranges.Estimator:
        if isinstance(which, ranges.Estimator):
            return which
        try:
            return ranges.by_name(which)
        except ValueError as error:
            raise RecipeError(str(error)) from error

    def estimator_for(self, qtype: QuantType) -> ranges.Estimator:
        """The range estimator for values of a type."""
        return self._estimator(self.activation_range if qtype.bits <= 8 else self.stream_range)

    def rule_for(self, region_id: str) -> Rule | None:
        """The first rule that matches a region."""
        return next((r for r in self.rules if r.matches(region_id)), None)

    @property
    def equalizes(self) -> bool:
        """Whether the equalize pass runs."""
        return not self.per_channel if self.equalize is None else self.equalize


#: The LiteRT 8-bit rules: every activation in 8 bits, affine per tensor; weights per channel, symmetric, [-127, 127].
LITERT = Recipe(stream=ACTIVATION, index=ACTIVATION, output=ACTIVATION, activation_range="minmax")

#: The recipes that have a name.
NAMED = {"default": Recipe(), "litert": LITERT, "per_tensor": Recipe(per_channel=False)}


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
