"""Shifts biases by the mean error that quantization leaves in a product, channel by channel.

    y = region[conv]{ conv x w; add b; .. }      ->      the same with  b' = b - E[conv x^ w^ - conv x w]

`empirical` (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", section 4.2)
takes the expectation of the whole error, layer after layer, each fed by those before it as they were corrected. Errors
count by how much the program's outputs depend on them (`_influence`): a plain mean follows the few large values that
transformers have on some tokens, which a norm divides by themselves anyway, and shifts all others.
`analytic` takes that of the weights' error alone, `E[conv x (w^ - w)] = conv E[x] (w^ - w)`, from what the float
program reads (eq. 17), so that layers do not depend on each other. Where a norm says what a layer reads
(`_norm_means`), it takes E[x] from there, and needs no samples.

What is decided is a real shift per region; `apply` puts it into the int32 bias at any batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.errors import OverflowProofError
from qcompiler.ir import _compat, contraction, identity
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program, rewrite
from qcompiler.numerics import fixed_point, types
from qcompiler.passes import _layerwise, _norm_means, _regions
from qcompiler.passes._compiled import compiled
from qcompiler.passes._influence import Influence, influences
from qcompiler.passes._layerwise import Layer

METHODS = ("empirical", "analytic")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
      shifts: region -> what is added to its bias, real; of the rank of the product's result, of size one outside of the
        channels.
      left: region -> why its bias stays.
    """

    shifts: Mapping[str, np.ndarray]
    left: Mapping[str, str]


def decide(real: Program, simulated: Program, batches: Sequence[Sequence[Any]], method: str) -> Decision:
    """Measures the mean error of every layer that has a bias.

    Args:
      real: partitioned, in float.
      simulated: the same with QDQ pairs, rounded as it will be.
      batches: flat inputs of the programs' own shapes; `analytic` does without where norms say what layers read.
      method: `empirical` or `analytic`.

    Raises:
      CalibrationError: there is no batch, and nothing could be corrected without.
    """
    shifts: dict[str, np.ndarray] = {}
    left: dict[str, str] = {}
    influence = influences(real, batches) if method == "empirical" and batches else {}

    def visit(layer: Layer) -> _layerwise.Change | None:
        k = _bias_of(layer.eqn)
        if k is None:
            left[layer.id] = "it has no bias with a number per channel that is added to its product"
            return None
        shift = -(_weight_error(layer) if method == "analytic" else _whole_error(layer, influence.get(layer.id)))
        shifts[layer.id] = shift.astype(np.float32)
        old = np.asarray(layer.operands[0][k])
        return {k: (old.astype(np.float32) + shifts[layer.id]).astype(old.dtype)}

    if method == "analytic":
        shifts.update(_by_norms(real, simulated))
    rest = [e.params["id"] for e in _layerwise.layers_of(simulated) if e.params["id"] not in shifts]
    if batches or not shifts:
        _layerwise.walk(real, simulated, batches, visit, "correct biases", rest)
    else:
        left.update(dict.fromkeys(rest, "no norm says what it reads, and there are no samples of these shapes"))
    return Decision(shifts, left)


def _by_norms(real: Program, simulated: Program) -> dict[str, np.ndarray]:
    """Region -> its shift, where a norm says what its product reads."""
    means = _norm_means.means_of(real)
    twins = {e.params["id"]: e for e in real.eqns if _regions.is_region(e)}
    constants = Constants(simulated)
    shifts = {}
    for eqn in _layerwise.layers_of(simulated):
        anchor, position = _regions.anchor_of(eqn), _regions.weight_position(eqn)
        read = twins[eqn.params["id"]].invars[_regions.operand_index(eqn, anchor.invars[1 - position])]
        if read not in means or _bias_of(eqn) is None:
            continue
        k, weight = _layerwise.weight_behind(simulated, constants, eqn)
        off = np.asarray(constants.value(eqn.invars[k]), np.float32) - np.asarray(weight.array, np.float32)
        pair = [np.broadcast_to(means[read], read.aval.shape).astype(read.aval.dtype)] * 2
        pair[position] = off.astype(weight.array.dtype)
        shifts[eqn.params["id"]] = -_mean(anchor, position, *pair).astype(np.float32)
    return shifts


