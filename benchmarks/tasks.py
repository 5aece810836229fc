"""What int8 costs on the tasks that are no classification: perplexity of bytes, mean average precision of detection.

    python -m benchmarks.tasks --models llama lstm detector --json tasks.json

Networks are trained the first time and cached (`QCOMPILER_CACHE`). Calibration takes training examples; scores are
those of files, or of scenes, that neither training nor calibration reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import qcompiler as qc
from qcompiler.debug import dumps
from qcompiler.debug.progress import ProgressBar
from qcompiler.debug.report import sqnr_db
from qcompiler.models import scenes, text, trained

_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Measured:
    """A task's score.

    Attributes:
      score: its name.
      calibration: `(count, size)` to inputs that training may have seen.
      inputs: `(count, size)` to inputs that it has not, and what is right about them.
      of: `(outputs, right)` to the score.
      lost: `(score of float, of integers)` to what the integers lose.
      unit: of what is lost.
    """

    score: str
    calibration: Callable[[int, int], np.ndarray]
    inputs: Callable[[int, int], tuple[np.ndarray, Any]]
    of: Callable[[np.ndarray, Any], float]
    lost: Callable[[float, float], float]
    unit: str


def _perplexity(logits: np.ndarray, following: np.ndarray) -> float:
    batches = iter(logits.reshape(-1, _BATCH, *logits.shape[1:]))
    return 2 ** text.bits_per_byte(lambda tokens: next(batches), following, following, batch_size=_BATCH)


def _scenes(count: int, size: int) -> tuple[np.ndarray, Any]:
    images, boxes, labels = scenes.examples("test", 0, count, size=size)
    return images, (boxes, labels)


PERPLEXITY = Measured(
    "perplexity",
    lambda count, size: text.sequences(0, count, length=size)[0],
    lambda count, size: text.held_out(count, length=size),
    _perplexity,
    lambda before, after: 100 * (after / before - 1),
    "%",
)
DETECTION = Measured(
    "mAP@0.5",
    lambda count, size: scenes.examples("calibration", 0, count, size=size)[0],
    _scenes,
    lambda outputs, right: 100 * scenes.mean_average_precision(scenes.detections(outputs), *right),
    lambda before, after: before - after,
    "points",
)
MEASURED = {**dict.fromkeys(trained.LANGUAGE_MODELS, PERPLEXITY), **dict.fromkeys(trained.DETECTORS, DETECTION)}


def outputs_of(model: Callable[[Any], Any], inputs: np.ndarray, label: str) -> np.ndarray:
    """`float32[n, ...]` of all inputs, in batches of one shape."""
    progress, found = ProgressBar(label, len(inputs)), []
    try:
        for first in range(0, len(inputs), _BATCH):
            found.append(np.asarray(model(inputs[first : first + _BATCH]), np.float32))
            progress.update(first + _BATCH)
    finally:
        progress.close()
    return np.concatenate(found)


def measure(model: nnx.Module, measured: Measured, size: int, count: int, calibration: int) -> dict[str, Any]:
    """The figures of one network, float and by the default recipe."""
    inputs, right = measured.inputs(count, size)
    graphdef, state = nnx.split(model)
    float_jit = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    expected = outputs_of(lambda x: float_jit(state, x), inputs, "float")
    start = time.perf_counter()
    sample = measured.calibration(calibration, size)
    qmodel = qc.quantize(model, [sample[i : i + _BATCH] for i in range(0, calibration, _BATCH)])
    seconds = time.perf_counter() - start
    got = outputs_of(qmodel, inputs, "int8")
    before, after = measured.of(expected, right), measured.of(got, right)
    report = qmodel.report
    return {
        "score": measured.score,
        "examples": count,
        "float": before,
        "int8": after,
        "lost": measured.lost(before, after),
        "unit": measured.unit,
        "sqnr_db": sqnr_db([expected], [got]),
        "islands": len(report.islands),
        "weight_ratio": report.weight_bytes / report.float_weight_bytes,
        "quantize_seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--examples", type=int, default=2048, help="sequences or scenes that are scored")
    parser.add_argument("--calibration", type=int, default=64, help="sequences or scenes for calibration")
    parser.add_argument("--json", type=Path, help="write the figures here, after every network")
    options = parser.parse_args(arguments)
    if min(options.examples, options.calibration) < 1 or options.examples % _BATCH or options.calibration % _BATCH:
        parser.error(f"examples are scored and read in batches of {_BATCH}: give multiples of it")

    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}")
    print(f"{'model':<10} {'score':<10} {'examples':>8} {'float':>8} {'int8':>8} {'lost':>14} {'SQNR dB':>8} "
          f"{'islands':>7} {'weights':>7}")  # fmt: skip
    figures = {}
    for name in options.models:
        settings = trained.settings_of(name)
        model, _ = trained.trained(settings, options.seed)
        row = figures[name] = measure(model, MEASURED[name], settings.size, options.examples, options.calibration)
        print(f"{name:<10} {row['score']:<10} {row['examples']:>8} {row['float']:>8.3f} {row['int8']:>8.3f} "
              f"{row['lost']:>7.2f} {row['unit']:<6} {row['sqnr_db']:>8.1f} {row['islands']:>7} "
              f"{row['weight_ratio']:>7.3f}", flush=True)  # fmt: skip
        if options.json:
            dumps.write_text(options.json, json.dumps({"jax": jax.__version__, "models": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
