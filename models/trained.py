"""Networks trained on the tasks of `qcompiler.models.tasks`, from the cache or, the first time, in some minutes.

    python -m qcompiler.models.trained resnet llama detector --seed 0

A training that was interrupted goes on after its last whole epoch. jax versions and processors round differently, so
they train slightly different weights; the cache keeps whichever came first, and its notes say where it was made.
"""

import argparse
import dataclasses
import platform
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from qcompiler.models import (
    bound,
    cache,
    depthwise,
    detector,
    layers,
    llama,
    lstm,
    mobilenet,
    procedural,
    resnet,
    tasks,
    training,
    vit,
)

#: Name -> the untrained network for a seed, and the modules that it is of.
Networks = dict[str, tuple[Callable[[int], nnx.Module], tuple[types.ModuleType, ...]]]


def _resnet(seed: int) -> resnet.ResNet:
    return resnet.ResNet(resnet.BasicBlock, (2, 2), width=64, classes=len(procedural.CLASSES), rngs=nnx.Rngs(seed))


def _mobilenet(seed: int) -> mobilenet.MobileNetV2:
    classes = len(procedural.CLASSES)
    return mobilenet.MobileNetV2(0.5, classes, plan="small", depthwise="shifted", rngs=nnx.Rngs(seed))


def _vit(seed: int) -> vit.ViT:
    # Patches of raw pixels reach 43 % after 4,000 steps, this stem 62 % after 700.
    stem, classes = (32, 64, 128), len(procedural.CLASSES)
    return vit.ViT(32, 8, width=96, depth=4, heads=4, hidden=384, stem=stem, classes=classes, rngs=nnx.Rngs(seed))


def _llama(seed: int) -> llama.Llama:
    return llama.Llama(llama.LlamaConfig(), rngs=nnx.Rngs(seed))


def _lstm(seed: int) -> lstm.RecurrentLM:
    return lstm.RecurrentLM(256, rngs=nnx.Rngs(seed))


def _detector(seed: int) -> detector.Detector:
    return detector.Detector(len(procedural.CLASSES), rngs=nnx.Rngs(seed))


#: Classifiers of the procedural pictures: `float32[n, size, size, 3]` to logits `float32[n, 12]`.
MODELS: Networks = {
    "resnet": (_resnet, (resnet, layers)),
    "mobilenet_v2": (_mobilenet, (mobilenet, depthwise, layers)),
    "vit": (_vit, (vit,)),
}
#: Language models over bytes: `int32[n, s]` to logits `float32[n, s, 256]`. For the scanned form of Llama stack the
#: layers of the trained one.
LANGUAGE_MODELS: Networks = {
    "llama": (_llama, (llama, bound)),
    "lstm": (_lstm, (lstm,)),
}
#: Detectors of the shapes in procedural scenes: `float32[n, size, size, 3]` to `float32[n, cells, 17]`.
DETECTORS: Networks = {"detector": (_detector, (detector, layers))}


def _found(name: str) -> tuple[Callable[[int], nnx.Module], tuple[types.ModuleType, ...], tasks.Task]:
    """How to build the network of a name, the modules it is of, and its task."""
    groups = ((MODELS, tasks.SHAPES), (LANGUAGE_MODELS, tasks.BYTES), (DETECTORS, tasks.SCENES))
    for networks, task in groups:
        if name in networks:
            return *networks[name], task
    raise ValueError(f"model must be one of {', '.join(names())}, got {name!r}")


def names() -> list[str]:
    """The names of all networks."""
    return [*MODELS, *LANGUAGE_MODELS, *DETECTORS]


