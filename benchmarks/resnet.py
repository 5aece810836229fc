"""ResNet in integers against float JAX, all contenders in one run, interleaved.

    python benchmarks/resnet.py --depth 50 --size 224 --batches 1 8 --json resnet50.json

Random weights with realistic BatchNorm statistics (`models.statistics`); the images calibrated on and timed on differ.
Contenders: `float` is the model under `jax.jit` with its weights as constants; `float folded` the same after our
`fold_norms`, so that folding is not counted as a gain of integers; `float arguments` passes the weights; `int8` is
ours.
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qcompiler as qc
from qcompiler import pipeline
from qcompiler.debug import dumps, timing
from qcompiler.debug.report import sqnr_db
from qcompiler.models import resnet, statistics


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=50, choices=(18, 34, 50, 101, 152))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--calibration", type=int, default=4, help="calibration images")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()

    model = getattr(resnet, f"resnet{options.depth}")(rngs=nnx.Rngs(0))
    model = statistics.calibrate_batch_norm(model, jax.random.key(0), options.size)
    shape = (options.calibration + max(options.batches), options.size, options.size, 3)
    images = np.asarray(statistics.smooth_images(jax.random.key(1), shape))
    calibration, images = images[: options.calibration], images[options.calibration :]

    start = time.perf_counter()
    qmodel = qc.quantize(model, [calibration], recipe=options.recipe)
    seconds = time.perf_counter() - start
    report = qmodel.report
    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}")
    print(f"ResNet-{options.depth}, {options.size}x{options.size}, recipe {options.recipe}")
    print(f"qc.quantize with verification, {options.calibration} calibration images: {seconds:.1f} s")
    print(f"islands {len(report.islands)}, QDQ pairs {report.qdq_pairs_before} -> {report.qdq_pairs_after}, "
          f"weights {report.float_weight_bytes:,} -> {report.weight_bytes:,} bytes "
          f"({report.weight_bytes / report.float_weight_bytes:.3f})")  # fmt: skip
    figures: dict[str, Any] = {
        "jax": jax.__version__,
        "depth": options.depth,
        "size": options.size,
        "recipe": options.recipe,
        "quantize_seconds": seconds,
        "islands": len(report.islands),
        "pairs_left": report.qdq_pairs_after,
        "weight_ratio": report.weight_bytes / report.float_weight_bytes,
        "batches": {},
    }
    print(f"\n{'batch':>5} {'contender':<16} {'median ms':>10} {'min ms':>8} {'times float':>12} {'SQNR dB':>8}")
    for batch in options.batches:
        x = jnp.asarray(images[:batch])
        calls = contenders(model, qmodel, x)
        times = timing.interleaved(calls, options.rounds)
        reference = np.asarray(calls["float"]())
        figures["batches"][batch] = rows = {}
        for name, seconds in times.items():
            sqnr = sqnr_db([reference], [np.asarray(calls[name]())])
            rows[name] = {
                "median_ms": 1e3 * stats.median(seconds),
                "min_ms": 1e3 * min(seconds),
                "times_float": timing.speedup(times["float"], seconds),
                "sqnr_db": sqnr,
            }
            median, least, times_float = (rows[name][k] for k in ("median_ms", "min_ms", "times_float"))
            print(f"{batch:>5} {name:<16} {median:>10.2f} {least:>8.2f} {times_float:>12.2f} {sqnr:>8.1f}")
    if options.json:
        dumps.write_text(options.json, json.dumps(figures, indent=1) + "\n")
    return 0


def contenders(model: Any, qmodel: qc.QuantizedModel, x: jax.Array) -> dict[str, Any]:
    """Calls on a batch, by name."""
    graphdef, state = nnx.split(model)
    constant = jax.jit(lambda x: nnx.merge(graphdef, state)(x))
    argument = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    program = qc.trace(model, x).program
    for name in ("simplify", "fold_norms"):
        program = pipeline.PASSES[name](program, None)
    folded = jax.jit(lambda x: program(x)[0])
    return {
        "float": lambda: constant(x),
        "float folded": lambda: folded(x),
        "float arguments": lambda: argument(state, x),
        "int8": lambda: qmodel(x),
    }


if __name__ == "__main__":
    sys.exit(main())
