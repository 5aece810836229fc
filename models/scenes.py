"""An endless set of pictures with several shapes to find, drawn from a seed, and how well a detector finds them.

Each picture shows up to `OBJECTS` of the shapes of `qcompiler.models.procedural`, at random places on a coarse lattice
so that they overlap little, before a textured background, noisy. Streams and indices are those of that module.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.models.procedural import CLASSES, SHAPES, Draw, Stream, drawn, rotated, texture

#: Objects of a picture at most.
OBJECTS = 4
_LATTICE = 3  # places along each side of the picture


def _object(
    key: jax.Array, place: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Label `int32[]`, signed distance and coverage `float32[size, size]`, colour `float32[3]` of one object.

    `place` counts the lattice's points; coordinates x and y run from -1 to 1 across the picture.
    """
    label_key, factor_key = jax.random.split(key)
    label = jax.random.randint(label_key, (), 0, len(CLASSES), jnp.int32)
    draw = Draw(factor_key)
    pitch = 2 / _LATTICE
    across, down = ((k.astype(jnp.float32) + 0.5) * pitch - 1 for k in (place % _LATTICE, place // _LATTICE))
    radius = draw(0.2, 0.36)
    u, v = rotated(x - across - draw(-0.12, 0.12), y - down - draw(-0.12, 0.12), draw(-0.6, 0.6))
    u, v = u / radius, v / radius
    distance = jnp.select([label == k for k in range(len(SHAPES))], [shape(u, v) for shape in SHAPES]) * radius
    inside = jax.nn.sigmoid(-distance * x.shape[0])
    return label, distance, inside, draw.many(3, 0, 1)


def _scene(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One image `float32[size, size, 3]`, its boxes `float32[OBJECTS, 4]` and labels `int32[OBJECTS]`."""
    count_key, place_key, ground_key, noise_key, object_key = jax.random.split(key, 5)
    count = jax.random.randint(count_key, (), 1, OBJECTS + 1, jnp.int32)
    places = jax.random.permutation(place_key, _LATTICE**2)[:OBJECTS]
    centres = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2 / size) - 1
    y, x = jnp.meshgrid(centres, centres, indexing="ij")

    draw = Draw(ground_key)
    ground = draw.many(3, 0.2, 0.8)
    picture = ground + texture(draw, x, y)[..., None] * draw.many(3, -0.12, 0.12)
    labels, distances, coverages, colours = jax.vmap(_object, in_axes=(0, 0, None, None))(
        jax.random.split(object_key, OBJECTS), places, x, y
    )
    # A channel too near the background's is moved by half the range.
    colours = jnp.where(jnp.abs(colours - ground) < 0.2, jnp.mod(colours + 0.5, 1.0), colours)
    for i in range(OBJECTS):
        covered = (coverages[i] * (i < count).astype(jnp.float32))[..., None]
        picture = picture + (colours[i] - picture) * covered
    picture = picture * (1 + draw(0, 0.3) * rotated(x, y, draw(0, 2 * np.pi))[0])[..., None]
    picture = picture + draw(0.01, 0.05) * jax.random.normal(noise_key, picture.shape)

    shown = jnp.arange(OBJECTS) < count
    boxes = jnp.where(shown[:, None], jax.vmap(_box)(distances < 0), 0.0)
    return jnp.clip(picture, 0, 1), boxes, jnp.where(shown, labels, -1)


def _box(inside: jax.Array) -> jax.Array:
    """Corners x1, y1, x2, y2 in pixels of the true elements of `bool[size, size]`."""
    sides = []
    for axis in (0, 1):
        taken = jnp.any(inside, axis=axis)
        sides.append((jnp.argmax(taken), taken.size - jnp.argmax(taken[::-1])))
    (left, right), (top, bottom) = sides
    return jnp.stack([left, top, right, bottom]).astype(jnp.float32)


def examples(
    stream: Stream, start: int, count: int, *, seed: int = 0, size: int = 64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures `start` to `start + count - 1` of a stream; arguments and errors as `procedural.drawn` has them.

    Returns:
      `(images, boxes, labels)`: `float32[count, size, size, 3]` in [0, 1]; `float32[count, OBJECTS, 4]`, the corners
      x1, y1, x2, y2 of each whole shape within the picture, in pixels; `int32[count, OBJECTS]`, places in `CLASSES`,
      or -1, with a box of zeros, for the objects that a picture has fewer.
    """
    images, boxes, labels = drawn(_scene, stream, start, count, seed=seed, size=size)
    return images, boxes, labels


# Evaluation


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of all pairs of boxes `float[n, 4]` and `float[m, 4]`: `float[n, m]`, 0 to 1."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.prod(np.maximum(high - low, 0), axis=-1)
    areas = [np.prod(np.maximum(x[:, 2:] - x[:, :2], 0), axis=-1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - both
    return both / np.maximum(union, np.finfo(union.dtype).tiny)


def detections(
    predictions: np.ndarray, *, lowest: float = 0.01, overlap: float = 0.5, most: int = 50
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Boxes of each image, best first, without those that overlap a better one of their class.

    Args:
      predictions: `float[n, cells, 5 + classes]` of a `Detector`. A box's score for a class is its objectness times
        the class's probability.
      lowest: scores below are dropped.
      overlap: IoU from which the worse of two boxes is dropped.
      most: boxes kept of an image.

    Returns:
      For each image `(boxes float[k, 4], labels int[k], scores float[k])`.
    """
    found = []
    for image in np.asarray(predictions):
        scores = image[:, 4:5] * image[:, 5:]
        rows, labels = np.nonzero(scores >= lowest)
        order = np.argsort(-scores[rows, labels], kind="stable")
        rows, labels = rows[order], labels[order]
        boxes, values = image[rows, :4], scores[rows, labels]
        clash = (iou(boxes, boxes) > overlap) & (labels[:, None] == labels[None, :])
        kept: list[int] = []
        for i in range(len(rows)):
            if len(kept) < most and not clash[i, kept].any():
                kept.append(i)
        found.append((boxes[kept], labels[kept], values[kept]))
    return found


def mean_average_precision(
    found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    boxes: np.ndarray,
    labels: np.ndarray,
    *,
    overlap: float = 0.5,
) -> float:
    """The mean over classes of the area below the precision-recall curve, 0 to 1: mAP@`overlap`.

    As PASCAL VOC has it since 2010 (Everingham et al. 2015, doi:10.1007/s11263-014-0733-5): detections of all images
    are sorted by score; one is right if it overlaps an object of its class in its image which no better one has taken;
    precision is the best at that recall or a higher one.

    Args:
      found: for each image, of `detections`.
      boxes: `float[n, objects, 4]`.
      labels: `int[n, objects]`, -1 where there is no object. Classes without any object do not count.
      overlap: least IoU of a right detection.

    Raises:
      ValueError: numbers of images differ, or there is no object at all.
    """
    if not len(found) == len(boxes) == len(labels):
        raise ValueError(f"detections of {len(found)} images, {len(boxes)} rows of boxes, {len(labels)} of labels")
    present = np.unique(labels[labels >= 0])
    if not len(present):
        raise ValueError("no image shows any object")
    return float(np.mean([_average_precision(found, boxes, labels, kind, overlap) for kind in present]))


def _average_precision(
    found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    boxes: np.ndarray,
    labels: np.ndarray,
    kind: int,
    overlap: float,
) -> float:
    scores, right = [], []
    for (its_boxes, its_labels, its_scores), true_boxes, true_labels in zip(found, boxes, labels, strict=True):
        mine, truth = its_labels == kind, true_boxes[true_labels == kind]
        overlaps = iou(its_boxes[mine], truth)
        taken = np.zeros(len(truth), bool)
        for score, row in sorted(zip(its_scores[mine], overlaps, strict=True), key=lambda pair: -pair[0]):
            free = np.where(taken, -1, row)
            hit = len(free) > 0 and free.max() >= overlap
            if hit:
                taken[np.argmax(free)] = True
            scores.append(score)
            right.append(hit)
    order = np.argsort(-np.array(scores), kind="stable")
    hits = np.array(right, bool)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(best_from_here[hits]) / np.sum(labels == kind))
