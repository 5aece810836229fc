"""How long the sensitivity of every layer takes, and how well the sum of layers' losses predicts that of all together.

    python -m benchmarks.sensitivity --models resnet50 --candidates int8
    python -m benchmarks.sensitivity --models resnet mobilenet_v2 vit detector --json sensitivity.json

ResNet-50 has random weights and runs on 8 images of 224x224; the others are trained on procedural pictures
(`qcompiler.models.trained`) and run on 32 of them. Every number is of calibration images: no test image is read.
Mixed configurations give int8 to half of the layers and int4 to the others: the most sensitive half, or one by chance.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qcompiler as qc
from benchmarks import models
from qcompiler.debug import dumps
from qcompiler.losses import sqnr_db
from qcompiler.models import statistics, tasks, trained

_TRAINED = ("resnet", "mobilenet_v2", "vit", "detector")
#: Configurations by chance.
_CHANCES = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sensitivity", description=__doc__.partition("\n")[0])
    known = list(dict.fromkeys((*models.MODELS, *_TRAINED)))
    parser.add_argument("--models", nargs="+", default=["resnet50", "resnet", "mobilenet_v2"], choices=known)
    parser.add_argument("--batch", type=int, default=8, help="images that untrained networks run on")
    parser.add_argument("--size", type=int, default=224, help="their height and width")
    parser.add_argument("--candidates", nargs="+", default=["int4", "int8"], help="the last one is the finest")
    parser.add_argument("--metric", nargs="+", default=["nsr"])
    parser.add_argument("--table", action="store_true", help="print every layer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}")
    figures = {}
    for name in options.models:
        calibrated = calibrated_model(name, options.batch, options.size)
        figures[name] = figure = measure(calibrated, options.candidates, options.metric, options.table)
        print(f"{name}: {figure['layers']} layers, {', '.join(options.candidates)}: {figure['seconds']:.1f} s, "
              f"of processors {figure['processor_seconds']:.1f} s", flush=True)  # fmt: skip
        if figure["configs"]:
            print(f"  {'configuration':<24} {'predicted':>10} {'measured':>10}   (SQNR in dB)")
        for config, (predicted, measured) in figure["configs"].items():
            print(f"  {config:<24} {predicted:>10.2f} {measured:>10.2f}", flush=True)
    if options.json:
        dumps.write_text(options.json, json.dumps({"jax": jax.__version__, **figures}, indent=1) + "\n")
    return 0


def calibrated_model(name: str, batch: int, size: int) -> qc.Calibrated:
    """A model by name, calibrated on one batch."""
    if name in _TRAINED:
        settings = trained.settings_of(name)
        model, _ = trained.trained(settings)
        task = tasks.SCENES if name in trained.DETECTORS else tasks.SHAPES
        images = np.asarray(task.examples(0, 32, 0, settings.size)[0])
    else:
        model, _ = models.build(name, size)
        images = np.asarray(statistics.smooth_images(jax.random.key(1), (batch, size, size, 3)))
    return qc.trace(model, images, verify="off").calibrate([images])


def measure(
    calibrated: qc.Calibrated, candidates: Sequence[str], metric: Sequence[str], table: bool = False
) -> dict[str, Any]:
    """Seconds for all layers, compilation included, and SQNRs of whole configurations, predicted and measured."""
    start, busy = time.perf_counter(), time.process_time()
    sensitivity = calibrated.sensitivity(candidates=candidates, metric=list(metric))
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    if table:
        print(sensitivity)
    configs: dict[str, Any] = {name: name for name in candidates}
    if len(candidates) > 1 and "nsr" in metric:
        coarse, fine = candidates[0], candidates[-1]
        mixed = lambda chosen: {layer: fine if layer in chosen else coarse for layer in sensitivity.layers}
        half = len(sensitivity.layers) // 2
        losses = sensitivity.table("nsr")
        worst = sorted(losses, key=lambda layer: -losses[layer][coarse])[:half]
        configs["sensitive half finer"] = mixed(worst)
        for seed in range(_CHANCES):
            chance = np.random.default_rng(seed).permutation(sensitivity.layers)[:half].tolist()
            configs[f"half by chance, {seed}"] = mixed(chance)
    return {
        "layers": len(sensitivity.layers),
        "seconds": seconds,
        "processor_seconds": busy,
        "configs": {
            name: (sqnr_db(sensitivity.predict(config, "nsr")), sqnr_db(sensitivity.measure(config, "nsr")))
            for name, config in configs.items()
            if "nsr" in metric
        },
    }


if __name__ == "__main__":
    sys.exit(main())
