"""The pairs of a region's weights and biases: their scales, made to fit its int32 accumulator.

region[conv] x w b          ->      region[conv] x (fake_quantize w scale[channel]) (dequantize b at scale * s_x)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompiler import ops
from qcompiler.errors import OverflowProofError, QuantizationError
from qcompiler.ir import _compat, contraction, identity
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Builder, Program
from qcompiler.numerics import fixed_point, groups, types
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.ranges import Estimator
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _overrides, _regions

#: Of a bias: the step in which it is stored where its channel has no weights that decide it.
_DEAD_BIAS_STEP = 2.0**-20


class WeightPairs:
    """What stands for weights and biases in a program of typed regions.

    Args:
      program: with the types that `assign_precision` noted.
      constants: its known values.
      fractions: region -> by what the scales of its weight are to be smaller than those that cover its largest
        elements.

    Attributes:
      unfollowed: what the recipe gives biases that they cannot have, in words.
    """

    def __init__(self, program: Program, constants: Constants, fractions: Mapping[str, np.ndarray]) -> None:
        self.program, self.constants, self._weight_fractions = program, constants, fractions
        self.types: dict[str, list[QuantType | None]] = program.notes["types"]
        self.unfollowed: list[str] = []

    def first_scale(self, eqn: _compat.JaxprEqn, k: int) -> np.ndarray:
        """The scales of operand k of a region, a weight or rows, before channels are made to fit the region.

        Raises:
          QuantizationError: a range that float32 has no scale for; the weight is named.
        """
        qtype = self._type(eqn, k)
        try:
            scale = self._weight_scale(eqn, k, qtype)
        except QuantizationError as error:
            raise QuantizationError(
                f"weight {self._name(eqn.invars[k])} of {eqn.params['id']} at {identity.source_of(eqn)}: {error}; "
                "rescale the layer, or keep it in float by a qc.Rule"
            ) from error
        return (scale * self._fraction(eqn, k)).astype(np.float32) if eqn.params["roles"][k] == "weight" else scale

    def operands(
        self, builder: Builder, eqn: _compat.JaxprEqn, values: list[Any], scales: Mapping[int, np.ndarray]
    ) -> dict[int, Any]:
        """Operand -> what stands for it, of a region's weights, rows and biases.

        Args:
          builder: of the new program.
          eqn: the region.
          values: traced values of its operands.
          scales: operand -> scale: of weights and rows by `first_scale`, of activations as they are stored.

        Raises:
          QuantizationError: the scales multiply to less than any float32 number.
          OverflowProofError: a bias does not fit int32 at the scale of its accumulator.
        """
        roles, fitted, out = eqn.params["roles"], dict(scales), {}
        for k in (k for k, role in enumerate(roles) if role == "rows"):
            out[k] = self._weight(builder, eqn, k, values[k], self._type(eqn, k), fitted[k])
        if _regions.anchor_of(eqn) is None:
            return out
        self._keep_accumulator_normal(eqn, fitted)
        self._make_room_for_bias(eqn, fitted)
        for k in (k for k in fitted if self._type(eqn, k).contracted):
            fitted[k] = groups.round_up(fitted[k])
        for k in (k for k, role in enumerate(roles) if role == "weight"):
            out[k] = self._weight(builder, eqn, k, values[k], self._type(eqn, k), fitted[k])
        scale = _regions.accumulator_scale(eqn, fitted)
        traced = builder.weight(f"{eqn.params['id']}:accumulator/scale", scale)
        for k in (k for k, role in enumerate(roles) if role == "bias"):
            out[k] = self._bias(builder, eqn, k, scale, traced)
        return out

    def _type(self, eqn: _compat.JaxprEqn, k: int) -> Any:
        return self.types[eqn.params["id"]][k]

    def _name(self, var: Any) -> str:
        return self.program.ids[var].removeprefix("weight:")

    def _given_weight(self, eqn: _compat.JaxprEqn, k: int) -> Encoding | Estimator | None:
        """What the recipe gives operand k of a region, a weight or a bias."""
        return self.program.notes.get("given_weights", {}).get(f"{eqn.params['id']}@{k}")

    def _weight_range(self, eqn: _compat.JaxprEqn, k: int, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the elements that share a scale, as `types.extremes`, or as the recipe estimates them."""
        given, array = self._given_weight(eqn, k), self.constants.value(eqn.invars[k])
        return (
            _overrides.estimated(array, qtype, given) if isinstance(given, Estimator) else types.extremes(array, qtype)
        )

    def _weight_scale(self, eqn: _compat.JaxprEqn, k: int, qtype: QuantType) -> np.ndarray:
        """The scales of a weight before its channels are made to fit the region."""
        given = self._given_weight(eqn, k)
        if isinstance(given, Encoding):
            return given.scale
        if qtype.contracted:
            return channel_scale(self.constants.value(eqn.invars[k]), qtype)
        return types.scale_and_zero_point(*self._weight_range(eqn, k, qtype), qtype)[0]

    def _weight(
        self, builder: Builder, eqn: _compat.JaxprEqn, k: int, value: Any, qtype: QuantType, scale: np.ndarray
    ) -> Any:
        var, given = eqn.invars[k], self._given_weight(eqn, k)
        array = self.constants.value(var)
        name = f"{self._name(var)}:{qtype.name}"
        if qtype.contracted:
            name += "" if np.array_equal(channel_scale(array, qtype), scale) else f"@{eqn.params['id']}"
            return _in_groups(builder, name, value, groups.choose(array, qtype, scale))
        if isinstance(given, Encoding):
            zero = given.zero_point
        else:
            # A smaller range is one around zero of the same form.
            low = self._weight_range(eqn, k, qtype)[0]
            low = low * self._fraction(eqn, k) if eqn.params["roles"][k] == "weight" else low
            zero = types.zero_point_for(low, scale, qtype)
        plain = weight_scale(array, qtype)
        name += "" if np.array_equal(plain[0], scale) and np.array_equal(plain[1], zero) else f"@{eqn.params['id']}"
        scale, zero = builder.weight(f"{name}/scale", scale), builder.weight(f"{name}/zero_point", zero)
        return ops.fake_quantize(value, scale, zero, qtype)

    def _fraction(self, eqn: _compat.JaxprEqn, k: int) -> Any:
        """What the scales of a region's weight are of those that cover its largest elements; 1 where they are given."""
        if isinstance(self._given_weight(eqn, k), Encoding):
            return np.float32(1)
        return self._weight_fractions.get(eqn.params["id"], np.float32(1))

    def _keep_accumulator_normal(self, eqn: _compat.JaxprEqn, scales: dict[int, np.ndarray]) -> None:
        """Raises scales of channels next to zero whose product with the input's would underflow float32."""
        position, anchor = _regions.weight_position(eqn), _regions.anchor_of(eqn)
        factors = [scales[_regions.operand_index(eqn, v)].astype(np.float64) for v in _regions.anchored(anchor)]
        k = None if position is None else _regions.operand_index(eqn, anchor.invars[position])
        given = k is not None and isinstance(self._given_weight(eqn, k), Encoding)
        # Scales that are given are not raised.
        extreme = np.min if given else np.max
        if np.prod([extreme(f) for f in factors if f.size]) < types.SMALLEST_NORMAL:
            raise QuantizationError(
                f"{identity.describe(eqn)} ({eqn.params['id']}): the scales of its operands multiply to less than any "
                "float32 number; rescale the layer, or keep it in float by a qc.Rule"
            )
        if k is not None and not given:
            least = 2 * types.SMALLEST_NORMAL / factors[1 - position]
            scales[k] = np.maximum(scales[k], least).astype(np.float32)

    def _make_room_for_bias(self, eqn: _compat.JaxprEqn, scales: dict[int, np.ndarray]) -> None:
        """Raises scales of channels next to zero whose bias would not fit, at most to that of the largest channel.

        Channels of nothing but zeros may have any scale, so they get one that shows their bias finely.
        """
        position = _regions.weight_position(eqn)
        bias = next((v for v, role in zip(eqn.invars, eqn.params["roles"], strict=True) if role == "bias"), None)
        if position is None or bias is None:
            return
        anchor = _regions.anchor_of(eqn)
        k = _regions.operand_index(eqn, anchor.invars[position])
        if isinstance(self._given_weight(eqn, k), Encoding):
            return
        qtype, array = self.types[eqn.params["id"]][k], self.constants.value(eqn.invars[k])
        unit = _regions.accumulator_scale(eqn, {**scales, k: np.ones_like(scales[k])})
        fine = np.abs(self.constants.value(bias).astype(np.float64)) / unit * _DEAD_BIAS_STEP
        channels = qtype.per_channel
        fine = contraction.on_weight(fine, anchor, position) if channels.axis else np.max(fine)
        dead = ~np.any(array, axis=tuple(d for d in range(array.ndim) if d not in channels.axis), keepdims=True)
        wanted = dead.reshape(scales[k].shape) & (fine > types.SMALLEST_SCALE)
        scales[k] = np.where(wanted, fine, scales[k]).astype(np.float32)
        if not channels.axis:
            return
        codes = fixed_point.quantize_bias(self.constants.value(bias), _regions.accumulator_scale(eqn, scales))
        over = contraction.on_weight(np.abs(codes) / 2.0**30, anchor, position)
        over = types.over_blocks(np.maximum, np.broadcast_to(over, scales[k].shape), channels)
        raised = np.minimum(scales[k] * np.maximum(over, 1.0), scales[k].max())
        scales[k] = np.where(over > 1.0, raised, scales[k]).astype(np.float32)

    def _bias(self, builder: Builder, eqn: _compat.JaxprEqn, k: int, scale: np.ndarray, traced: Any) -> Any:
        codes = fixed_point.quantize_bias(self.constants.value(eqn.invars[k]), scale)
        if np.abs(codes).max(initial=0) > types.BIAS.qmax:
            raise OverflowProofError(
                f"the bias of {identity.describe(eqn)} ({eqn.params['id']}) is {np.abs(codes).max():.3g} steps of its "
                f"accumulator's scale {float(np.min(scale)):.3g} and does not fit int32: its weights or its input's "
                "range are far too small for it; rescale the layer, or keep it in float by a qc.Rule"
            )
        self._compare_bias(eqn, k, scale)
        q = builder.weight(f"{eqn.params['id']}:bias/int32", codes.astype(np.int32))
        zero = builder.weight("zero", np.zeros((), np.int32))
        value = ops.dequantize(q, traced, zero, types.BIAS)
        return value.astype(eqn.invars[k].aval.dtype)

    def _compare_bias(self, eqn: _compat.JaxprEqn, k: int, scale: np.ndarray) -> None:
        """Notes what the recipe gives a bias, where it is not the scale that the bias has by its operands."""
        given = self._given_weight(eqn, k)
        if given is None:
            return
        scales = np.sort(np.unique(given.scale)) if isinstance(given, Encoding) else np.zeros(0)
        own = np.sort(np.unique(scale))
        # A part in a thousand is far less than a bias loses by it, and more than float32 or a file's digits do.
        if scales.shape != own.shape or not np.allclose(scales, own, rtol=1e-3, atol=0.0):
            name = self._name(eqn.invars[k])
            self.unfollowed.append(
                f"the encoding of the bias {name}: it is int32 at the product of the scales of input and weight of "
                f"{eqn.params['id']}, from {own[0]:.3g} to {own[-1]:.3g}"
            )


