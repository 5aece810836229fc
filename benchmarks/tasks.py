"""What int8 costs on the tasks that are no classification: perplexity of bytes, mean average precision of detection.

    python -m benchmarks.tasks --models llama lstm detector --recipes default w4a8 --seeds 0 1 2 --json tasks.json

Networks are trained the first time and cached (`QCOMPILER_CACHE`). Calibration takes training examples; scores are
those of files, or of scenes, that neither training nor calibration reads. Recipes are those of
`benchmarks/variants.py`. What is lost carries a paired 95 % interval, the jackknife's over groups of examples; with
several `--seeds`, a last row has the mean over the trainings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import qcompiler as qc
from benchmarks.variants import VARIANTS
from qcompiler.debug import dumps
from qcompiler.debug.progress import ProgressBar
from qcompiler.debug.report import sqnr_db
from qcompiler.models import scenes, text, trained
from qcompiler.models.evaluation import jackknife_margin

_BATCH = 16
_GROUPS = 20


@dataclasses.dataclass(frozen=True)
class Measured:
    """A task's score.

    Attributes:
      score: its name.
      calibration: `(count, size)` to inputs that training may have seen.
      inputs: `(count, size)` to inputs that it has not, and what is right about them.
      judged: `(outputs, right)` to what the score needs to know of each example.
      of: such knowledge of any number of examples to the score.
      lost: `(score of float, of integers)` to what the integers lose.
      unit: of what is lost.
    """

    score: str
    calibration: Callable[[int, int], np.ndarray]
    inputs: Callable[[int, int], tuple[np.ndarray, Any]]
    judged: Callable[[np.ndarray, Any], list[Any]]
    of: Callable[[list[Any]], float]
    lost: Callable[[float, float], float]
    unit: str


def _bits(logits: np.ndarray, following: np.ndarray) -> list[float]:
    """Bits per byte of each sequence."""
    rows = zip(logits[:, None], following[:, None], strict=True)
    return [text.bits_per_byte(lambda _, of=x: of, right, right, batch_size=1) for x, right in rows]


def _scenes(count: int, size: int) -> tuple[np.ndarray, Any]:
    images, boxes, labels = scenes.examples("test", 0, count, size=size)
    return images, (boxes, labels)


def _found(outputs: np.ndarray, right: Any) -> list[Any]:
    """Detections, boxes and labels of each scene."""
    return list(zip(scenes.detections(outputs), *right, strict=True))


def _precision(judged: list[Any]) -> float:
    found, boxes, labels = zip(*judged, strict=True)
    return 100 * scenes.mean_average_precision(found, np.stack(boxes), np.stack(labels))


PERPLEXITY = Measured(
    "perplexity",
    lambda count, size: text.sequences(0, count, length=size)[0],
    lambda count, size: text.held_out(count, length=size),
    _bits,
    lambda judged: 2 ** statistics.fmean(judged),
    lambda before, after: 100 * (after / before - 1),
    "%",
)
DETECTION = Measured(
    "mAP@0.5",
    lambda count, size: scenes.examples("calibration", 0, count, size=size)[0],
    _scenes,
    _found,
    _precision,
    lambda before, after: before - after,
    "points",
)
MEASURED = {**dict.fromkeys(trained.LANGUAGE_MODELS, PERPLEXITY), **dict.fromkeys(trained.DETECTORS, DETECTION)}


def outputs_of(model: Callable[[Any], Any], inputs: np.ndarray, label: str, batch: int = _BATCH) -> np.ndarray:
    """`float32[n, ...]` of all inputs, in batches of one shape."""
    progress, found = ProgressBar(label, len(inputs)), []
    try:
        for first in range(0, len(inputs), batch):
            found.append(np.asarray(model(inputs[first : first + batch]), np.float32))
            progress.update(first + batch)
    finally:
        progress.close()
    return np.concatenate(found)


def measure(
    model: nnx.Module,
    measured: Measured,
    size: int,
    count: int,
    calibration: int,
    recipe_names: Sequence[str] = ("default",),
) -> list[dict[str, Any]]:
    """The figures of one network, float and by each recipe.

    Args:
      model: trained, in evaluation mode.
      measured: its score.
      size: of an example.
      count: examples that are scored.
      calibration: examples for calibration.
      recipe_names: keys of `VARIANTS`.
    """
    inputs, right = measured.inputs(count, size)
    graphdef, state = nnx.split(model)
    float_jit = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    expected = outputs_of(lambda x: float_jit(state, x), inputs, "float")
    sample = measured.calibration(calibration, size)
    batches = [sample[i : i + _BATCH] for i in range(0, calibration, _BATCH)]
    rows = []
    for name in recipe_names:
        start = time.perf_counter()
        qmodel = qc.quantize(model, batches, recipe=VARIANTS[name])
        seconds = time.perf_counter() - start
        got = outputs_of(qmodel, inputs, name)

        judged = [measured.judged(outputs, right) for outputs in (expected, got)]

        def lost(places: np.ndarray, judged: list[Any] = judged) -> float:
            return measured.lost(*(measured.of([side[i] for i in places]) for side in judged))

        before, after = (measured.of(side) for side in judged)
        report = qmodel.report
        rows.append(
            {
                "recipe": name,
                "score": measured.score,
                "examples": count,
                "float": before,
                "int8": after,
                "lost": measured.lost(before, after),
                "margin": jackknife_margin(lost, count, min(count, _GROUPS)),
                "unit": measured.unit,
                "sqnr_db": sqnr_db([expected], [got]),
                "islands": len(report.islands),
                "weight_ratio": report.weight_bytes / report.float_weight_bytes,
                "quantize_seconds": seconds,
            }
        )
    return rows


def mean_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean row of several trainings of one recipe; their margins add up as if all erred on the same examples."""
    numbers = ("float", "int8", "lost", "margin", "sqnr_db", "weight_ratio", "quantize_seconds")
    means = {key: statistics.fmean(row[key] for row in rows) for key in numbers}
    return rows[0] | means | {"seed": "mean", "islands": max(row["islands"] for row in rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--recipes", nargs="+", default=["default"], choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training each")
    parser.add_argument("--examples", type=int, default=2048, help="sequences or scenes that are scored")
    parser.add_argument("--calibration", type=int, default=64, help="sequences or scenes for calibration")
    parser.add_argument("--json", type=Path, help="write the figures here, after every network")
    options = parser.parse_args(arguments)
    if min(options.examples, options.calibration) < 1 or options.examples % _BATCH or options.calibration % _BATCH:
        parser.error(f"examples are scored and read in batches of {_BATCH}: give multiples of it")

    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}")
    print(f"{'model':<9} {'seed':>4} {'recipe':<14} {'score':<10} {'examples':>8} {'float':>8} {'int8':>8} "
          f"{'lost':>22} {'SQNR dB':>8} {'islands':>7} {'weights':>7}")  # fmt: skip
    figures: list[dict[str, Any]] = []
    for name in options.models:
        settings, ofs = trained.settings_of(name), []
        for seed in options.seeds:
            model, _ = trained.trained(settings, seed)
            rows = measure(model, MEASURED[name], settings.size, options.examples, options.calibration, options.recipes)
            ofs += [{"model": name, "seed": seed, **row} for row in rows]
            _print_rows(ofs[-len(rows) :])
            if options.json:
                _write(options.json, figures + ofs)
        if len(options.seeds) > 1:
            means = [mean_of([row for row in ofs if row["recipe"] == recipe]) for recipe in options.recipes]
            _print_rows(means)
            ofs += means
        figures += ofs
        if options.json:
            _write(options.json, figures)
    return 0


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['model']:<9} {row['seed']:>4} {row['recipe']:<14} {row['score']:<10} {row['examples']:>8} "
              f"{row['float']:>8.3f} {row['int8']:>8.3f} {row['lost']:>7.2f} ± {row['margin']:<5.2f} "
              f"{row['unit']:<6} {row['sqnr_db']:>8.1f} {row['islands']:>7} {row['weight_ratio']:>7.3f}",
              flush=True)  # fmt: skip


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    dumps.write_text(path, json.dumps({"jax": jax.__version__, "rows": list(rows)}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
