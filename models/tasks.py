"""What the repository's networks learn: endless training examples from a seed, a loss, a score on examples never seen.

Shapes in pictures are named, bytes of source code predicted, several shapes in a picture found.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qcompiler.models import procedural, scenes, text, training
from qcompiler.models.detector import loss as detection_loss

#: Where in the training stream the pictures start that tell a training's score; no training reaches them.
_HELD_OUT = 2**31
_HELD_OUT_IMAGES = 2048
_HELD_OUT_SCENES = 512
_HELD_OUT_SEQUENCES = 512
_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      examples: `(start, count, seed, size)` to inputs and targets of training examples `start` to `start + count - 1`.
      loss: what training minimizes.
      score: name of what `evaluate` gives.
      evaluate: `(model, seed, size)` to the score on examples that no training with this seed sees; the model is called
        on batches of one shape.
      modules: whose code decides the examples and, with the model's own, the loss.
      facts: gives JSON values that decide them too.
    """

    examples: Callable[[int, int, int, int], training.Batch]
    loss: training.Loss
    score: str
    evaluate: Callable[[Callable[[Any], jax.Array], int, int], float]
    modules: tuple[types.ModuleType, ...]
    facts: Callable[[], dict[str, Any]] = dict


def _shapes(start: int, count: int, seed: int, size: int) -> training.Batch:
    return procedural.examples("train", start, count, seed=seed, size=size)


def _accuracy(model: Callable[[Any], jax.Array], seed: int, size: int) -> float:
    return training.accuracy(model, *_shapes(_HELD_OUT, _HELD_OUT_IMAGES, seed, size))


def _sequences(start: int, count: int, seed: int, size: int) -> training.Batch:
    return text.sequences(start, count, length=size, seed=seed)


def _bits_per_byte(model: Callable[[Any], jax.Array], seed: int, size: int) -> float:
    return text.bits_per_byte(model, *text.held_out(_HELD_OUT_SEQUENCES, length=size))


def _scenes(start: int, count: int, seed: int, size: int) -> training.Batch:
    images, boxes, labels = scenes.examples("train", start, count, seed=seed, size=size)
    return images, (boxes, labels)


def _map50(model: Callable[[Any], jax.Array], seed: int, size: int) -> float:
    images, (boxes, labels) = _scenes(_HELD_OUT, _HELD_OUT_SCENES, seed, size)
    predicted = [np.asarray(model(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)]
    return scenes.mean_average_precision(scenes.detections(np.concatenate(predicted)), boxes, labels)


#: Which of twelve shapes is it? The score is the share of right answers, 0 to 1.
SHAPES = Task(_shapes, training.cross_entropy, "accuracy", _accuracy, (procedural,))
#: Which byte of a Python source follows? The score is in bits; 8 is that of guessing.
BYTES = Task(
    _sequences, training.cross_entropy, "bits_per_byte", _bits_per_byte, (text,), lambda: {"corpus": text.fingerprint()}
)
#: Where are which shapes? The score is the mean average precision at an IoU of 0.5, 0 to 1.
SCENES = Task(_scenes, detection_loss, "map50", _map50, (scenes, procedural))
