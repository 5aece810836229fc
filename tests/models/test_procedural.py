import numpy as np
import pytest

from qcompiler.models import procedural
from qcompiler.models.procedural import BLOCK, CLASSES, STREAMS, examples


def test_images_are_what_is_promised():
    images, labels = examples("train", 0, 40)
    assert images.shape == (40, 32, 32, 3) and images.dtype == np.float32
    assert labels.shape == (40,) and labels.dtype == np.int32
    assert 0 <= images.min() < 0.05 and 0.95 < images.max() <= 1
    # Every image has some contrast: not all black, white or gray.
    assert np.all(images.std(axis=(1, 2, 3)) > 0.03)


def test_an_image_depends_on_seed_stream_and_index_alone():
    images, labels = examples("test", 0, 3 * BLOCK)
    for start, count in ((0, 1), (BLOCK - 1, 2), (5, 2 * BLOCK), (3 * BLOCK - 1, 1), (7, 0)):
        part, part_labels = examples("test", start, count)
        np.testing.assert_array_equal(part, images[start : start + count])
        np.testing.assert_array_equal(part_labels, labels[start : start + count])


def test_streams_and_seeds_share_no_image():
    n = 4 * BLOCK
    sets = {(stream, seed): examples(stream, 0, n, seed=seed)[0] for stream in STREAMS for seed in (0, 1)}
    seen = {image.tobytes() for images in sets.values() for image in images}
    assert len(seen) == n * len(sets)


def test_classes_are_even_and_shapes_differ():
    labels = examples("train", 0, 4096)[1]
    counts = np.bincount(labels, minlength=len(CLASSES))
    assert len(counts) == len(CLASSES) == 12
    # Five deviations of a binomial count of mean n/12 in each direction.
    assert np.all(np.abs(counts - 4096 / 12) < 5 * np.sqrt(4096 / 12))

    centres = (np.arange(32, dtype=np.float32) + 0.5) / 16 - 1
    y, x = np.meshgrid(centres, centres, indexing="ij")
    inside = [np.asarray(shape(x, y)) < 0 for shape in procedural.SHAPES]
    for i, one in enumerate(inside):
        assert 0.15 < one.mean() < 0.7, CLASSES[i]
        assert all(np.mean(one != other) > 0.02 for other in inside[:i]), CLASSES[i]


def test_other_sizes():
    images, _ = examples("calibration", 0, 2, size=48)
    assert images.shape == (2, 48, 48, 3)


def test_large_indices_are_images_too():
    images, _ = examples("train", 2**32 - 2, 2)
    assert images.shape == (2, 32, 32, 3) and not np.array_equal(images[0], images[1])


@pytest.mark.parametrize(
    ("stream", "start", "count"), [("validation", 0, 1), ("train", -1, 2), ("train", 2**32, 1), ("train", 0, -1)]
)
def test_what_is_not_there_is_refused(stream, start, count):
    with pytest.raises(ValueError, match=r"stream must be|are not within"):
        examples(stream, start, count)
