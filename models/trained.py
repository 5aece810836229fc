"""Networks trained on the procedural pictures, from the cache or, the first time, in some minutes.

    python -m qcompiler.models.trained resnet mobilenet_v2 --seed 0

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

from qcompiler.models import cache, depthwise, layers, mobilenet, procedural, resnet, training

#: Where in the training stream the images start that tell a training's accuracy; no training reaches them.
_HELD_OUT = 2**31
_HELD_OUT_IMAGES = 2048


def _resnet(seed: int) -> resnet.ResNet:
    return resnet.ResNet(resnet.BasicBlock, (2, 2), width=64, classes=len(procedural.CLASSES), rngs=nnx.Rngs(seed))


def _mobilenet(seed: int) -> mobilenet.MobileNetV2:
    classes = len(procedural.CLASSES)
    return mobilenet.MobileNetV2(0.5, classes, plan="small", depthwise="shifted", rngs=nnx.Rngs(seed))


#: Name -> the untrained network for a seed, mapping `float32[n, size, size, 3]` to `float32[n, 12]`, and what it is of.
MODELS: dict[str, tuple[Callable[[int], nnx.Module], tuple[types.ModuleType, ...]]] = {
    "resnet": (_resnet, (resnet, layers)),
    "mobilenet_v2": (_mobilenet, (mobilenet, depthwise, layers)),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """All that is chosen about a training, but for its seed.

    Attributes:
      model: a name in `MODELS`.
      epochs, steps, batch_size: an epoch is `steps` batches of images never seen before.
      learning_rate, weight_decay: of AdamW.
      size: of the images, in pixels.
    """

    model: str
    epochs: int = 20
    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4
    size: int = 32

    def path(self, seed: int) -> Path:
        """Where in the cache the trained weights are kept."""
        build, modules = MODELS[self.model]
        key = cache.key_of({**dataclasses.asdict(self), "seed": seed}, (build, *modules, procedural, training))
        return cache.cache_folder() / f"{self.model}-{seed}-{key}.npz"


#: MobileNetV2 is deep and thin: it sees five times the images, in larger batches.
_CHOSEN = {"mobilenet_v2": Training("mobilenet_v2", epochs=50, batch_size=64, learning_rate=2e-3)}


def settings_of(name: str) -> Training:
    """The training of a model that the benchmarks use."""
    return _CHOSEN.get(name, Training(name))


def trained(settings: Training | str, seed: int = 0) -> tuple[nnx.Module, dict[str, Any]]:
    """A trained network, loaded from the cache or trained and put there.

    Args:
      settings: a training, or the name of a model for its default one.
      seed: of the weights and of the training images.

    Returns:
      The model in evaluation mode, depthwise convolutions computed by `jax.lax`, and notes: `accuracy` (0 to 1, on
      2,048 images it was not trained on), `seconds`, `history` (mean loss of each epoch), `jax`, `processor`.

    Raises:
      ValueError: no such model.
      CacheError: the cached file is damaged.
    """
    if isinstance(settings, str):
        settings = settings_of(settings)
    if settings.model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {settings.model!r}")
    build, _ = MODELS[settings.model]
    model = build(seed)
    path = settings.path(seed)
    if path.exists():
        arrays, notes = cache.load(path)
        cache.restore(model, arrays, path)
        model.eval()
    else:
        notes = _train(model, settings, seed, path)
    mobilenet.use_depthwise(model, "conv")
    return model, notes


def _train(model: nnx.Module, settings: Training, seed: int, path: Path) -> dict[str, Any]:
    """Trains in place and writes the file; returns its notes."""
    checkpoint = path.with_suffix(".partial.npz")
    images_of = lambda first, count: procedural.examples("train", first, count, seed=seed, size=settings.size)

    def batches(epoch: int):
        for step in range(epoch * settings.steps, (epoch + 1) * settings.steps):
            yield images_of(step * settings.batch_size, settings.batch_size)

    start = time.perf_counter()
    history = training.train_on_batches(
        model,
        batches,
        epochs=settings.epochs,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        seed=seed,
        label=f"training {settings.model}, seed {seed}",
        checkpoint=checkpoint,
    )
    notes = {
        "accuracy": training.accuracy(nnx.jit(model), *images_of(_HELD_OUT, _HELD_OUT_IMAGES)),
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
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training images")
    arguments = parser.parse_args()
    for name in arguments.models:
        _, notes = trained(name, arguments.seed)
        path = settings_of(name).path(arguments.seed)
        print(f"{name}, seed {arguments.seed}: {notes['accuracy']:.2%} of {_HELD_OUT_IMAGES} unseen images right")
        print(f"  trained in {notes['seconds']:.0f} s under jax {notes['jax']}: {path}")


if __name__ == "__main__":
    main()
