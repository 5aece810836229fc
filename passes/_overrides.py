"""What a recipe says of single values, weights and layers, brought into the form in which `insert_qdq` applies it.

    encodings={"first/*": Encoding(int8, 0.1, 3)}   ->   notes["given_values"]: {"first/dot_general#0@int8": Encoding}

Given is an `Encoding` (type, scale and zero point), a `QuantType` alone, or an estimator of the range.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qcompiler.errors import RecipeError
from qcompiler.ir import patterns
from qcompiler.names import nearest
from qcompiler.numerics import types
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.histogram import Histogram
from qcompiler.numerics.ranges import Estimator
from qcompiler.numerics.types import QuantType

Given = Encoding | QuantType


class Overrides:
    """The encodings of a recipe, looked up by name.

    Args:
      encodings: pattern of a value id or weight name -> what it is given; see `Recipe.encodings`.

    Attributes:
      used: the patterns that match something.
      values: `owner@type` -> what scale and zero point of that value in that type come from, but for calibration.
      weights: `region@k` -> the same of operand k of a region.
    """

    def __init__(self, encodings: Mapping[str | re.Pattern[str], Given]) -> None:
        self._encodings = encodings
        self._patterns = [p for p in encodings if not patterns.is_exact(p)]
        self.used: set[str | re.Pattern[str]] = set()
        self.values: dict[str, Encoding | Estimator] = {}
        self.weights: dict[str, Encoding | Estimator] = {}

    def find(self, name: str, which: str) -> Given | None:
        """What a name is given: under `name@which`, under the name, or under the first pattern that matches.

        A pattern is of names, but for one with an `@`, which is of names with what stands behind it.
        """
        texts = (f"{name}@{which}", name)
        keys: list[str | re.Pattern[str]] = [t for t in texts if t in self._encodings]
        keys += [p for p in self._patterns if patterns.matches(p, texts["@" not in _text_of(p)])]
        # Those that others go before are of something all the same.
        self.used.update(keys)
        return self._encodings[keys[0]] if keys else None

    def value(self, owner: str, wanted: QuantType, role: str, range_: Any = None) -> QuantType:
        """The type in which a reader gets a value, and notes where its range comes from.

        Args:
          owner: id of the value whose scale it has.
          wanted: type that the reader would get otherwise.
          role: of the operand.
          range_: what the reader's rule gives: an estimator, an `Encoding`, or None.

        Raises:
          RecipeError: an encoding with several scales, a type that the backend has no integers for, or another range
            than a rule gave the same value before.
        """
        given = self.find(owner, wanted.name)
        by_rule = given is None and range_ is not None
        if by_rule:
            given = range_
            if isinstance(range_, Encoding) and role != "activation":
                given = FixedRange(*_range(range_))
        if given is None:
            return wanted
        if isinstance(given, Encoding | QuantType):
            given = _for_reader(owner, given, wanted, role)
        qtype = given if isinstance(given, QuantType) else given.type if isinstance(given, Encoding) else wanted
        if not isinstance(given, QuantType):
            known = self.values.setdefault(f"{owner}@{qtype.name}", given)
            if by_rule and not _same(known, given):
                raise RecipeError(
                    f"rules give {owner} in {qtype.name} two ranges, {_text(known)} and {_text(given)}, but it is "
                    "stored once: give one of them"
                )
        return qtype

    def tie(self, before: str, after: str, read: QuantType, given: QuantType | None) -> None:
        """Gives state, before a call and after it, one encoding.

        Args:
          before, after: ids of the values.
          read: type in which the call reads it.
          given: type in which the call gives it.

        Raises:
          RecipeError: the recipe gives the two different ones.
        """
        for one, other in ((before, after), (after, before)):
            for key, encoding in list(self.values.items()):
                name, _, which = key.rpartition("@")
                if name == one and not _same(self.values.setdefault(f"{other}@{which}", encoding), encoding):
                    given = None
        if given != read:
            raise RecipeError(
                f"{before} and {after} are one state, in one encoding: give both the same, or one of them"
            )

    def weight(
        self,
        name: str,
        region: str,
        k: int,
        shape: tuple[int, ...],
        layer: QuantType,
        channels: Iterable[int],
        rule: Any,
    ) -> QuantType:
        """The type of a layer's weight, and notes where its scales come from.

        Args:
          name, region, k, shape: the weight, operand k of the region.
          layer: type that the layer would give it, its granularity included.
          channels: dimensions that may have scales of their own.
          rule: what the rule gives: an estimator, an `Encoding`, or None.

        Raises:
          RecipeError: the encoding does not fit the weight.
        """
        given = self.find(name, region)
        given = rule if given is None else given
        if isinstance(given, QuantType):
            _check_bits(f"weight {name}", given, 8)
            return dataclasses.replace(given, axis=layer.axis, block_size=layer.block_size, contracted=layer.contracted)
        if isinstance(given, Encoding):
            _check_bits(f"weight {name}", given.type, 8)
            plain = layer.per_channel
            given = fitted(given, shape, plain, {*plain.axis, *channels}, f"{name} of {region}")
        elif given is not None and layer.contracted:
            raise RecipeError(
                f"a range is given for weight {name} of {region}, which is stored in groups, whose steps are chosen by "
                "their squared error: give no range, or no input_group"
            )
        if given is not None:
            self.weights[f"{region}@{k}"] = given
        return given.type if isinstance(given, Encoding) else layer

    def bias(self, name: str, region: str, k: int) -> None:
        """Notes what a bias, operand k of the region, is given by its full name: `insert_qdq` compares it."""
        key = next((key for key in (f"{name}@{region}", name) if key in self._encodings), None)
        if key is not None:
            self.used.add(key)
            self.weights[f"{region}@{k}"] = self._encodings[key]

    def check_used(self, names: Iterable[str]) -> None:
        """Raises `RecipeError` for encodings of what nothing stores; names the nearest of what there is."""
        every = sorted(set(names))
        lines = []
        for pattern in self._encodings:
            if pattern not in self.used:
                text = _text_of(pattern)
                lines.append(f"  {text}{nearest(text, every, cutoff=0.5)}")
        if lines:
            listed, some = "\n".join(lines[:20]), ", ".join(every[:8])
            raise RecipeError(
                f"{len(lines)} encodings are of nothing that is stored (values within a fused region are not, and a "
                f"view has the encoding of what it shows); there are {some}"
                f"{' ...' if len(every) > 8 else ''}:\n{listed}"
            )


def _text_of(pattern: str | re.Pattern[str]) -> str:
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern


def _for_reader(owner: str, given: Given, wanted: QuantType, role: str) -> Given:
    """What a value is given, as a reader in a role can have it: a table reads no more bits than it has entries for."""
    qtype = given.type if isinstance(given, Encoding) else given
    _check_bits(owner, qtype, 16)
    if qtype.axis or (isinstance(given, Encoding) and np.size(given.scale) != 1):
        raise RecipeError(f"the encoding of {owner} has several scales; activations have one")
    if isinstance(given, Encoding):
        scale, zero = np.reshape(given.scale, ()), np.reshape(given.zero_point, ())
        given = Encoding(qtype, scale.astype(np.float32), zero.astype(np.int32))
    if role != "index" or qtype.bits <= types.INDEX.bits:
        return given
    return (
        Encoding(wanted, *types.scale_and_zero_point(*_range(given), wanted)) if isinstance(given, Encoding) else wanted
    )


def _check_bits(what: str, qtype: QuantType, most: int) -> None:
    if qtype.bits > most:
        raise RecipeError(
            f"the encoding of {what} has {qtype.bits} bits; the integer backend takes at most {most} there"
        )


def _range(encoding: Encoding) -> tuple[float, float]:
    """The reals of the smallest and the largest code."""
    scale, zero, qtype = float(np.ravel(encoding.scale)[0]), int(np.ravel(encoding.zero_point)[0]), encoding.type
    return (qtype.qmin - zero) * scale, (qtype.qmax - zero) * scale


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Encoding) and isinstance(b, Encoding)):
        return a == b
    return a.type == b.type and np.array_equal(a.scale, b.scale) and np.array_equal(a.zero_point, b.zero_point)


def _text(given: Any) -> str:
    return f"[{_range(given)[0]:.4g}, {_range(given)[1]:.4g}]" if isinstance(given, Encoding) else repr(given)


def fitted(encoding: Encoding, shape: tuple[int, ...], layer: QuantType, free: set[int], what: str) -> Encoding:
    """An encoding laid out for a weight: scalars, or arrays of its rank with size one where one number serves all.

    Args:
      encoding: one scale; or one for each position along `type.axis`, blocks repeated and the last perhaps too long;
        or, without an axis, one for each output channel (one dimension; channels of several dimensions in row-major
        order), else as NumPy broadcasts.
      shape: of the weight.
      layer: type that the layer would give it, whose axis is kept where the scales allow it.
      free: dimensions that may have scales of their own.
      what: the weight, for messages.

    Raises:
      RecipeError: scales of another shape, or such that vary along dimensions over which the layer sums.
    """
    given, rank = encoding.type, len(shape)
    scale = np.asarray(encoding.scale, np.float32)
    zero = np.broadcast_to(np.asarray(encoding.zero_point, np.int32), scale.shape)
    base = dataclasses.replace(given, axis=(), block_size=())
    if scale.size == 1:
        return Encoding(base, scale.reshape(()), zero.reshape(()))
    dims = _dims(scale, given, shape, free, what)
    if scale.ndim == 1 < len(dims):
        scale, zero = (a.reshape([shape[d] for d in dims]) for a in (scale, zero))
    sizes = [scale.shape[scale.ndim - len(dims) + dims.index(d)] if d in dims else 1 for d in range(rank)]
    first = scale.ndim - len(dims)
    order = [*range(first), *(first + k for k in np.argsort(dims))]
    scale, zero = (a.transpose(order).reshape(sizes) for a in (scale, zero))
    for d, block in zip(given.axis, given.block_size or (1,) * len(given.axis), strict=True):
        if block > 1 and scale.shape[d] == -(-shape[d] // block) * block:
            scale, zero = (np.take(a, range(shape[d]), axis=d) for a in (scale, zero))
    if any(n not in (1, m) for n, m in zip(scale.shape, shape, strict=True)):
        raise RecipeError(f"the encoding of {what} has scales of shape {scale.shape}, the weight is {shape}")
    for d in (d for d in range(rank) if scale.shape[d] > 1):
        if all(np.array_equal(a, np.broadcast_to(np.take(a, [0], axis=d), a.shape)) for a in (scale, zero)):
            if d not in layer.axis:
                scale, zero = (np.take(a, [0], axis=d) for a in (scale, zero))
        elif d not in free:
            raise RecipeError(
                f"the encoding of {what} has other scales along dimension {d} of {shape}, over which the layer sums: "
                f"scales may differ along {sorted(free)}"
            )
    own = tuple(d for d in range(rank) if scale.shape[d] > 1)
    if not set(own) <= set(layer.axis):
        return Encoding(dataclasses.replace(base, axis=own), np.ascontiguousarray(scale), np.ascontiguousarray(zero))
    full = [shape[d] if d in layer.axis else 1 for d in range(rank)]
    scale, zero = (np.ascontiguousarray(np.broadcast_to(a, full)) for a in (scale, zero))
    qtype = dataclasses.replace(base, axis=layer.axis, block_size=layer.block_size)
    if not all(np.array_equal(a, types.over_blocks(np.minimum, a, qtype)) for a in (scale, zero)):
        qtype = dataclasses.replace(qtype, block_size=())
    return Encoding(qtype, scale, zero)


def _dims(scale: np.ndarray, given: QuantType, shape: tuple[int, ...], free: set[int], what: str) -> tuple[int, ...]:
    """The dimensions of a weight that those of its scales lie along; leading ones of more dimensions have none."""
    rank = len(shape)
    if scale.ndim == 1 and not given.axis:
        found = [d for d in sorted(free) if shape[d] == scale.size]
        if len(free) > 1 and scale.size == np.prod([shape[d] for d in free]):
            return tuple(sorted(free))
        if len(found) != 1:
            raise RecipeError(
                f"the encoding of {what} has {scale.size} scales and no axis, which are of output channels; the weight "
                f"is {shape}, with channels along {sorted(free)}"
            )
        return tuple(found)
    if scale.ndim == len(given.axis) and max(given.axis) < rank:
        return given.axis
    if scale.ndim > rank and set(scale.shape[: scale.ndim - rank]) != {1}:
        raise RecipeError(f"the encoding of {what} has scales of shape {scale.shape}, the weight is {shape}")
    return tuple(range(max(0, rank - scale.ndim), rank))


def estimated(array: np.ndarray, qtype: QuantType, estimator: Estimator) -> tuple[np.ndarray, np.ndarray]:
    """Low and high ends of a weight by an estimator, for each set of elements that share a scale.

    Returns:
      Arrays of the weight's rank with size one outside of `axis`, blocks repeated; scalars without an axis.
    """
    sizes = [array.shape[d] if d in qtype.axis else 1 for d in range(array.ndim)]
    blocks = dict(zip(qtype.axis, qtype.block_size or (1,) * len(qtype.axis), strict=True))
    low, high = np.zeros(sizes), np.zeros(sizes)
    for start in np.ndindex(*(-(-n // blocks.get(d, 1)) for d, n in enumerate(sizes))):
        at = lambda d, start=start: (
            slice(start[d] * blocks[d], (start[d] + 1) * blocks[d]) if d in blocks else slice(None)
        )
        part = tuple(map(at, range(array.ndim)))
        if not array[part].size:
            continue
        histogram = Histogram()
        histogram.update(array[part])
        low[part], high[part] = estimator.estimate(histogram.stats, qtype.qmin, qtype.qmax, qtype.symmetric)
    return (low, high) if qtype.axis else (low.reshape(()), high.reshape(()))
