"""Convs and pools in int8, with their epilogue, against float JAX; all contenders of a shape interleaved.

    python benchmarks/products.py --only depthwise stem --json products.json

Contenders: `float` is XLA's own op with bias and ReLU6; `float shifted` (depthwise) the same as shifted multiply-adds;
`int8` the backend's form with the epilogue of the integer program: bias, rescale by a 31-bit multiplier per channel,
zero point, clamp, int8. Weights are constants, images are padded inside, ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.backends.lax_int import products, windows
from qcompiler.debug import dumps, timing
from qcompiler.numerics import fixed_point
from qcompiler.numerics.types import QuantType


@dataclasses.dataclass(frozen=True)
class Conv:
    """A channels-last conv of one image of `size`."""

    kind: str
    size: tuple[int, ...]
    channels: int
    kernel: tuple[int, ...]
    features: int
    stride: int = 1
    groups: int = 1
    hole: int = 1

    @property
    def label(self) -> str:
        times = "x".join
        text = f"{times(map(str, self.size))}x{self.channels} {times(map(str, self.kernel))} to {self.features}"
        options = {"stride": self.stride, "groups": self.groups, "image dilation": self.hole}
        return text + "".join(f", {name} {n}" for name, n in options.items() if n != 1)

    @property
    def params(self) -> dict[str, Any]:
        """As in an equation; padding SAME (for a dilated image: the result is `hole` times as large)."""
        rank, spatial = len(self.size), "DHW"[-len(self.size) :]
        names = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        shapes = (1, *self.size, self.channels), (*self.kernel, self.channels // self.groups, self.features)
        if self.hole == 1:
            padding = lax.padtype_to_pads(self.size, self.kernel, [self.stride] * rank, "SAME")
        else:
            padding = [((k + self.hole - 2) // 2 + (k + self.hole) % 2, (k + self.hole - 2) // 2) for k in self.kernel]
        return {
            "window_strides": (self.stride,) * rank, "padding": padding, "lhs_dilation": (self.hole,) * rank,
            "rhs_dilation": (1,) * rank, "dimension_numbers": lax.conv_dimension_numbers(*shapes, names),
            "feature_group_count": self.groups, "batch_group_count": 1,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pool:
    """Average pooling of one image, without padding for `stride` > 1, else SAME."""

    kind: str
    size: tuple[int, int]
    channels: int
    window: int
    stride: int

    @property
    def label(self) -> str:
        height, width = self.size
        return f"{height}x{width}x{self.channels} {self.window}x{self.window}, stride {self.stride}"


OPS = [
    *(Conv("depthwise", (n, n), c, (k, k), c, s, c) for n, c, k, s in (
        (112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 3, 1), (56, 144, 3, 2), (28, 192, 3, 1), (14, 384, 3, 1),
        (14, 576, 3, 2), (7, 960, 3, 1), (56, 96, 7, 1), (28, 240, 5, 1),
    )),
    Conv("depthwise", (56, 56), 32, (3, 3), 64, 1, 32),
    Conv("grouped", (56, 56), 128, (3, 3), 128, 1, 32),
    Conv("grouped", (28, 28), 256, (3, 3), 256, 1, 32),
    Conv("grouped", (28, 28), 240, (1, 1), 240, 1, 3),
    Conv("3-D", (16, 28, 28), 3, (3, 3, 3), 32),
    Conv("3-D", (8, 16, 16), 64, (3, 3, 3), 64),
    Conv("transposed", (28, 28), 128, (2, 2), 64, hole=2),
    Conv("transposed", (28, 28), 64, (4, 4), 32, hole=2),
    Conv("transposed", (14, 14), 128, (3, 3), 128, hole=2),
    Conv("stem", (224, 224), 3, (7, 7), 64, 2),
    Conv("stem", (224, 224), 3, (3, 3), 32, 2),
    Conv("stem", (32, 32), 3, (3, 3), 64),
    Conv("few channels", (56, 56), 8, (3, 3), 16),
    Conv("few channels", (56, 56), 16, (3, 3), 16),
    Conv("few channels", (56, 56), 64, (3, 3), 1),
    Conv("few channels", (56, 56), 64, (1, 1), 1),
    Pool("pool", (56, 56), 64, 2, 2),
    Pool("pool", (56, 56), 64, 3, 1),
    Pool("pool", (28, 28), 192, 5, 1),
    Pool("pool", (28, 28), 64, 14, 1),
]  # fmt: skip


def main() -> int:
    kinds = list(dict.fromkeys(op.kind for op in OPS))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="KIND", help=", ".join(kinds))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}")
    print(f"{'kind':<13}{'shape':<46}{'contender':<15}{'median ms':>10}{'min ms':>8}{'times float':>13}")
    rows = []
    for op in OPS:
        if op.kind not in options.only:
            continue
        times = timing.interleaved((conv if isinstance(op, Conv) else pool)(op), options.rounds)
        for name, seconds in times.items():
            row = {
                "kind": op.kind,
                "shape": op.label,
                "contender": name,
                "median_ms": 1e3 * statistics.median(seconds),
                "min_ms": 1e3 * min(seconds),
                "times_float": timing.speedup(times["float"], seconds),
            }
            rows.append(row)
            print(f"{op.kind:<13}{op.label:<46}{name:<15}{row['median_ms']:>10.3f}{row['min_ms']:>8.3f}"
                  f"{row['times_float']:>13.2f}", flush=True)  # fmt: skip
    if options.json:
        dumps.write_text(options.json, json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")
    return 0


def conv(op: Conv) -> dict[str, Callable[[], Any]]:
    """Calls by contender."""
    rng = np.random.default_rng(0)
    params = op.params
    kernel = np.clip(
        np.rint(rng.normal(scale=40, size=(*op.kernel, op.channels // op.groups, op.features))), -127, 127
    ).astype(np.int8)
    bias = rng.integers(-1000, 1000, op.features).astype(np.int32)
    image = rng.integers(-128, 128, (1, *op.size, op.channels)).astype(np.int8)
    depth = kernel.size // op.features
    epilogue = _epilogue(bias, 1 / (40 * np.sqrt(depth)) * rng.uniform(0.5, 2, op.features), 127 * 127 * depth)
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count")
    ordinary = {name: params[name] for name in names}

    def floating(x: Any) -> Any:
        return jnp.clip(lax.conv_general_dilated(x, kernel.astype(np.float32), **ordinary) + np.float32(bias), 0, 6)

    def shifted(x: Any) -> Any:
        dims = range(1, x.ndim - 1)
        x = windows.pad(x, dims, params["padding"])
        taps = kernel.reshape(-1, op.features).astype(np.float32)
        views = windows.views(x, dims, op.kernel, params["window_strides"], params["rhs_dilation"])
        return jnp.clip(sum(v * t for (_, v), t in zip(views, taps, strict=True)) + np.float32(bias), 0, 6)

    calls = {"float": _call(floating, image.astype(np.float32))}
    if op.groups == op.channels == op.features:
        calls["float shifted"] = _call(shifted, image.astype(np.float32))
    return calls | {"int8": _call(lambda x: epilogue(products.conv(x, jnp.asarray(kernel), params, kernel)), image)}


def pool(op: Pool) -> dict[str, Callable[[], Any]]:
    """Calls by contender; `int8 reduce_window` is XLA's op on int32."""
    image = np.random.default_rng(0).integers(-128, 128, (1, *op.size, op.channels)).astype(np.int8)
    window, strides = (1, op.window, op.window, 1), (1, op.stride, op.stride, 1)
    padding = lax.padtype_to_pads(image.shape, window, strides, "VALID" if op.stride > 1 else "SAME")
    epilogue = _epilogue(np.zeros(op.channels, np.int32), np.full(op.channels, 1 / op.window**2), 128 * op.window**2)

    def floating(x: Any) -> Any:
        return lax.reduce_window(x, np.float32(0), lax.add, window, strides, padding) / np.float32(op.window**2)

    def generic(x: Any) -> Any:
        return epilogue(lax.reduce_window(x.astype(jnp.int32), np.int32(0), lax.add, window, strides, padding))

    def ours(x: Any) -> Any:
        return epilogue(windows.window_sum(x.astype(jnp.int32), window, strides, padding))

    return {
        "float": _call(floating, image.astype(np.float32)),
        "reduce_window": _call(generic, image),
        "int8": _call(ours, image),
    }


def _epilogue(bias: np.ndarray, ratio: np.ndarray, bound: float) -> Callable[[Any], Any]:
    """int32 sums to int8 codes, as `rules.quantize_real` makes them."""
    multiplier = fixed_point.multiplier_for(ratio, bound)

    def apply(total: Any) -> Any:
        widened = dataclasses.replace(
            multiplier,
            **{
                name: np.reshape(value, (1,) * (total.ndim - 1) + np.shape(value))
                for name, value in vars(multiplier).items()
                if value is not None
            },
        )
        shifted = fixed_point.rescale(total + bias, widened) + np.int32(-5)
        return fixed_point.clamp_to(shifted, QuantType(8))

    return apply


def _call(fun: Callable[[Any], Any], x: np.ndarray) -> Callable[[], Any]:
    compiled, held = jax.jit(fun), jnp.asarray(x)
    return lambda: compiled(held)


if __name__ == "__main__":
    sys.exit(main())
