"""An endless set of small colour pictures, drawn from a seed: which of twelve shapes is it?

An image is a shape before a background, both textured, under uneven light, partly covered and noisy. Everything but the
shape varies freely from image to image: position, size, rotation, stretch, sharpness, colours, contrast, the kind,
direction and pitch of both textures, light, occlusion, noise. Shape edges are those of implicit functions, so that any
image size works.

Image `index` of a stream is the same at every call and in every batch: images are drawn in aligned blocks of one shape.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Stream = Literal["train", "calibration", "test"]
STREAMS: tuple[Stream, ...] = ("train", "calibration", "test")

#: Images that are drawn together; a batch that starts and ends on multiples wastes none.
BLOCK = 32

#: A key and a size in pixels -> arrays: an image and what is known about it.
DrawOne = Callable[[jax.Array, int], tuple[jax.Array, ...]]

_NUMBERS = 48  # uniform random numbers that an image may use for its factors of variation


# Shapes: functions of a point (x, y) of the plane, negative inside, about the distance to the edge, in a unit circle.


def _box(x: jax.Array, y: jax.Array, half_width: float, half_height: float) -> jax.Array:
    return jnp.maximum(jnp.abs(x) - half_width, jnp.abs(y) - half_height)


def _polygon(x: jax.Array, y: jax.Array, sides: int) -> jax.Array:
    step = 2 * jnp.pi / sides
    from_normal = jnp.mod(jnp.arctan2(y, x), step) - step / 2
    return jnp.hypot(x, y) * jnp.cos(from_normal) - float(np.cos(np.pi / sides))


def _disk(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.hypot(x, y) - 0.85


def _ring(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.abs(jnp.hypot(x, y) - 0.68) - 0.2


def _half_disk(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.hypot(x + 0.4, y) - 1.0, -(x + 0.4))


def _crescent(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.hypot(x, y) - 0.95, 0.75 - jnp.hypot(x - 0.45, y))


def _triangle(x: jax.Array, y: jax.Array) -> jax.Array:
    return _polygon(x, y, 3)


def _square(x: jax.Array, y: jax.Array) -> jax.Array:
    return _box(x, y, 0.72, 0.72)


def _pentagon(x: jax.Array, y: jax.Array) -> jax.Array:
    return _polygon(x, y, 5)


def _star(x: jax.Array, y: jax.Array) -> jax.Array:
    """Five points at radius 1; each half of a point is bounded by the line from there to radius 0.42."""
    step = 2 * np.pi / 5
    angle = jnp.abs(jnp.mod(jnp.arctan2(y, x), step) - step / 2)
    radius = jnp.hypot(x, y)
    along, across = radius * jnp.cos(angle), radius * jnp.sin(angle)
    inner = 0.42 * np.array([np.cos(step / 2), np.sin(step / 2)])
    normal = np.array([inner[1], 1 - inner[0]]) / np.hypot(inner[1], 1 - inner[0])
    return float(normal[0]) * (along - 1) + float(normal[1]) * across


def _cross(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95))


def _ell(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.minimum(_box(x + 0.4, y, 0.28, 0.85), _box(x - 0.05, y + 0.57, 0.73, 0.28))


def _tee(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.minimum(_box(x, y, 0.28, 0.85), _box(x, y - 0.57, 0.8, 0.28))


def _bars(x: jax.Array, y: jax.Array) -> jax.Array:
    return _box(x, jnp.abs(y) - 0.5, 0.8, 0.24)


#: Signed distances, about in units of the shape's radius: `(x, y) -> distance`, elementwise.
SHAPES = (_disk, _ring, _half_disk, _crescent, _triangle, _square, _pentagon, _star, _cross, _ell, _tee, _bars)
#: Names of the classes; a label is a place in this tuple.
CLASSES: tuple[str, ...] = tuple(shape.__name__.strip("_") for shape in SHAPES)


# Pictures


def rotated(x: jax.Array, y: jax.Array, angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coordinates of the points (x, y) along axes turned by `angle`, in radians."""
    return x * jnp.cos(angle) + y * jnp.sin(angle), y * jnp.cos(angle) - x * jnp.sin(angle)


class Draw:
    """Uniform numbers of one image, each used once: `draw(low, high)` is `float32[]`, `many` a vector of them."""

    def __init__(self, key: jax.Array) -> None:
        self._numbers: Iterator[jax.Array] = iter(jax.random.uniform(key, (_NUMBERS,)))

    def __call__(self, low: float, high: float) -> jax.Array:
        return low + (high - low) * next(self._numbers)

    def many(self, count: int, low: float, high: float) -> jax.Array:
        return jnp.stack([self(low, high) for _ in range(count)])


def texture(draw: Draw, x: jax.Array, y: jax.Array) -> jax.Array:
    """A pattern in [-1, 1]: nothing, stripes, dots or checks, at any angle, 2 to 6 periods across the image."""
    across, along = rotated(x, y, draw(0, np.pi))
    pitch = draw(2 * np.pi, 6 * np.pi)
    a, b = jnp.sin(pitch * across + draw(0, 2 * np.pi)), jnp.sin(pitch * along + draw(0, 2 * np.pi))
    kinds = [jnp.zeros_like(a), a, a * b, jnp.tanh(8 * a * b)]
    kind = draw(0, len(kinds))
    return jnp.select([kind < k for k in range(1, len(kinds))], kinds[:-1], kinds[-1])


