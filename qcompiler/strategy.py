"""The strategy guide: what a model is made of and what is asked of it in, a recipe with reasons out.

    print(qc.recommend(model, x, size=2_000_000))
    qmodel = qc.quantize(model, batches, recipe=qc.recommend(model, x, size=2_000_000).recipe)

`TABLE` is the guide itself: condition, settings, why. All rows whose condition holds apply in their order; of two that
set one field, the later stands. It looks at weights and structure and needs no data; what only data can say (which
layers are sensitive, which activations have outliers) it leaves to the settings that measure it.
"""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qcompiler import target as targets
from qcompiler.calls import batches_of, first_of
from qcompiler.candidates import Candidate
from qcompiler.characteristics import Characteristics, WeightUse, measured
from qcompiler.errors import RecipeError
from qcompiler.flax_adapter import source_of
from qcompiler.ir import Program
from qcompiler.numerics.types import ACTIVATION, STREAM, WEIGHT, QuantType
from qcompiler.precision import Precision
from qcompiler.recipe import Recipe

#: Bits per weight that steps of groups of 32 add: one int8 each.
_GROUP_BITS = 8 / 32
#: Of all elements: so few can stay at 8 bits where the rest has 4 without being noticed in the size.
_FEW = 0.1


@dataclasses.dataclass(frozen=True)
class Constraints:
    """What is asked of the quantized model.

    Attributes:
      latency: speed goes before accuracy.
      accuracy: True: accuracy goes before speed; a number: so many percent may be lost.
      size: True: size goes before accuracy; a number: so many bytes the weights may take, codes packed, what is neither
        multiplied nor gathered in 32 bits. Multipliers and tables of functions come on top.

    Raises:
      RecipeError: other kinds of values, or speed and accuracy both first.
    """

    latency: bool = False
    accuracy: bool | float = False
    size: bool | int = False

    def __post_init__(self) -> None:
        if not isinstance(self.latency, bool):
            raise RecipeError(f"latency is True or False, got {self.latency!r}")
        for name, unit in (("accuracy", "percent that may be lost"), ("size", "bytes")):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not (0 <= value < math.inf):
                raise RecipeError(f"{name} is True, False, or a number of {unit}, got {value!r}")
        if self.latency and self.accuracy is True:
            raise RecipeError("latency and accuracy cannot both go first: say how many percent may be lost")

    @property
    def careful(self) -> bool:
        """Whether less may be lost than 8 bits everywhere cost trained nets."""
        return self.accuracy is True or (self.accuracy is not False and self.accuracy < 0.1)

    def average_bits(self, c: Characteristics) -> float:
        """Bits that each weight may have, 8 at most."""
        if self.size is True:
            return 4 + _GROUP_BITS
        if self.size is False:
            return 8.0
        return min(8.0, (self.size - 4 * c.other_elements) * 8 / max(1, c.elements))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the guide.

    Attributes:
      when: the condition in words.
      applies: the condition.
      settings: field of the recipe -> value.
      why: the reason.
    """

    when: str
    applies: Callable[[Characteristics, Constraints], bool]
    settings: Callable[[Characteristics, Constraints], Mapping[str, Any]]
    why: str


def _bits(c: Characteristics, k: Constraints) -> int:
    """Bits of the weights that the size allows, the same for all."""
    return min(8, int(k.average_bits(c)))


def _low(bits: int) -> QuantType:
    return dataclasses.replace(WEIGHT, bits=bits)


def _grouped(c: Characteristics, k: Constraints) -> bool:
    return _bits(c, k) <= 4 and k.average_bits(c) >= _bits(c, k) + _GROUP_BITS


def _fractional(c: Characteristics, k: Constraints) -> bool:
    """Whether all weights alike would leave a fraction of a bit that the size allows."""
    return k.size is not True and _bits(c, k) < k.average_bits(c) < 8


def _by_sensitivity(c: Characteristics, k: Constraints) -> Precision:
    """Widths around the one that all weights can have, and 8 bits, for as many bits on average as the size allows."""
    bits, grouped = _bits(c, k), _grouped(c, k)
    activation, granularity = STREAM if k.careful else ACTIVATION, "group32" if grouped else "channel"
    widths = sorted({max(2, bits - 1), bits, bits + 1, 8})
    candidates = {f"int{n}": Candidate(_low(n), activation, granularity) for n in widths}
    return Precision(candidates, weight_bits=k.average_bits(c) - (_GROUP_BITS if grouped else 0))


def _room(c: Characteristics, k: Constraints, chosen: Sequence[WeightUse]) -> bool:
    """Whether the size allows some weights 8 bits, and they are few."""
    elements = sum(w.elements for w in chosen)
    bits = _bits(c, k) + (_GROUP_BITS if _grouped(c, k) else 0)
    fits = elements * (8 - bits) <= (k.average_bits(c) - bits) * c.elements
    return elements <= _FEW * c.elements and (fits or k.size is True)


def _kept(c: Characteristics, k: Constraints) -> list[WeightUse]:
    """What keeps 8 bits: depthwise kernels, the first and the last layer, tables, as far as there is room."""
    layers = [w for w in c.weights if not w.rows]
    kept: list[WeightUse] = []
    for group in ([w for w in layers if w.depthwise], [*layers[:1], *layers[-1:]], [w for w in c.weights if w.rows]):
        more = [*kept, *(w for w in c.weights if w in group and w not in kept)]
        kept = more if _room(c, k, more) else kept
    return kept


def _at_eight(c: Characteristics, k: Constraints) -> dict[str, Any]:
    return {"encodings": {f"*@{glob.escape(layer)}": WEIGHT for w in _kept(c, k) for layer in w.layers}}


TABLE: tuple[Row, ...] = (
    Row(
        "always",
        lambda c, k: True,
        lambda c, k: {"weight": WEIGHT, "granularity": "channel"},
        "8 bits with a scale per output channel: the scale goes into the rescaling, which each channel has anyway",
    ),
    Row(
        "channels of a weight differ 8-fold and more in range",
        lambda c, k: c.spread >= 8,
        lambda c, k: {"granularity": "channel"},
        "with one scale per weight, the median channel would have three bits less",
    ),
    Row(
        "sigmoids, tanhs or erfs, as in SiLU and GELU",
        lambda c, k: c.curved > 0,
        lambda c, k: {"activation": QuantType(8), "activation_range": "mse"},
        "their results reach far above zero and little below, so codes are affine; the range that loses least "
        "clips the tail",
    ),
    Row(
        "products of two activations (attention)",
        lambda c, k: c.attention > 0,
        lambda c, k: {"pair_sqnr": 35.0},
        "probabilities in 8 bits cost a transformer most: operands under 35 dB get 16 bits, as two int8 products",
    ),
    Row(
        "norms before matrix products",
        lambda c, k: c.norms > 0 and c.dot_share > c.conv_share,
        lambda c, k: {"migrate": True},
        "a few channels behind a norm are far larger than the rest; their scale moves into the weights (SmoothQuant)",
    ),
    Row(
        "depthwise convolutions",
        lambda c, k: c.depthwise_share > 0,
        lambda c, k: {"bias_correction": "empirical"},
        "a depthwise channel has a handful of weights, whose rounding errors do not cancel and shift its mean "
        "(Nagel et al. 2019, section 3.2)",
    ),
    Row(
        "accuracy first, or less than 0.1 % may be lost",
        lambda c, k: k.careful,
        lambda c, k: {"activation": STREAM},
        "16-bit activations, 8-bit weights: near float, at two int8 products per layer",
    ),
    Row(
        "latency first",
        lambda c, k: k.latency,
        lambda c, k: {"activation": QuantType(8), "activation_sqnr": None},
        "no layer pays for a second int8 product; 8-bit weights meet kernels as they are, narrower ones are unpacked",
    ),
    Row(
        "the size allows less than 8 bits per weight",
        lambda c, k: _bits(c, k) < 8,
        lambda c, k: {"weight": _low(_bits(c, k))},
        "the most bits that all weights can have within it",
    ),
    Row(
        "the size allows a fraction of a bit more than that",
        _fractional,
        lambda c, k: {"precision": _by_sensitivity(c, k)},
        "spent where it helps: types per layer by measured sensitivity, as many bits on average",
    ),
    Row(
        "4 bits or fewer, and room for steps of groups",
        lambda c, k: _grouped(c, k),
        lambda c, k: {"granularity": "group32"},
        "a step for every 32 weights costs a quarter of a bit and keeps an outlier's error to its group",
    ),
    Row(
        "5 bits or fewer, mostly convolutions",
        lambda c, k: _bits(c, k) <= 5 and c.conv_share >= c.dot_share,
        lambda c, k: {"rounding": "adaround"},
        "rounding learned per layer; nearest collapses at 4 bits (DeepLabv3, W4A8: 6.1 against 70.9 mIoU, AIMET)",
    ),
    Row(
        "5 bits or fewer, mostly matrix products",
        lambda c, k: _bits(c, k) <= 5 and c.conv_share < c.dot_share,
        lambda c, k: {"rounding": "gptq"},
        "each rounded weight's error is made up for by the ones after it, in closed form, at any width",
    ),
    Row(
        "4 bits or fewer, and room for depthwise kernels, the first and the last layer, or embeddings",
        lambda c, k: _bits(c, k) <= 4 and not _fractional(c, k) and bool(_kept(c, k)),
        _at_eight,
        "they are the most sensitive, and a tenth of the weights at most",
    ),
)


@dataclasses.dataclass(frozen=True)
class Reason:
    """A row of the guide that applied: the condition, the settings that stand, the reason."""

    when: str
    settings: Mapping[str, Any]
    why: str


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """Attributes:

    recipe: with all that is advised.
    reasons: the rows of the guide that apply.
    characteristics: what the program is made of.
    constraints: what was asked.
    weight_bytes: of the weights in the bits that are advised, counted as `Constraints.size` is.
    """

    recipe: Recipe
    reasons: tuple[Reason, ...]
    characteristics: Characteristics
    constraints: Constraints
    weight_bytes: int

    def __str__(self) -> str:
        lines = [str(self.characteristics), f"after                {self.weight_bytes:,} bytes, codes packed", "advice"]
        for reason in self.reasons:
            settings = ", ".join(f"{name}={_short(value)}" for name, value in reason.settings.items())
            lines += [f"  {settings}", f"    {reason.when}: {reason.why}"]
        return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, Precision):
        return f"{', '.join(value.by_name)}, {value.weight_bits:.3g} bits on average"
    if isinstance(value, QuantType):
        return value.name
    if isinstance(value, Mapping):
        names = [f"{name}: {_short(item)}" for name, item in list(value.items())[:4]]
        return f"{{{', '.join(names)}{', ...' if len(value) > 4 else ''}}}"
    return f"{value:.3g}" if isinstance(value, float) else repr(value)


def recommend(
    model_or_fn: Any,
    example_inputs: Any,
    *,
    params: Any = None,
    variables: Any = None,
    method: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    latency: bool = False,
    accuracy: bool | float = False,
    size: bool | int = False,
    target: targets.Target | str | None = None,
) -> Recommendation:
    """A recipe for a model and what is asked of it, with reasons.

    Args:
      model_or_fn, params, variables, method, apply_kwargs: see `quantize`.
      example_inputs: an item as calibration batches hold; arrays, or `jax.ShapeDtypeStruct`s, as no value is read.
      latency, accuracy, size: see `Constraints`.
      target: what the integers run on; `xla`.

    Raises:
      RecipeError: constraints that contradict each other, or a size that 2 bits per weight do not reach.
      TraceError: the model cannot be captured.
    """
    targets.named(target)
    constraints = Constraints(latency, accuracy, size)
    source = source_of(model_or_fn, params, variables, method, apply_kwargs)
    _, first = first_of(batches_of([example_inputs], source))
    return advise(source.trace(first.args, first.kwargs), constraints)


def advise(program: Program, constraints: Constraints) -> Recommendation:
    """The same for a traced program."""
    c = measured(program)
    if constraints.average_bits(c) < 2:
        least = math.ceil(c.elements * 2 / 8) + 4 * c.other_elements
        raise RecipeError(f"size={constraints.size} cannot be reached: 2 bits per weight are {least:,} bytes")
    rows = [row for row in TABLE if row.applies(c, constraints)]
    advice: dict[str, Any] = {}
    by: dict[str, Row] = {}
    for row in rows:
        settings = row.settings(c, constraints)
        advice |= settings
        by |= dict.fromkeys(settings, row)
    standing = [(row, {name: advice[name] for name in advice if by[name] is row}) for row in rows]
    reasons = tuple(Reason(row.when, settings, row.why) for row, settings in standing if settings)
    return Recommendation(Recipe(**advice), reasons, c, constraints, _bytes(c, advice))


def _bytes(c: Characteristics, advice: Mapping[str, Any]) -> int:
    """Bytes of the weights: codes packed, biases and what else stays in 32 bits, steps of groups."""
    kept = {key.removeprefix("*@") for key in advice.get("encodings", {})}
    group = _GROUP_BITS if advice.get("granularity") == "group32" else 0.0
    precision = advice.get("precision")
    others = group + (advice["weight"].bits if precision is None else precision.weight_bits)
    bits = lambda w: 8 if {glob.escape(layer) for layer in w.layers} <= kept else others
    return math.ceil(sum(w.elements * bits(w) for w in c.weights) / 8) + 4 * c.other_elements
