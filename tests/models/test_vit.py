import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qcompiler.models.vit import ViT

OPTIONS = dict(size=16, patch=4, width=16, depth=2, heads=2, hidden=32, classes=5)


@pytest.mark.parametrize("pooling", ["mean", "token"])
@pytest.mark.parametrize("size", [16, 32])
def test_shapes(pooling, size):
    model = ViT(**(OPTIONS | {"size": size, "pooling": pooling}), rngs=nnx.Rngs(0))
    logits = model(jax.random.uniform(jax.random.key(0), (3, size, size, 3)))
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    assert model.positions.shape == (1, (size // 4) ** 2 + (pooling == "token"), 16)


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_patches_are_tokens_in_a_set(pooling):
    """Without positions the order of the patches does not matter; with them it does."""
    model = ViT(**OPTIONS, pooling=pooling, rngs=nnx.Rngs(0))
    image = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))
    swapped = jnp.concatenate([image[:, :, 4:8], image[:, :, :4], image[:, :, 8:]], axis=2)
    assert np.abs(model(image) - model(swapped)).max() > 1e-4
    model.positions[...] = jnp.zeros_like(model.positions[...])
    # Sums over the same tokens in another order, in float32.
    np.testing.assert_allclose(model(image), model(swapped), atol=1e-5)


def test_a_stem_makes_the_map_smaller_before_it_is_cut():
    model = ViT(**(OPTIONS | {"stem": (6, 8), "patch": 8}), rngs=nnx.Rngs(0))
    assert [conv.kernel.shape for conv in model.stem.convs] == [(3, 3, 3, 6), (3, 3, 6, 6), (3, 3, 6, 8), (3, 3, 8, 8)]
    assert model.patches.kernel.shape == (2, 2, 8, 16) and model.positions.shape == (1, 4, 16)
    x = jax.random.uniform(jax.random.key(0), (3, 16, 16, 3))
    assert model(x).shape == (3, 5)
    # Behind its batch norms the stem does not tell how bright the images are.
    model.train()
    np.testing.assert_allclose(model.stem(x), model.stem(5 * x), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, "cannot be cut into patches of 5"),
        ({"pooling": "max"}, "mean, token"),
        ({"stem": (4, 8, 16)}, "leaves no whole patch of 4"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViT(**(OPTIONS | options), rngs=nnx.Rngs(0))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="images must be 16x16, got 20x16"):
        ViT(**OPTIONS, rngs=nnx.Rngs(0))(jnp.zeros((1, 20, 16, 3)))
