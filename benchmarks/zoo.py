"""Convnets of every kind in integers against float JAX: islands, weights, time and SQNR of each.

    python -m benchmarks.zoo --size 96 --batch 1 --json zoo.json

Random weights with realistic BatchNorm statistics; calibrated on four images, timed on others, float and integers in
turn. Random deep nets amplify noise, so the SQNR is less than that of trained ones.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import qcompiler as qc
from qcompiler import models
from qcompiler.debug import dumps, timing
from qcompiler.debug.report import sqnr_db
from qcompiler.models import statistics

#: Name -> the untrained network: an nnx model, given `rngs`, or a linen module.
NETS: dict[str, Callable[[nnx.Rngs], nnx.Module | linen.Module]] = {
    "resnet18": lambda rngs: models.resnet18(rngs=rngs),
    "mobilenet_v2": lambda rngs: models.mobilenet_v2(rngs=rngs),
    "efficientnet_b0": lambda rngs: models.EfficientNet(rngs=rngs),
    "densenet121": lambda rngs: models.DenseNet(),
    "vgg11": lambda rngs: models.vgg(11, hidden=(512,)),
    "convnext_tiny": lambda rngs: models.ConvNeXt(rngs=rngs),
    "unet": lambda rngs: models.UNet(3, 32),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.partition("\n")[0])
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--size", type=int, default=96, help="height and width of the images, a multiple of 32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    print(
        f"jax {jax.__version__}, Python {sys.version.split()[0]}, {options.size}x{options.size}, batch {options.batch}"
    )
    print(
        f"{'net':<16} {'float ms':>9} {'int8 ms':>9} {'times float':>12} {'SQNR dB':>8} {'islands':>8} {'weights':>8}"
    )
    figures = {}
    for name in options.nets:
        figures[name] = row = measure(name, options.size, options.batch, options.rounds)
        print(f"{name:<16} {row['float_ms']:>9.2f} {row['int8_ms']:>9.2f} {row['times_float']:>12.2f} "
              f"{row['sqnr_db']:>8.1f} {row['islands']:>8} {row['weight_ratio']:>8.3f}", flush=True)  # fmt: skip
    if options.json:
        dumps.write_text(options.json, json.dumps(figures, indent=1) + "\n")
    return 0


def measure(name: str, size: int, batch: int, rounds: int) -> dict[str, Any]:
    """One row of the table; times are medians in milliseconds."""
    images = np.asarray(statistics.smooth_images(jax.random.key(1), (4 + batch, size, size, 3)))
    model, options = statistics.realistic(NETS[name](nnx.Rngs(0)), jax.random.key(0), size)
    qmodel = qc.quantize(model, [images[:4]], verify="types", **options)
    x = jnp.asarray(images[4:])
    float_model = jax.jit(qmodel.float)
    calls = {"float": lambda: float_model(x), "int8": lambda: qmodel(x)}
    times = timing.interleaved(calls, rounds)
    report = qmodel.report
    return {
        "float_ms": 1e3 * stats.median(times["float"]),
        "int8_ms": 1e3 * stats.median(times["int8"]),
        "times_float": timing.speedup(times["float"], times["int8"]),
        "sqnr_db": sqnr_db([np.asarray(float_model(x))], [np.asarray(qmodel(x))]),
        "islands": len(report.islands),
        "weight_ratio": report.weight_bytes / report.float_weight_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
