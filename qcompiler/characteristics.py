"""What a program is made of, as far as it bears on how to quantize it: measured on the traced program, without data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from qcompiler import ops, pipeline
from qcompiler.debug import report
from qcompiler.ir import Program, _compat, classes, contraction, loops
from qcompiler.ir.constants import Constants
from qcompiler.passes import _regions
from qcompiler.recipe import Recipe

#: Curved functions that are close to linear on one side: their results reach a little below zero and far above.
_CURVED = frozenset({"logistic", "erf", "tanh"})


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """A weight of a product, or a table that rows are gathered from.

    Attributes:
      layers: ids of the regions that read it.
      elements: how many.
      depthwise: of a convolution that sums over one input channel.
      rows: gathered, not multiplied.
      spread: largest range of an output channel over the median one, at least 1.
    """

    layers: tuple[str, ...]
    elements: int
    depthwise: bool
    rows: bool
    spread: float


@dataclasses.dataclass(frozen=True)
class Characteristics:
    """Attributes:

    float_bytes: bytes of all weights as they were given.
    weights: of products and tables, in program order; one that is read twice counts once.
    other_elements: of weights that are neither, biases and constants.
    dot_share, conv_share: of the multiply-adds, 0 to 1: products of matrices with weights, and convolutions.
    attention: products of two activations.
    norms: regions with a root of a statistic in them.
    curved: tables and wide regions of sigmoid, tanh or erf, as SiLU and GELU are.
    island_share: of the multiply-adds, what stays float, 0 to 1.
    """

    float_bytes: int
    weights: tuple[WeightUse, ...]
    other_elements: int
    dot_share: float
    conv_share: float
    attention: int
    norms: int
    curved: int
    island_share: float

    @property
    def elements(self) -> int:
        """Of all weights of products and tables."""
        return sum(w.elements for w in self.weights)

    @property
    def depthwise_share(self) -> float:
        """Of the elements, those of depthwise kernels, 0 to 1."""
        return sum(w.elements for w in self.weights if w.depthwise) / max(1, self.elements)

    @property
    def embedding_share(self) -> float:
        """Of the elements, those of tables, 0 to 1."""
        return sum(w.elements for w in self.weights if w.rows) / max(1, self.elements)

    @property
    def spread(self) -> float:
        """The largest spread of a weight."""
        return max((w.spread for w in self.weights), default=1.0)

    def __str__(self) -> str:
        layers = sum(not w.rows for w in self.weights)
        lines = [
            f"weights              {self.float_bytes:,} bytes in float; {self.elements:,} elements of {layers} layers",
            f"depthwise            {self.depthwise_share:.1%} of the elements",
            f"embedding            {self.embedding_share:.1%} of the elements",
            f"channel spread       {self.spread:.3g} (largest over median range of a weight's channels)",
            f"multiply-adds        {self.conv_share:.0%} convolutions, {self.dot_share:.0%} matrix products by weights",
            f"attention            {self.attention} products of two activations",
            f"norms, curves        {self.norms} norms, {self.curved} sigmoids, tanhs or erfs",
        ]
        if self.island_share:
            lines.append(f"stays float          {self.island_share:.1%} of the multiply-adds")
        return "\n".join(lines)


def measured(program: Program) -> Characteristics:
    """The characteristics of a traced program."""
    float_bytes = report.weight_bytes(program.weights.values())
    manager = pipeline.retracing_manager()
    for name in ("simplify", "fold_norms", "partition"):
        program = manager.run(name, program, Recipe())
    regions = [(part, eqn) for part in loops.nested(program) for eqn in part.eqns if eqn.primitive is ops.region_p]
    weights: dict[str, WeightUse] = {}
    macs = dict.fromkeys(("dot_general", "conv_general_dilated", "both"), 0)
    attention = norms = curved = 0
    for part, eqn in regions:
        for name, use in _weights(part, eqn):
            before = weights[name].layers if name in weights else ()
            weights[name] = dataclasses.replace(use, layers=(*before, *use.layers))
        body = _compat.open_jaxpr(eqn.params["body"]).eqns
        names = {e.primitive.name for e in body}
        norms += bool(names & {"rsqrt", "sqrt"}) and bool(names & classes.ADDING)
        curved += bool(names & _CURVED)
        attention += eqn.params["kind"] == "dot" and eqn.params["roles"].count("activation") == 2
        anchor = _regions.anchor_of(eqn)
        if anchor is not None and anchor.primitive.name in classes.PRODUCT:
            kind = anchor.primitive.name if _regions.weight_position(eqn) is not None else "both"
            macs[kind] += part.notes.get("steps", 1) * classes.multiply_adds(anchor)
    total = max(1, sum(macs.values()))
    every = {n: int(np.prod(np.shape(w))) for part, _ in regions for n, w in part.weights.items()}
    return Characteristics(
        float_bytes=float_bytes,
        weights=tuple(weights.values()),
        other_elements=sum(every.values()) - sum(w.elements for w in weights.values()),
        dot_share=macs["dot_general"] / total,
        conv_share=macs["conv_general_dilated"] / total,
        attention=attention,
        norms=norms,
        curved=curved,
        island_share=sum(i.mac_share for i in report.islands_of(program)),
    )


def _weights(part: Program, eqn: _compat.JaxprEqn) -> Iterator[tuple[str, WeightUse]]:
    """Name and use of each weight of a region."""
    constants = Constants(part)
    for var, role in zip(eqn.invars, eqn.params["roles"], strict=True):
        if role not in ("weight", "rows") or var not in part.ids:
            continue
        array, anchor = np.abs(np.asarray(constants.value(var), np.float32)), _regions.anchor_of(eqn)
        position = _regions.weight_position(eqn) if role == "weight" else None
        channels = contraction.channel_dims(anchor, position) if anchor is not None and position is not None else ()
        depthwise = role == "weight" and _is_depthwise(anchor)
        use = WeightUse((eqn.params["id"],), int(array.size), depthwise, role == "rows", _spread(array, channels))
        yield part.ids[var].removeprefix("weight:"), use


def _is_depthwise(anchor: Any) -> bool:
    """Whether a convolution has as many groups as input channels, and more than one."""
    if anchor.primitive.name != "conv_general_dilated":
        return False
    channels = anchor.invars[0].aval.shape[anchor.params["dimension_numbers"].lhs_spec[1]]
    return 1 < anchor.params["feature_group_count"] == channels


def _spread(array: np.ndarray, channels: tuple[int, ...]) -> float:
    """Largest over median range of the channels that are not nothing but zeros."""
    rest = tuple(d for d in range(array.ndim) if d not in channels)
    ranges = array.max(axis=rest, initial=0.0).ravel()
    ranges = ranges[ranges > 0]
    return float(ranges.max() / np.median(ranges)) if ranges.size else 1.0
