"""MobileNetV2 with weights per tensor and channels of very different scales: what equalization gives back.

    python -m benchmarks.equalization --ratios 1 1000 100000 --images 2000 --json equalization.json

The trained network of the procedural task is rewritten so that the channels of each layer have scales up to `ratio`
apart (`benchmarks/spread.py`); what it computes stays the same. Of six recipes, three quantize weights per tensor, and
three per channel, where activations still have one scale. Lost points carry a paired 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import qcompiler as qc
from benchmarks.spread import spread_channels
from benchmarks.tasks import outputs_of
from benchmarks.variants import VARIANTS
from qcompiler.debug import dumps
from qcompiler.debug.report import sqnr_db
from qcompiler.models import procedural, trained
from qcompiler.models.evaluation import paired_difference
from qcompiler.models.mobilenet import MobileNetV2

_BATCH = 50
#: Recipes of the table.
_RECIPES = (
    "unequalized",
    "per_tensor",
    "per_tensor_corrected",
    "unequalized_per_channel",
    "default",
    "equalized",
)


def measure(
    model: MobileNetV2, ratio: float, recipe_names: Sequence[str], count: int, calibration: int, size: int
) -> list[dict[str, Any]]:
    """One row per recipe, of the model with its channels spread.

    Args:
      model: trained, in evaluation mode.
      ratio: largest factor between channels of a layer.
      recipe_names: keys of `VARIANTS`.
      count: test images.
      calibration: calibration images.
      size: of the images.
    """
    images, labels = procedural.examples("test", 0, count, size=size)
    samples, _ = procedural.examples("calibration", 0, calibration, size=size)
    spread = spread_channels(model, ratio)
    graphdef, state = nnx.split(spread)
    expected = outputs_of(jax.jit(lambda x: nnx.merge(graphdef, state)(x)), images, f"ratio {ratio:g}, float", _BATCH)
    rows = []
    for name in recipe_names:
        # The probe compares in float32, in which factors of 10**5 and more leave less than a pass is asked to keep.
        qmodel = qc.quantize(spread, [samples], recipe=VARIANTS[name], verify="types")
        got = outputs_of(qmodel, images, f"ratio {ratio:g}, {name}", _BATCH)
        found = paired_difference(labels, expected, got)
        rows.append({
            "ratio": ratio,
            "recipe": name,
            "images": count,
            **found.percent(),
            "sqnr_db": float(sqnr_db([expected], [got])),
        })  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equalization", description=__doc__.partition("\n")[0])
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 1e3, 1e5], help="between channels of a layer")
    parser.add_argument("--recipes", nargs="+", default=_RECIPES, choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--calibration", type=int, default=50, help="calibration images")
    parser.add_argument("--json", type=Path, help="write the figures here, after every ratio")
    options = parser.parse_args(arguments)
    if options.images < 2 or options.images % _BATCH or options.calibration < 1:
        parser.error(f"test images come in batches of {_BATCH}, and at least 1 calibrates")
    if min(options.ratios) < 1:
        parser.error("a ratio is the largest factor over the smallest: at least 1")

    settings = trained.settings_of("mobilenet_v2")
    model, _ = trained.trained(settings, options.seed)
    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}, "
          f"{options.calibration} calibration images")  # fmt: skip
    print(f"{'ratio':>8} {'recipe':<22} {'images':>6} {'float %':>8} {'int8 %':>7} {'points lost':>15} {'SQNR dB':>8}")
    figures: list[dict[str, Any]] = []
    for ratio in options.ratios:
        for row in measure(model, ratio, options.recipes, options.images, options.calibration, settings.size):
            figures.append(row)
            print(f"{row['ratio']:>8g} {row['recipe']:<22} {row['images']:>6} {row['float']:>8.2f} {row['int8']:>7.2f} "
                  f"{row['lost']:>7.2f} ± {row['margin']:<5.2f} {row['sqnr_db']:>8.1f}", flush=True)  # fmt: skip
        if options.json:
            dumps.write_text(options.json, json.dumps({"jax": jax.__version__, "rows": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
