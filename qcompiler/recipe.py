"""`Recipe`: which types and range estimators a program gets, with rules and encodings that override them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from qcompiler import granularity as granularities
from qcompiler import precision as precisions
from qcompiler import range_choice as range_choices
from qcompiler import rounding as roundings
from qcompiler.errors import RecipeError
from qcompiler.granularity import GRANULARITIES as GRANULARITIES
from qcompiler.granularity import Granularity as Granularity
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.ranges import Estimator, MinMax
from qcompiler.numerics.types import ACTIVATION, INDEX, STREAM, WEIGHT, QuantType
from qcompiler.rules import MOST_BITS, check_encoding, check_type, estimator_of
from qcompiler.rules import Rule as Rule
from qcompiler.rules import Supergroup as Supergroup


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
      equalize: cross-layer equalization and absorption of high biases, before calibration. None: all of it with weights
        per tensor, which need it; with others factors alone, and only where channels are far apart.
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
      migrate: move channel scales between operands of products, from norms and activation functions into weights above
        all, where it lowers the products' error on the calibration data; None: no.
      rotate: turn residual streams by a Hadamard matrix, so that no channel stands out, for 4 bits.

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
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.precision is not None:
            object.__setattr__(self, "precision", precisions.named(self.precision))
        for role in MOST_BITS:
            check_type(role, f"{role} type", getattr(self, role))
        object.__setattr__(self, "granularity", granularities.named(self.granularity))
        object.__setattr__(self, "rounding", roundings.named(self.rounding))
        if self.bias_correction not in (None, "empirical", "analytic"):
            raise RecipeError(
                f"unknown bias_correction {self.bias_correction!r}; known: 'analytic', 'empirical', or None for none"
            )
        for estimator in (self.activation_range, self.index_range, self.stream_range):
            estimator_of(estimator)
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
        return estimator_of(self.stream_range if qtype.bits > MOST_BITS["index"] else by_bits)

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
    def range_choice(self) -> range_choices.OutputError | range_choices.Tiers | None:
        """How ranges are chosen beyond the estimators; None: not at all."""
        return range_choices.named(self.ranges)

    @property
    def equalizes(self) -> str:
        """Where the equalize pass moves factors: `everywhere`, where channels are `far_apart`, or `nowhere`."""
        if self.equalize is not None:
            return "everywhere" if self.equalize else "nowhere"
        return "everywhere" if granularities.named(self.granularity).channel_group is None else "far_apart"

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
#: `accurate`: the same types with all that calibration can do for them, at a multiple of the time to quantize; it pays
#: for transformers. `per_tensor`: one scale per weight, after cross-layer equalization.
NAMED = {
    "default": Recipe(),
    "accurate": Recipe(migrate=True, ranges="output_error", bias_correction="empirical"),
    "litert": LITERT,
    "int16x8": INT16X8,
    "per_tensor": Recipe(granularity="tensor"),
}


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
