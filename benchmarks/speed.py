"""Speed and accuracy of a model in integers against float JAX and its peers, in one run.

    python -m benchmarks.speed --model resnet50 --size 224 --batches 1 8 --json resnet50.json --plot resnet50.png

Random weights with realistic BatchNorm statistics; the same calibration images for all, and others to time on. Every
SQNR is that of the logits against float JAX on the batch that is timed. Contenders take turns, round after round, so
that a drift of the machine meets all alike; `times float` is the median of the ratios within each round.

All use the same number of threads, every core of the process. Peers that are no JAX run in processes of their own: in
one process thread pools meet (onnxruntime's threads spin for a while after a call), OpenVINO's tools fork, which JAX
warns of, and a crash would end the run. A time is taken inside the process, around the call alone. Before each there is
a pause in which the others' threads fall asleep, and one call that is not timed, so that everyone starts with caches
of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qcompiler as qc
from benchmarks import models, peers_onnx
from benchmarks.contenders import CONTENDERS, Call, Subject, Unavailable
from qcompiler.debug import dumps, timing
from qcompiler.debug.report import sqnr_db
from qcompiler.models.statistics import smooth_images

#: Calibration is measured on this many batches after the first, which compiles.
_CALIBRATION_BATCHES = 5


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.plot:
        from benchmarks import plot  # Before the hours of work that a missing matplotlib would waste.
    figures = measure(options)
    if options.json:
        dumps.write_text(options.json, json.dumps(figures, indent=1, allow_nan=False) + "\n")
    if options.plot:
        plot.draw(figures, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet50", choices=sorted(models.MODELS))
    parser.add_argument("--size", type=int, help="height and width of the images; the model's own by default")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    listed = f"of {', '.join(CONTENDERS)}; float always takes part"
    parser.add_argument(
        "--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, metavar="NAME", help=listed
    )
    parser.add_argument("--calibration", type=int, default=16, help="calibration images")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds before each call")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here (.png, .svg, .pdf); needs matplotlib")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the command measures; prints as it goes. JSON-like."""
    with contextlib.ExitStack() as resources:
        return _measure(options, resources)


def _measure(options: argparse.Namespace, resources: contextlib.ExitStack) -> dict[str, Any]:
    size = options.size or models.MODELS[options.model].size
    model, shifted = models.build(options.model, size)
    shape = (options.calibration + max(options.batches), size, size, 3)
    images = np.asarray(smooth_images(jax.random.key(1), shape))
    calibration, images = images[: options.calibration], images[options.calibration :]

    start = time.perf_counter()
    qmodel = qc.quantize(model, [calibration], recipe=options.recipe)
    seconds = time.perf_counter() - start
    report = qmodel.report
    subject = Subject(model, shifted, calibration, qmodel, resources)
    figures: dict[str, Any] = {
        "model": options.model,
        "size": size,
        "recipe": options.recipe,
        "calibration_images": options.calibration,
        "rounds": options.rounds,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.default_backend(),
        "threads": peers_onnx.threads(),
        "quantize_seconds": seconds,
        "calibration": calibration_cost(model, calibration, options.recipe),
        "islands": len(report.islands),
        "qdq_pairs_before": report.qdq_pairs_before,
        "qdq_pairs_after": report.qdq_pairs_after,
        "weight_bytes": report.weight_bytes,
        "float_weight_bytes": report.float_weight_bytes,
        "weight_ratio": report.weight_bytes / report.float_weight_bytes,
    }
    _print_head(figures)
    prepared, figures["skipped"] = prepare(subject, options.contenders)
    figures["batches"] = {}
    print(f"\n{'batch':>5}  {'contender':<18} {'median ms':>10} {'min ms':>9} {'times float':>12} {'SQNR dB':>8}")
    for batch in options.batches:
        calls = {name: at(images[:batch]) for name, at in prepared.items()}
        figures["batches"][str(batch)] = rows = compare(calls, options.rounds, options.pause)
        for name, row in rows.items():
            sqnr = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
            print(f"{batch:>5}  {name:<18} {row['median_ms']:>10.2f} {row['min_ms']:>9.2f} "
                  f"{row['times_float']:>12.2f} {sqnr:>8}", flush=True)  # fmt: skip
    return figures


def _print_head(figures: Mapping[str, Any]) -> None:
    f, cost = figures, figures["calibration"]
    print(f"{f['model']}, {f['size']}x{f['size']}, recipe {f['recipe']}; jax {f['jax']}, Python {f['python']}, "
          f"{f['device']}, {f['threads']} threads")  # fmt: skip
    print(f"qc.quantize with verification, {f['calibration_images']} calibration images: {f['quantize_seconds']:.1f} s")
    print(f"calibration of a batch of {f['calibration_images']}: {cost['seconds']:.3f} s, float forward "
          f"{cost['float_seconds']:.3f} s, {cost['times_float']:.2f} times")  # fmt: skip
    print(f"islands {f['islands']}, QDQ pairs {f['qdq_pairs_before']} -> {f['qdq_pairs_after']}")
    print(f"weights {f['float_weight_bytes']:,} -> {f['weight_bytes']:,} bytes ({f['weight_ratio']:.3f})", flush=True)


def prepare(subject: Subject, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The contenders that can take part, `float` first, and why the others cannot; prints the latter."""
    prepared: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name in [n for n in CONTENDERS if n == "float" or n in names]:
        try:
            prepared[name] = CONTENDERS[name].prepare(subject)
        except Unavailable as reason:
            skipped[name] = str(reason)
            print(f"skipped {name}: {reason}", flush=True)
    return prepared, skipped


def compare(calls: Mapping[str, Call], rounds: int, pause: float) -> dict[str, dict[str, Any]]:
    """One row per contender: `median_ms`, `min_ms`, `times_float`, `sqnr_db` (None: the very same logits).

    Args:
      calls: by name; `float` is what the others are compared with.
      rounds: timed calls of each, in turn.
      pause: seconds before each.
    """
    results = {name: call.result() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(pause)
            call.seconds()
            times[name].append(call.seconds())
    rows = {}
    for name, seconds in times.items():
        sqnr = sqnr_db([results["float"]], [results[name]])
        rows[name] = {
            "median_ms": 1e3 * statistics.median(seconds),
            "min_ms": 1e3 * min(seconds),
            "times_float": timing.speedup(times["float"], seconds),
            "sqnr_db": sqnr if math.isfinite(sqnr) else None,
        }
    return rows


def calibration_cost(model: Any, images: np.ndarray, recipe: str) -> dict[str, float]:
    """Seconds to observe one batch, and for the float forward of the same batch; medians, taken in turn.

    Args:
      model: nnx, in evaluation mode.
      images: `float32[n, h, w, c]`, one batch.
      recipe: by name.
    """
    forward = qc.trace(model, images).program
    forward = jax.jit(lambda x, program=forward: program(x)[0])
    jax.block_until_ready(forward(images))
    observing: list[float] = []
    running: list[float] = []

    def batches() -> Iterator[np.ndarray]:
        # The generator is resumed when calibration is done with a batch and asks for the next.
        for number in range(_CALIBRATION_BATCHES + 1):
            start = time.perf_counter()
            yield images
            end = time.perf_counter()
            if number == 0:
                continue
            observing.append(end - start)
            jax.block_until_ready(forward(images))
            running.append(time.perf_counter() - end)

    qc.trace(model, images, recipe=recipe).calibrate(batches())
    return {
        "seconds": statistics.median(observing),
        "float_seconds": statistics.median(running),
        "times_float": timing.speedup(observing, running),
    }


if __name__ == "__main__":
    sys.exit(main())