def apply(program: Program, decision: Decision) -> Program:
    """The program with QDQ pairs, with int32 biases that hold the shifts. Notes `corrected`: region -> largest shift.

    Raises:
      OverflowProofError: a bias does not fit int32.
    """
    constants, producer = Constants(program), program.producer
    arrays: dict[str, np.ndarray] = {}
    for eqn in program.eqns:
        if not _regions.is_region(eqn) or eqn.params["id"] not in decision.shifts:
            continue
        codes, scale = _encoded_bias(producer, eqn.invars[_bias_of(eqn)])
        shift = fixed_point.quantize_bias(decision.shifts[eqn.params["id"]], constants.value(scale))
        shifted = np.asarray(constants.value(codes)).astype(np.float64) + shift
        if np.abs(shifted).max(initial=0) > types.BIAS.qmax:
            raise OverflowProofError(
                f"the corrected bias of {identity.describe(eqn)} ({eqn.params['id']}) does not fit int32; rescale the "
                "layer, or leave out bias_correction"
            )
        arrays[program.weight_of[codes]] = shifted.astype(np.int32)

    corrected = rewrite(program, lambda *_: None, stage="correct_bias", weights=arrays)
    note = {region: float(np.abs(s).max(initial=0)) for region, s in decision.shifts.items()}
    return corrected.note("corrected", note).note("left_uncorrected", dict(decision.left))


def _bias_of(eqn: _compat.JaxprEqn) -> int | None:
    """The operand of a region that is added to its product, with a number per channel; None if there is none."""
    anchor = _regions.anchor_of(eqn)
    product = anchor.outvars[0]
    channels = contraction.weight_dims(anchor, _regions.weight_position(eqn))
    wanted = {k: product.aval.shape[k] for k in channels}
    for inner in _compat.open_jaxpr(eqn.params["body"]).eqns:
        if inner.primitive.name != "add" or product not in inner.invars:
            continue
        other = inner.invars[1 - inner.invars.index(product)]
        k = None if isinstance(other, _compat.Literal) else _regions.operand_index(eqn, other)
        if k is not None and eqn.params["roles"][k] == "bias" and other.aval.ndim == product.aval.ndim:
            return k if all(other.aval.shape[d] == n for d, n in wanted.items()) else None
    return None


def _encoded_bias(producer: Mapping[Any, _compat.JaxprEqn], var: Any) -> tuple[Any, Any]:
    """The variables of a bias's codes and of their scale."""
    while producer[var].primitive.name == "convert_element_type":
        var = producer[var].invars[0]
    codes, scale, _ = producer[var].invars
    return codes, scale


def _whole_error(layer: Layer, influence: Influence | None) -> np.ndarray:
    """Per channel, the mean over samples of what the product and its bias are off by."""
    anchor, bias = layer.anchor, _bias_of(layer.eqn)
    wanted = [anchor.invars[0], anchor.invars[1], _compat.invars_of(layer.eqn.params["body"])[bias]]
    product = lambda x, w: _compat.bind(anchor, (x, w))[0].astype(np.float32)
    run = compiled(("product and bias", str(anchor)), lambda: lambda x, w, b: product(x, w) + b.astype(np.float32))

    def error(batch: int) -> np.ndarray:
        simulated, real = (run(*layer.values(wanted, batch, simulated=s)) for s in (True, False))
        return np.asarray(simulated - real)

    errors = map(error, range(len(layer.operands)))
    if influence is not None:
        return influence.mean(errors)
    channels = contraction.weight_dims(anchor, _regions.weight_position(layer.eqn))
    rest = tuple(k for k in range(anchor.outvars[0].aval.ndim) if k not in channels)
    return np.mean([e.mean(axis=rest, keepdims=True, dtype=np.float64) for e in errors], axis=0)


def _weight_error(layer: Layer) -> np.ndarray:
    """Per channel, the mean over samples of the product of the float activation with the weight's error."""
    anchor, position = layer.anchor, _regions.weight_position(layer.eqn)
    off = 0.0
    for batch in range(len(layer.operands)):
        pair = layer.values(anchor.invars, batch, simulated=False)
        rounded = np.asarray(layer.operands[batch][layer.k], np.float32)
        pair[position] = (rounded - np.asarray(pair[position], np.float32)).astype(pair[position].dtype)
        off = off + _mean(anchor, position, *pair)
    return off / len(layer.operands)


def _mean(anchor: _compat.JaxprEqn, position: int, lhs: Any, rhs: Any) -> np.ndarray:
    """Mean of the product per channel, of the result's rank."""
    channels = contraction.weight_dims(anchor, position)
    rest = tuple(k for k in range(anchor.outvars[0].aval.ndim) if k not in channels)
    key = ("mean of product", str(anchor), rest)
    run = compiled(
        key, lambda: lambda *xs: _compat.bind(anchor, xs)[0].mean(axis=rest, keepdims=True, dtype=np.float32)
    )
    return np.asarray(run(lhs, rhs), np.float64)
