"""What int8 costs in accuracy: trained networks on procedural pictures that neither training nor calibration saw.

    python -m benchmarks.accuracy --models resnet mobilenet_v2 --images 50000 --json accuracy.json

Networks are trained the first time and cached (`QCOMPILER_CACHE`), and so are the logits: a run that was interrupted
goes on where it was. Lost points carry a paired 95 % interval: over the images, d is 1 where only float is right, -1
where only int8 is; the interval is mean(d) +- 1.96 std(d) / sqrt(n). With several `--seeds`, a last row has the mean
over the trainings, d being the mean of each image's. Recipes are those of `benchmarks/variants.py`. What the detector
and the language models lose is `benchmarks.tasks`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import qcompiler as qc
from benchmarks.variants import VARIANTS
from qcompiler import backends, passes
from qcompiler.debug import dumps
from qcompiler.debug.progress import ProgressBar
from qcompiler.debug.report import sqnr_db
from qcompiler.models import cache, mobilenet, procedural, trained
from qcompiler.models.evaluation import mean_paired_difference

#: Images of one call and, times `_SAVE_EVERY`, images between two writes to the cache.
_BATCH, _SAVE_EVERY = 256, 8


@dataclasses.dataclass
class Contender:
    """One of the classifiers that are compared.

    Attributes:
      path: file of its logits in the cache.
      make: builds the function from images to logits, and facts to keep about it.
      logits: `float32[n, classes]` of the first n test images.
      labels: theirs, `int32[n]`.
      facts: JSON values.
    """

    path: Path
    make: Callable[[], tuple[Callable[[Any], Any], dict[str, Any]]]
    logits: np.ndarray
    labels: np.ndarray
    facts: dict[str, Any]
    _predict: Callable[[Any], Any] | None = None

    @classmethod
    def of(cls, path: Path, make: Callable[[], Any]) -> Contender:
        """With the logits that are already known."""
        if not path.exists():
            return cls(path, make, np.empty((0, len(procedural.CLASSES)), np.float32), np.empty(0, np.int32), {})
        arrays, facts = cache.load(path)
        return cls(path, make, arrays["logits"], arrays["labels"], facts)

    def extend(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Adds the logits of the next images."""
        if self._predict is None:
            self._predict, self.facts = self.make()
        logits = np.asarray(self._predict(images), np.float32)
        self.logits, self.labels = np.concatenate([self.logits, logits]), np.concatenate([self.labels, labels])

    def save(self) -> None:
        """Writes the logits to the cache."""
        cache.save(self.path, {"logits": self.logits, "labels": self.labels}, self.facts)


def evaluate(contenders: list[Contender], count: int, size: int, label: str) -> None:
    """Extends every contender's logits to the first `count` test images; an interrupt loses none."""
    progress = ProgressBar(label, count)
    try:
        for number, first in enumerate(range(0, count, _BATCH)):
            last = min(first + _BATCH, count)
            lacking = [c for c in contenders if len(c.logits) < last]
            if not lacking:
                continue
            images, labels = procedural.examples("test", first, last - first, size=size)
            for contender in lacking:
                done = len(contender.logits) - first
                contender.extend(images[done:], labels[done:])
                if number % _SAVE_EVERY == _SAVE_EVERY - 1:
                    contender.save()
            progress.update(last)
    finally:
        for contender in contenders:
            if contender.facts:
                contender.save()
        progress.close()


def compiler_modules() -> list[types.ModuleType]:
    """Every module of the compiler: integers depend on all of it."""
    found = [
        importlib.import_module(module.name)
        for package in (qc, passes, backends)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("__main__")
    ]
    return sorted(found, key=lambda module: module.__name__)


def contenders_of(
    model: nnx.Module, weights: str, size: int, recipe_names: list[str], calibration: int
) -> dict[str, Contender]:
    """The float network and its integers by each recipe.

    Args:
      model: trained, in evaluation mode.
      weights: names the trained weights.
      size: of the images.
      recipe_names: keys of `VARIANTS`.
      calibration: number of calibration images.
    """

    def make_float() -> Any:
        fast = nnx.clone(model)
        mobilenet.use_depthwise(fast, "shifted")
        graphdef, state = nnx.split(fast)
        return jax.jit(lambda x: nnx.merge(graphdef, state)(x)), {"jax": jax.__version__}

    def make_integers(name: str) -> Any:
        images, _ = procedural.examples("calibration", 0, calibration, size=size)
        start = time.perf_counter()
        qmodel = qc.quantize(model, [images], recipe=VARIANTS[name])
        report = qmodel.report
        facts = {
            "islands": len(report.islands),
            "weight_ratio": report.weight_bytes / report.float_weight_bytes,
            "quantize_seconds": time.perf_counter() - start,
        }
        return qmodel, facts

    folder = cache.cache_folder()
    shared = {"weights": weights, "size": size, "jax": jax.__version__}
    key = cache.key_of(shared, [procedural])
    found = {"float": Contender.of(folder / f"logits-float-{key}.npz", make_float)}
    compiler = compiler_modules()
    for name in recipe_names:
        key = cache.key_of({**shared, "recipe": repr(VARIANTS[name]), "calibration": calibration}, compiler)
        make = lambda name=name: make_integers(name)
        found[name] = Contender.of(folder / f"logits-{name}-{key}.npz", make)
    return found