def _image(key: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """One image `float32[size, size, 3]` and its label `int32[]`."""
    label_key, factor_key, noise_key = jax.random.split(key, 3)
    label = jax.random.randint(label_key, (), 0, len(CLASSES), jnp.int32)
    draw = Draw(factor_key)
    centres = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2 / size) - 1
    y, x = jnp.meshgrid(centres, centres, indexing="ij")

    # Where the shape is. Distances in its frame times its radius are about distances in the image.
    radius, stretch = draw(0.5, 0.85), draw(0.87, 1.15)
    u, v = rotated(x - draw(-0.25, 0.25), y - draw(-0.25, 0.25), draw(-0.6, 0.6))
    u, v = u * stretch / radius, v / (radius * stretch)
    distance = jnp.select([label == k for k in range(len(SHAPES))], [shape(u, v) for shape in SHAPES]) * radius
    blur = draw(0.5, 1.5) * 2 / size
    inside = jax.nn.sigmoid(-distance * 2 / blur)[..., None]

    # Colours: two at some contrast around a common middle, each with a second one for its texture.
    middle, direction = draw.many(3, 0.3, 0.7), draw.many(3, -1, 1)
    direction = direction / jnp.sqrt(jnp.sum(direction**2) + 1e-6)
    contrast = draw(0.2, 0.45)
    shape_tint, ground_tint = draw.many(3, -0.12, 0.12), draw.many(3, -0.12, 0.12)
    shape = middle + direction * contrast + texture(draw, x, y)[..., None] * shape_tint
    ground = middle - direction * contrast + texture(draw, x, y)[..., None] * ground_tint
    picture = ground + (shape - ground) * inside

    # Light falls off in some direction, a bar of its own colour covers a part, and the sensor is noisy.
    toward, _ = rotated(x, y, draw(0, 2 * np.pi))
    picture = picture * (1 + draw(0, 0.35) * toward)[..., None]
    across, _ = rotated(x, y, draw(0, np.pi))
    covered = jnp.abs(across - draw(-0.8, 0.8)) < draw(-0.1, 0.12)
    picture = jnp.where(covered[..., None], draw.many(3, 0, 1), picture)
    picture = picture + draw(0.01, 0.08) * jax.random.normal(noise_key, picture.shape)
    return jnp.clip(picture, 0, 1), label


@functools.partial(jax.jit, static_argnums=(0, 3))
def _block(draw_one: DrawOne, stream_key: jax.Array, first: jax.Array, size: int) -> tuple[jax.Array, ...]:
    """Images `first` to `first + BLOCK - 1` of a stream."""
    keys = jax.vmap(lambda k: jax.random.fold_in(stream_key, k))(first + jnp.arange(BLOCK, dtype=jnp.uint32))
    return jax.vmap(lambda key: draw_one(key, size))(keys)


def drawn(
    draw_one: DrawOne, stream: Stream, start: int, count: int, *, seed: int = 0, size: int = 32
) -> tuple[np.ndarray, ...]:
    """What `draw_one(key, size)` gives for the images `start` to `start + count - 1` of a stream, stacked.

    Args:
      draw_one: traceable, and the same object at every call, since it is compiled once.
      stream: "train", "calibration" or "test". Streams draw from different keys, so no image of one is in another.
      start: the first index; indices go up to 2**32 - 1.
      count: how many.
      seed: other seeds give other images in every stream.
      size: height and width in pixels.

    Raises:
      ValueError: no such stream, a negative index, or one beyond 2**32 - 1.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    if start < 0 or count < 0 or start + count > 2**32:
        raise ValueError(f"images {start} to {start + count} are not within 0 to 2**32")
    key = jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))
    wholes = [np.empty((count, *one.shape), one.dtype) for one in jax.eval_shape(lambda k: draw_one(k, size), key)]
    for first in range(start - start % BLOCK, start + count, BLOCK):
        low, high = max(first, start), min(first + BLOCK, start + count)
        for whole, part in zip(wholes, _block(draw_one, key, jnp.uint32(first), size), strict=True):
            whole[low - start : high - start] = np.asarray(part)[low - first : high - first]
    return tuple(wholes)


def examples(stream: Stream, start: int, count: int, *, seed: int = 0, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Images `start` to `start + count - 1` of a stream.

    Args:
      stream, start, count, seed, size: as `drawn` takes them; memory is 12 * size**2 bytes an image.

    Returns:
      `(images, labels)`: `float32[count, size, size, 3]` in [0, 1] and `int32[count]`, places in `CLASSES`.

    Raises:
      ValueError: as `drawn`.
    """
    images, labels = drawn(_image, stream, start, count, seed=seed, size=size)
    return images, labels