def _in_groups(builder: Builder, name: str, value: Any, found: groups.Groups) -> Any:
    """A weight behind a pair whose scale is made of the channels' and the groups', which the program holds apart."""
    shape, qtype = value.shape, found.type
    scale, steps = builder.weight(f"{name}/scale", found.channel), builder.weight(f"{name}/steps", found.steps)
    each = groups.expand(steps, shape, qtype).astype(np.float32) * scale
    if qtype.symmetric:
        zeros = builder.weight(f"{name}/zero_point", np.zeros((), np.int32))
    else:
        held = builder.weight(f"{name}/zero_point", found.zero_points)
        zeros = groups.expand(held, shape, qtype).astype(np.int32)
    return ops.fake_quantize(value, each, zeros, qtype)


def weight_scale(array: np.ndarray, qtype: QuantType) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a weight as `fake_quantize` takes them: float32 and int32, broadcastable to it.

    From the extremes of what shares a scale; in groups, from the least squared error of each (`groups.choose`).
    """
    if qtype.contracted:
        found = groups.choose(array, qtype)
        return found.scale(array.shape), found.zero_point(array.shape)
    return types.scale_and_zero_point(*types.extremes(array, qtype), qtype)


def channel_scale(array: np.ndarray, qtype: QuantType) -> np.ndarray:
    """The float scale of a weight's integers in an int32 sum, along which all are the same: one per channel at most."""
    return groups.channel_scale(array, qtype) if qtype.contracted else weight_scale(array, qtype)[0]