def rows(trainings: dict[int, dict[str, Contender]], count: int) -> Iterator[dict[str, Any]]:
    """The figures of every recipe on the first `count` images, as far as both it and float have seen them.

    Args:
      trainings: seed -> contenders, all of the same recipes. Of several, each figure is the mean, and `seed` is "mean".
      count: images at most.
    """
    by_seed = list(trainings.values())
    for name in by_seed[0]:
        pairs = [(contenders["float"], contenders[name]) for contenders in by_seed]
        n = min(count, *(len(c.logits) for pair in pairs for c in pair))
        if name == "float" or n < 2:
            continue
        before, after = ([pair[k].logits[:n] for pair in pairs] for k in range(2))
        found = mean_paired_difference(pairs[0][0].labels[:n], before, after)
        facts = [pair[1].facts for pair in pairs]
        yield {
            "seed": next(iter(trainings)) if len(trainings) == 1 else "mean",
            "recipe": name,
            "images": n,
            **found.percent(),
            "sqnr_db": float(np.mean([sqnr_db([b], [a]) for b, a in zip(before, after, strict=True)])),
            **{key: type(value)(np.mean([f[key] for f in facts])) for key, value in facts[0].items()},
        }


def print_row(name: str, row: dict[str, Any]) -> None:
    """A line of the table."""
    print(f"{name:<13} {row['seed']:>4} {row['recipe']:<14} {row['images']:>6} {row['float']:>8.2f} "
          f"{row['int8']:>7.2f} {row['lost']:>7.2f} ± {row['margin']:<5.2f} {row['sqnr_db']:>8.1f} "
          f"{row['islands']:>7} {row['weight_ratio']:>7.3f}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(trained.MODELS), choices=list(trained.MODELS))
    parser.add_argument("--recipes", nargs="+", default=["default"], choices=list(VARIANTS), metavar="NAME",
                        help=f"of {', '.join(VARIANTS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training each")
    parser.add_argument("--images", type=int, default=50_000, help="test images")
    parser.add_argument("--calibration", type=int, default=50, help="calibration images")
    parser.add_argument("--json", type=Path, help="write the figures here, after every network")
    options = parser.parse_args()
    if options.images < 2 or options.calibration < 1:
        parser.error("need at least 2 test images and 1 calibration image")

    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}, "
          f"{options.calibration} calibration images")  # fmt: skip
    print(f"{'model':<13} {'seed':>4} {'recipe':<14} {'images':>6} {'float %':>8} {'int8 %':>7} "
          f"{'points lost':>15} {'SQNR dB':>8} {'islands':>7} {'weights':>7}")  # fmt: skip
    figures: list[dict[str, Any]] = []
    for name in options.models:
        settings = trained.settings_of(name)
        trainings: dict[int, dict[str, Contender]] = {}
        interrupted = False
        for seed in options.seeds:
            model, _ = trained.trained(settings, seed)
            weights = settings.path(seed).name
            found = contenders_of(model, weights, settings.size, options.recipes, options.calibration)
            try:
                evaluate(list(found.values()), options.images, settings.size, f"{name}, seed {seed}")
            except KeyboardInterrupt:
                interrupted = True
            trainings[seed] = found
            one_or_all = [{seed: found}]
            if len(options.seeds) > 1 and (interrupted or seed == options.seeds[-1]) and len(trainings) > 1:
                one_or_all.append(trainings)
            for row in (row for chosen in one_or_all for row in rows(chosen, options.images)):
                figures.append({"model": name, **row})
                print_row(name, row)
            if options.json:
                dumps.write_text(options.json, json.dumps({"jax": jax.__version__, "rows": figures}, indent=1) + "\n")
            if interrupted:
                print("interrupted: these are the images so far; the same command goes on from here", file=sys.stderr)
                return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
