"""Scenes: the same at every call, boxes that fit; and average precision by hand."""

import numpy as np
import pytest

from qcompiler.models import scenes
from qcompiler.models.procedural import BLOCK, CLASSES
from qcompiler.models.scenes import OBJECTS, detections, examples, iou, mean_average_precision


def test_scenes_are_what_is_promised():
    images, boxes, labels = examples("train", 0, 64)
    assert images.shape == (64, 64, 64, 3) and images.dtype == np.float32
    assert boxes.shape == (64, OBJECTS, 4) and boxes.dtype == np.float32
    assert labels.shape == (64, OBJECTS) and labels.dtype == np.int32
    assert 0 <= images.min() and images.max() <= 1
    shown = labels >= 0
    assert set(shown.sum(axis=1)) == set(range(1, OBJECTS + 1)) and set(labels[shown]) == set(range(len(CLASSES)))
    assert np.all(boxes[~shown] == 0) and np.all(labels[~shown] == -1)
    sides = boxes[shown][:, 2:] - boxes[shown][:, :2]
    assert boxes.min() >= 0 and boxes.max() <= 64 and sides.min() >= 4 and sides.max() <= 32


def test_a_scene_depends_on_seed_stream_and_index_alone():
    whole = examples("test", 0, 2 * BLOCK, size=32)
    for start, count in ((0, 1), (BLOCK - 1, 2), (5, BLOCK)):
        for part, all_of_it in zip(examples("test", start, count, size=32), whole, strict=True):
            np.testing.assert_array_equal(part, all_of_it[start : start + count])
    others = (examples("train", 0, 4, size=32), examples("test", 0, 4, size=32, seed=1))
    assert all(not np.array_equal(whole[0][:4], other[0]) for other in others)


def test_boxes_hold_their_shapes():
    """Colour differs from the background more inside the boxes than outside."""
    images, boxes, labels = examples("calibration", 0, 32)
    inside, outside = [], []
    for image, its_boxes, kinds in zip(images, boxes, labels, strict=True):
        mask = np.zeros((64, 64), bool)
        for x1, y1, x2, y2 in its_boxes[kinds >= 0].astype(int):
            mask[y1:y2, x1:x2] = True
        distance = np.abs(image - np.median(image[~mask], axis=0)).max(axis=-1)
        inside.append(distance[mask].mean())
        outside.append(distance[~mask].mean())
    assert np.mean(inside) > 2 * np.mean(outside)


def test_iou_by_hand():
    a = np.array([[0, 0, 2, 2], [5, 5, 5, 5]], np.float32)
    b = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [2, 0, 4, 2]], np.float32)
    np.testing.assert_allclose(iou(a, b), [[1, 1 / 7, 0], [0, 0, 0]], rtol=1e-6)


def predictions_of(boxes, labels):
    """What a perfect detector says: one cell for each object, the others empty."""
    kinds = np.eye(len(CLASSES), dtype=np.float32)[np.maximum(labels, 0)]
    present = (labels >= 0).astype(np.float32)[..., None]
    return np.concatenate([boxes, present, kinds], axis=-1)


def test_perfect_boxes_score_one():
    _, boxes, labels = examples("test", 0, 64)
    perfect = predictions_of(boxes, labels)
    assert mean_average_precision(detections(perfect), boxes, labels) == 1
    # A second box for every object is suppressed, or counts as wrong where it is kept.
    twice = np.concatenate([perfect, perfect * np.array([1] * 4 + [0.9] + [1] * 12, np.float32)], axis=1)
    assert mean_average_precision(detections(twice), boxes, labels) == 1
    shifted = predictions_of(np.where(labels[..., None] >= 0, boxes + 20, 0), labels)
    assert mean_average_precision(detections(shifted), boxes, labels) < 0.05
    wrong = predictions_of(boxes, np.where(labels >= 0, (labels + 1) % len(CLASSES), -1))
    assert mean_average_precision(detections(wrong), boxes, labels) < 0.05


def test_average_precision_by_hand():
    box, far = [0.0, 0.0, 10.0, 10.0], [30.0, 30.0, 40.0, 40.0]
    boxes, labels = np.array([[box], [box]]), np.array([[0], [0]])
    found = lambda *rows: (np.array([r[0] for r in rows]).reshape(-1, 4), np.zeros(len(rows), int),
                           np.array([r[1] for r in rows]))  # fmt: skip
    # Right at 0.9, wrong at 0.8, right at 0.7: precision 1 up to recall 1/2, then 2/3.
    score = mean_average_precision([found((box, 0.9), (far, 0.8)), found((box, 0.7))], boxes, labels)
    assert score == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # The second box on one object is wrong, though it fits.
    score = mean_average_precision([found((box, 0.9), (box, 0.8)), found((box, 0.7))], boxes, labels)
    assert score == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert mean_average_precision([found(), found((box, 0.7))], boxes, labels) == 0.5


def test_worse_boxes_of_a_class_are_suppressed():
    rows = np.array([
        [0, 0, 10, 10, 1.0, 0.9, 0.0],
        [1, 0, 11, 10, 1.0, 0.8, 0.0],
        [1, 0, 11, 10, 1.0, 0.0, 0.7],
        [30, 0, 40, 10, 0.5, 0.5, 0.0],
        [50, 0, 60, 10, 0.001, 0.5, 0.0],
    ])  # fmt: skip
    ((boxes, labels, scores),) = detections(rows[None])
    np.testing.assert_array_equal(boxes[:, 0], [0, 1, 30])
    np.testing.assert_array_equal(labels, [0, 1, 0])
    np.testing.assert_allclose(scores, [0.9, 0.7, 0.25])
    assert len(detections(rows[None], most=1)[0][0]) == 1


def test_what_cannot_be_scored_is_refused():
    none = (np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    with pytest.raises(ValueError, match="detections of 1 images, 2 rows"):
        mean_average_precision([none], np.zeros((2, 1, 4)), np.zeros((2, 1), int))
    with pytest.raises(ValueError, match="no image shows any object"):
        mean_average_precision([none], np.zeros((1, 1, 4)), np.full((1, 1), -1))
    with pytest.raises(ValueError, match="stream must be one of"):
        scenes.examples("valid", 0, 1)