@dataclasses.dataclass(frozen=True)
class Training:
    """All that is chosen about a training, but for its seed.

    Attributes:
      model: one of `names()`.
      epochs, steps, batch_size: an epoch is `steps` batches of examples never seen before.
      learning_rate, weight_decay: of AdamW.
      size: of an example: of an image in pixels, of a sequence in bytes.
    """

    model: str
    epochs: int = 20
    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    size: int = 32

    def path(self, seed: int) -> Path:
        """Where in the cache the trained weights are kept.

        Raises:
          ValueError: no such model.
        """
        build, modules, task = _found(self.model)
        settings = {**dataclasses.asdict(self), **task.facts(), "seed": seed}
        key = cache.key_of(settings, (build, *modules, *task.modules, training))
        return cache.cache_folder() / f"{self.model}-{seed}-{key}.npz"


_CHOSEN = {
    # MobileNetV2 is deep and thin: it sees five times the images, in larger batches.
    "mobilenet_v2": Training("mobilenet_v2", epochs=50, batch_size=64, learning_rate=2e-3),
    "vit": Training("vit", epochs=50, learning_rate=1e-3, weight_decay=0.05),
    "llama": Training("llama", epochs=20, batch_size=16, learning_rate=3e-3, weight_decay=0.1, size=128),
    "lstm": Training("lstm", epochs=20, batch_size=32, learning_rate=5e-3, size=128),
    "detector": Training("detector", epochs=40, size=64),
}


def settings_of(name: str) -> Training:
    """The training of a model that the benchmarks use."""
    return _CHOSEN.get(name, Training(name))


def trained(settings: Training | str, seed: int = 0) -> tuple[nnx.Module, dict[str, Any]]:
    """A trained network, loaded from the cache or trained and put there.

    Args:
      settings: a training, or the name of a model for its default one.
      seed: of the weights and of the training examples.

    Returns:
      The model in evaluation mode, depthwise convolutions computed by `jax.lax`, and notes: the task's score on
      examples it was not trained on, by its name (`tasks.Task.score`: `accuracy`, `bits_per_byte` or `map50`),
      `seconds`, `history` (mean loss of each epoch), `jax`, `processor`.

    Raises:
      ValueError: no such model.
      CacheError: the cached file is damaged.
    """
    if isinstance(settings, str):
        settings = settings_of(settings)
    build, _, task = _found(settings.model)
    model = build(seed)
    path = settings.path(seed)
    if path.exists():
        arrays, notes = cache.load(path)
        cache.restore(model, arrays, path)
        model.eval()
    else:
        notes = _train(model, task, settings, seed, path)
    mobilenet.use_depthwise(model, "conv")
    return model, notes


def _train(model: nnx.Module, task: tasks.Task, settings: Training, seed: int, path: Path) -> dict[str, Any]:
    """Trains in place and writes the file; returns its notes."""
    checkpoint = path.with_suffix(".partial.npz")

    def batches(epoch: int):
        for step in range(epoch * settings.steps, (epoch + 1) * settings.steps):
            yield task.examples(step * settings.batch_size, settings.batch_size, seed, settings.size)

    start = time.perf_counter()
    history = training.train_on_batches(
        model,
        batches,
        epochs=settings.epochs,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        loss=task.loss,
        seed=seed,
        label=f"training {settings.model}, seed {seed}",
        checkpoint=checkpoint,
    )
    # As an argument: modules with loops of their own cannot be captured.
    call = nnx.jit(lambda model, x: model(x))
    notes = {
        task.score: task.evaluate(lambda x: call(model, x), seed, settings.size),
        "seconds": time.perf_counter() - start,
        "history": history,
        "jax": jax.__version__,
        "processor": f"{jax.default_backend()}, {platform.machine()}",
    }
    cache.save(path, cache.arrays_of(model), notes)
    checkpoint.unlink(missing_ok=True)
    return notes


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m qcompiler.models.trained", description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=names(), choices=names(), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training examples")
    arguments = parser.parse_args()
    for name in arguments.models:
        _, notes = trained(name, arguments.seed)
        path = settings_of(name).path(arguments.seed)
        score = _found(name)[2].score
        print(f"{name}, seed {arguments.seed}: {score} {notes[score]:.4f} on unseen examples")
        print(f"  trained in {notes['seconds']:.0f} s under jax {notes['jax']}: {path}")


if __name__ == "__main__":
    main()
