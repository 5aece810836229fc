"""Transposed convs (a dilated image) without multiplying by the zeros: one ordinary conv per phase of the result.

    image dilated by h, output o = s·o - low + r·k reads pixel (s·o + r·k - low) / h, where that is whole

Outputs o = h'·q + p, h' = h / gcd(s, h), of one phase p use the same elements k of the kernel, h / gcd(r, h) apart, and
read pixels s / gcd(s, h) apart from output to output and r / gcd(r, h) apart from element to element.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import windows

#: Products, zeros among them, per product needed, up to which one conv for all phases is as fast as one for each.
JOINT_WASTE = 2.25


@dataclasses.dataclass(frozen=True)
class Phase:
    """Which conv computes a phase of one dimension.

    Attributes:
      taps: elements of the kernel.
      first: pixel that the first output reads with the first of them; negative in the padding.
    """

    taps: range
    first: int


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial dimension: `outputs` results in `len(phases)` phases of `steps` each (the last may be cut short)."""

    outputs: int
    steps: int
    phases: list[Phase]
    stride: int
    spread: int

    @property
    def joint(self) -> tuple[int, int]:
        """First pixel and size of the window that holds those of all phases."""
        used = [phase for phase in self.phases if phase.taps]
        first = min(phase.first for phase in used)
        return first, max(phase.first + len(phase.taps) for phase in used) - first


def axis(size: int, window: int, stride: int, padding: tuple[int, int], hole: int, spread: int) -> Axis:
    """The phases of one dimension.

    Args:
      size: pixels of the image, as it is stored.
      window: elements of the kernel.
      stride: of the outputs, on the dilated image.
      padding: of the dilated image; negative crops.
      hole: dilation of the image.
      spread: dilation of the kernel.
    """
    outputs = windows.count((size - 1) * hole + 1 + sum(padding), window, stride, spread)
    number = hole // math.gcd(stride, hole)
    phases = []
    for p in range(number):
        reads = [p * stride + k * spread - padding[0] for k in range(window)]
        start = next((k for k, at in enumerate(reads) if at % hole == 0), None)
        taps = range(0) if start is None else range(start, window, hole // math.gcd(spread, hole))
        phases.append(Phase(taps, 0 if start is None else reads[start] // hole))
    return Axis(
        outputs, -(-outputs // number), phases, stride // math.gcd(stride, hole), spread // math.gcd(spread, hole)
    )


def conv(
    image: Any,
    kernel: Any,
    held: np.ndarray | None,
    dims: Sequence[int],
    channel: int,
    axes: Sequence[Axis],
    multiply: Callable[..., Any],
    joint: bool,
) -> Any:
    """Conv of a dilated image, int32, in the image's layout.

    Args:
      image: int8, not dilated and not padded; dilated, padded and cropped it would hold one window at least.
      kernel: int8, [*window, C, O].
      held: the kernel's values, if known.
      dims: spatial dimensions of the image.
      channel: dimension of the channels; in the result, of the features.
      axes: per spatial dimension, its phases.
      multiply: `(image, kernel, held, strides, spread) -> int32`, a conv without padding.
      joint: whether every feature reads all channels and channels are last, so that the phases may be features of one
        conv.
    """
    taps = [[len(phase.taps) for phase in a.phases] for a in axes]

    def zeros(sizes: Sequence[int]) -> Any:
        shape = dict(enumerate(image.shape)) | dict(zip(dims, sizes, strict=True)) | {channel: kernel.shape[-1]}
        return lax.full([*shape.values()], 0, jnp.int32)

    if not all(map(any, taps)):
        return zeros([a.outputs for a in axes])
    strides, spread = [a.stride for a in axes], [a.spread for a in axes]

    def reach(firsts: Sequence[int], sizes: Sequence[int]) -> Any:
        """The part of the image, zeros around it, that windows of `sizes` elements read."""
        padding = []
        for d, a, first, size in zip(dims, axes, firsts, sizes, strict=True):
            stop = first + (a.steps - 1) * a.stride + (size - 1) * a.spread + 1
            padding.append((-first, stop - image.shape[d]))
        return windows.pad(image, dims, padding)

    if (
        joint
        and max(spread) == 1
        and math.prod(a.joint[1] * len(a.phases) for a in axes) <= JOINT_WASTE * math.prod(map(sum, taps))
    ):
        firsts, sizes = zip(*(a.joint for a in axes), strict=True)
        kernels = []
        for phases in itertools.product(*(a.phases for a in axes)):
            before = [p.first - first if p.taps else 0 for p, first in zip(phases, firsts, strict=True)]
            after = [n - b - len(p.taps) for n, b, p in zip(sizes, before, phases, strict=True)]
            own = _elements(kernel, [p.taps for p in phases])
            kernels.append(windows.pad(own, range(len(axes)), list(zip(before, after, strict=True))))
        stacked = lax.concatenate(kernels, kernel.ndim - 1)
        return _depth_to_space(multiply(reach(firsts, sizes), stacked, None, strides, spread), axes)

    def phase(chosen: tuple[Phase, ...]) -> Any:
        """The results of the phases chosen for the first dimensions, and all phases of the others."""
        if len(chosen) < len(axes):
            a, d = axes[len(chosen)], dims[len(chosen)]
            parts = [lax.expand_dims(phase((*chosen, p)), (d + 1,)) for p in a.phases]
            out = lax.collapse(lax.concatenate(parts, d + 1), d, d + 2)
            return lax.slice_in_dim(out, 0, a.outputs, axis=d)
        if not all(p.taps for p in chosen):
            return zeros([a.steps for a in axes])
        own = _elements(kernel, [p.taps for p in chosen])
        known = None if held is None else held[np.ix_(*(p.taps for p in chosen))]
        part = reach([p.first for p in chosen], [len(p.taps) for p in chosen])
        return multiply(part, own, known, strides, spread)

    return phase(())


def _elements(kernel: Any, taps: Sequence[range]) -> Any:
    """Every few elements of the kernel, per dimension of the window; none for an empty range."""
    start = [t.start if t else 0 for t in taps]
    stop = [t[-1] + 1 if t else 0 for t in taps]
    rest = kernel.shape[len(taps) :]
    return lax.slice(
        kernel, (*start, *(0 for _ in rest)), (*stop, *rest), (*(t.step for t in taps), *(1 for _ in rest))
    )


def _depth_to_space(x: Any, axes: Sequence[Axis]) -> Any:
    """[N, *steps, phases * O] to [N, *outputs, O]."""
    numbers, spatial = [len(a.phases) for a in axes], len(axes)
    batch, *steps = x.shape[: spatial + 1]
    features = x.shape[-1] // math.prod(numbers)
    x = lax.reshape(x, (batch, *steps, *numbers, features))
    order = [0, *(d for k in range(spatial) for d in (1 + k, 1 + spatial + k)), 1 + 2 * spatial]
    x = lax.transpose(x, order)
    x = lax.reshape(x, (batch, *(n * m for n, m in zip(steps, numbers, strict=True)), features))
    return lax.slice(x, [0] * x.ndim, (batch, *(a.outputs for a in axes), features))
