"""What a type per layer gains: beside every assignment of a small net, and beside simpler ways on a deep one.

    python -m benchmarks.mixed_precision --json mixed.json

`enumerate`: all assignments of 4 and 8 bits to the ResNet's weights within 6 bits on average are run on calibration
images; the one that `Precision` chooses is compared with the best of them. `average`: MobileNetV2 at 5 bits per weight
on average, of 3 to 8, against 5 bits everywhere, random assignments, and bits in the order of weight magnitude; all
compiled to integers, and scored on test images that neither training nor calibration saw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import qcompiler as qc
from qcompiler.candidates import Candidate
from qcompiler.debug import dumps
from qcompiler.debug.progress import ProgressBar
from qcompiler.debug.report import sqnr_db
from qcompiler.models import mobilenet, procedural, trained
from qcompiler.models.evaluation import paired_difference
from qcompiler.numerics.types import ACTIVATION, WEIGHT
from qcompiler.passes import observe
from qcompiler.precision import Assignment, Choice, Precision, decide, knapsack, layers, policies

_BATCH = 256
#: Random assignments that are averaged.
_DRAWS = 3


def of_bits(*bits: int) -> dict[str, Candidate]:
    """Candidates with weights of so many bits beside int8 activations."""
    return {f"int{b}": Candidate(dataclasses.replace(WEIGHT, bits=b), ACTIVATION) for b in bits}


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A trained classifier with its calibration.

    Attributes:
      model: in evaluation mode.
      stage: calibrated.
      size: of its images.
    """

    model: nnx.Module
    stage: qc.Calibrated
    size: int

    @classmethod
    def of(cls, name: str, images: int) -> Subject:
        """A network of `trained.MODELS`, calibrated on so many images, in batches of eight."""
        settings = trained.settings_of(name)
        model, _ = trained.trained(settings, 0)
        batches = [
            procedural.examples("calibration", first, min(8, images - first), size=settings.size)[0]
            for first in range(0, images, 8)
        ]
        return cls(model, qc.trace(model, batches[0]).calibrate(batches), settings.size)

    @property
    def program(self) -> qc.Program:
        """Calibrated, without observers."""
        return observe.without_observers(self.stage.program)

    def compiled(self, config: Mapping[str, str], candidates: Mapping[str, Candidate]) -> qc.QuantizedModel:
        """The integers of a configuration."""
        assignment = Assignment(candidates, {layer: Choice(name) for layer, name in config.items()})
        return self.stage.quantize(qc.Recipe(precision=assignment)).compile()

    def float(self) -> Callable[[Any], Any]:
        """The float network, compiled."""
        fast = nnx.clone(self.model)
        mobilenet.use_depthwise(fast, "shifted")
        graphdef, state = nnx.split(fast)
        return jax.jit(lambda x: nnx.merge(graphdef, state)(x))

    def logits(self, predict: Callable[[Any], Any], count: int, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the first test images, and the labels."""
        bar, found, labels = ProgressBar(label, count), [], []
        try:
            for first in range(0, count, _BATCH):
                images, right = procedural.examples("test", first, min(_BATCH, count - first), size=self.size)
                found.append(np.asarray(predict(images), np.float32))
                labels.append(right)
                bar.update(min(first + _BATCH, count))
        finally:
            bar.close()
        return np.concatenate(found), np.concatenate(labels)


def enumerated(subject: Subject, bits: float, batches: int) -> dict[str, Any]:
    """The chosen assignment beside the best of all: measured losses, and how many there are."""
    candidates = of_bits(4, 8)
    precision = Precision(candidates, weight_bits=bits)
    sensitivity = subject.stage.sensitivity(batches, candidates=candidates, metric="nsr")
    problem = decide.problem_of(subject.program, precision, sensitivity.table())
    start = time.perf_counter()
    chosen = decide.decide(subject.program, precision, sensitivity)
    seconds = time.perf_counter() - start
    every = knapsack.enumerate_configs(problem)
    bar, losses = ProgressBar("every assignment", len(every)), []
    try:
        for number, config in enumerate(every, 1):
            losses.append(sensitivity.measure(config))
            bar.update(number)
    finally:
        bar.close()
    solved = knapsack.solve(problem)
    return {
        "layers": len(problem.losses),
        "assignments": len(every),
        "best": min(losses),
        "median": float(np.median(losses)),
        "solver": sensitivity.measure(solved),
        "chosen": chosen.measured_loss,
        "over_best": chosen.measured_loss / min(losses) - 1,
        "measurements": chosen.measurements,
        "seconds": seconds,
    }


def contenders(subject: Subject, bits: int, draws: int) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Way of choosing -> (configuration, facts), all within the same average bits per weight."""
    candidates = of_bits(*range(3, 9))
    precision = Precision(candidates, weight_bits=bits, repair_steps=64)
    start = time.perf_counter()
    sensitivity = subject.stage.sensitivity(candidates=candidates, metric="nsr")
    chosen = decide.decide(subject.program, precision, sensitivity)
    seconds = time.perf_counter() - start
    problem = decide.problem_of(subject.program, precision, sensitivity.table())
    every = layers.layers_of(subject.program)
    magnitude = {layer.id: float(np.mean(np.abs(layer.array))) for layer in every}
    configs = {
        "chosen": chosen.config,
        "solver, not repaired": knapsack.solve(problem),
        f"uniform {bits} bits": dict.fromkeys(problem.losses, f"int{bits}"),
        "magnitude": policies.by_magnitude(problem, magnitude),
        **{f"random {seed}": policies.at_random(problem, seed) for seed in range(draws)},
    }
    facts: dict[str, dict[str, Any]] = {
        name: {
            "average_bits": problem.cost(config, "weight_bits"),
            "predicted": problem.loss(config),
            "measured": sensitivity.measure(config),
        }
        for name, config in configs.items()
    }
    facts["chosen"] |= {"seconds": seconds, "measurements": chosen.measurements}
    return {name: (config, facts[name]) for name, config in configs.items()}


def averaged(subject: Subject, bits: int, images: int, draws: int) -> dict[str, dict[str, Any]]:
    """Way of choosing -> figures on test images."""
    candidates = of_bits(*range(3, 9))
    reference, labels = subject.logits(subject.float(), images, "float")
    rows: dict[str, dict[str, Any]] = {}
    for name, (config, facts) in contenders(subject, bits, draws).items():
        found, _ = subject.logits(subject.compiled(config, candidates), images, name)
        paired = paired_difference(labels, reference, found)
        rows[name] = {
            **facts,
            "sqnr_db": sqnr_db([reference], [found]),
            "accuracy": 100 * paired.after,
            "float": 100 * paired.before,
            "lost": -100 * paired.difference,
            "margin": 100 * paired.margin,
        }
        _print_row(name, rows[name])
    random = [row for name, row in rows.items() if name.startswith("random")]
    if random:
        rows["random, mean"] = {key: float(np.mean([row[key] for row in random])) for key in random[0]}
        _print_row("random, mean", rows["random, mean"])
    return rows


def _print_row(name: str, row: dict[str, Any]) -> None:
    print(
        f"{name:<22} {row['average_bits']:>5.2f} {row['predicted']:>10.3e} {row['measured']:>10.3e} "
        f"{row['sqnr_db']:>8.2f} {row['accuracy']:>9.2f} {row['lost']:>7.2f} ± {row['margin']:<5.2f}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["enumerate", "average"], choices=["enumerate", "average"])
    parser.add_argument("--images", type=int, default=4096, help="test images")
    parser.add_argument("--calibration", type=int, default=64, help="calibration images")
    parser.add_argument("--bits", type=int, default=5, help="average bits of MobileNetV2's weights, 3 to 8")
    parser.add_argument("--enumerated-bits", type=float, default=6, help="average bits of the ResNet's, 4 to 8")
    parser.add_argument("--batches", type=int, default=1, help="of eight images, on which every assignment is run")
    parser.add_argument("--draws", type=int, default=_DRAWS, help="random assignments")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if options.images < 2 or options.calibration < 8:
        parser.error("need at least 2 test images and 8 calibration images")
    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}, "
          f"{options.calibration} calibration images")  # fmt: skip
    figures: dict[str, Any] = {"jax": jax.__version__}
    if "enumerate" in options.parts:
        row = enumerated(Subject.of("resnet", options.calibration), options.enumerated_bits, options.batches)
        figures["enumerate"] = row
        print(f"ResNet, {row['layers']} layers, int4 and int8, {options.enumerated_bits:g} bits on average: "
              f"{row['assignments']} assignments, noise to signal of the logits\n"
              f"  best of all {row['best']:.4e}, median {row['median']:.4e}, predicted best {row['solver']:.4e}, "
              f"chosen {row['chosen']:.4e} ({row['over_best']:+.2%} of the best) after {row['measurements']} runs, "
              f"{row['seconds']:.1f} s", flush=True)  # fmt: skip
    if "average" in options.parts:
        print(f"MobileNetV2, int3 to int8, {options.bits} bits on average, {options.images} test images\n"
              f"{'':<22} {'bits':>5} {'predicted':>10} {'measured':>10} {'SQNR dB':>8} {'right %':>9} "
              f"{'points lost':>15}")  # fmt: skip
        subject = Subject.of("mobilenet_v2", options.calibration)
        figures["average"] = averaged(subject, options.bits, options.images, options.draws)
    if options.json:
        dumps.write_text(options.json, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
