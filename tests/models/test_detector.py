import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qcompiler.models import detector, scenes
from qcompiler.models.detector import Detector, assign, cells, decode


def test_shapes_and_ranges():
    model = Detector(3, 8, rngs=nnx.Rngs(0))
    model.eval()
    images = jax.random.uniform(jax.random.key(0), (2, 32, 48, 3))
    predictions = np.asarray(nnx.jit(model)(images))
    # 4x6 cells of 8 pixels and 2x3 of 16.
    assert predictions.shape == (2, 30, 8) and predictions.dtype == np.float32
    assert np.all(predictions[..., 2:4] > predictions[..., :2])
    assert np.all((predictions[..., 4:] > 0) & (predictions[..., 4:] < 1))
    # The heads start with nearly every cell empty.
    assert predictions[..., 4].mean() < 0.1


def test_cells_are_in_the_order_of_the_maps():
    grid = cells(32, 48)
    np.testing.assert_array_equal(grid[:3], [[4, 4, 8], [12, 4, 8], [20, 4, 8]])
    np.testing.assert_array_equal(grid[6], [4, 12, 8])
    np.testing.assert_array_equal(grid[24:26], [[8, 8, 16], [24, 8, 16]])
    with pytest.raises(ValueError, match="multiples of 16, got 40x48"):
        cells(40, 48)


def test_a_map_sees_its_own_place():
    """An impulse changes the raw predictions around it more than far away: rows and columns are not swapped."""
    model = Detector(1, 8, rngs=nnx.Rngs(0))
    model.eval()
    image = np.full((1, 64, 128, 3), 0.5, np.float32)
    changed = image.copy()
    changed[:, 48:56, 16:24] = 1.0
    apply = nnx.jit(lambda model, image: model.raw(image))
    differs = np.abs(np.asarray(apply(model, changed)) - np.asarray(apply(model, image))).max(axis=(0, 2))
    assert np.argmax(differs[: 8 * 16]) in [row * 16 + column for row in (5, 6, 7) for column in (1, 2, 3)]


def test_decoding_inverts_what_a_box_is():
    grid = cells(32, 32)
    boxes = np.tile(np.array([3.0, 5.0, 21.0, 29.0], np.float32), (len(grid), 1))
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    raw = np.concatenate([(centre - grid[:, :2]) / grid[:, 2:], np.log(size / grid[:, 2:])], axis=-1)
    np.testing.assert_allclose(decode(jnp.asarray(raw)[None], 32, 32)[0], boxes, atol=1e-4)  # float32 at 30 pixels
    assert np.all(np.isfinite(decode(jnp.full((1, len(grid), 4), 1e6), 32, 32)))


def test_every_object_has_one_cell():
    boxes = np.zeros((1, 4, 4), np.float32)
    boxes[0, 0] = [8, 0, 16, 8]  # small, centre (12, 4): cell 1 of the fine map
    boxes[0, 1] = [0, 0, 32, 32]  # large, centre (16, 16): on an edge, the last cell of the coarse map
    boxes[0, 2] = [8, 2, 12, 6]  # small, centre (10, 4): the same cell as the first, and smaller
    labels = np.array([[0, 1, 2, -1]], np.int32)
    owner = np.asarray(assign(jnp.asarray(boxes), jnp.asarray(labels), 32, 32))[0]
    assert owner.dtype == np.int32 and owner.shape == (20,)
    assert {int(i): int(owner[i]) for i in np.flatnonzero(owner >= 0)} == {1: 2, 19: 1}


def test_procedural_objects_all_get_cells():
    _, boxes, labels = scenes.examples("test", 0, 64)
    owner = np.asarray(assign(jnp.asarray(boxes), jnp.asarray(labels), 64, 64))
    for its, kinds in zip(owner, labels, strict=True):
        assert sorted(its[its >= 0]) == list(np.flatnonzero(kinds >= 0))
    on_coarse = np.count_nonzero(owner[:, 64:] >= 0) / np.count_nonzero(owner >= 0)
    assert 0.1 < on_coarse < 0.9


def test_the_loss_is_lowest_for_the_truth():
    class Fixed(nnx.Module):
        """Says the same raw predictions about every image."""

        classes = 2

        def __init__(self, raw):
            self._raw = nnx.Variable(raw)

        def raw(self, images):
            return self._raw[...]

    boxes, labels = jnp.asarray([[[4.0, 4.0, 12.0, 12.0]]]), jnp.asarray([[1]], jnp.int32)
    images, grid = jnp.zeros((1, 16, 16, 3)), cells(16, 16)
    owner = int(np.flatnonzero(np.asarray(assign(boxes, labels, 16, 16))[0] >= 0)[0])
    raw = np.zeros((1, len(grid), 7), np.float32)
    raw[..., 4] = -20
    raw[0, owner, :2] = (8 - grid[owner, :2]) / grid[owner, 2]
    raw[0, owner, 4:] = [20, -20, 20]
    loss_of = lambda raw: float(detector.loss(Fixed(jnp.asarray(raw)), images, (boxes, labels)))
    assert 0 <= loss_of(raw) < 1e-4
    for place in ((owner, 0), (owner, 2), (owner, 4), (owner, 5), ((owner + 1) % len(grid), 4)):
        worse = raw.copy()
        worse[0, place[0], place[1]] *= -1
        worse[0, place[0], place[1]] += 0.5
        assert loss_of(worse) > 0.1
