"""A small one-stage detector as an nnx module: YOLO's parts (Redmon et al. 2016, arXiv:1506.02640; Jocher's YOLOv5).

Convolutions with SiLU shrink the image to two maps, of strides 8 and 16; the coarse one, upsampled, is joined to the
fine one. A cell of a map predicts one box around its own place, without anchors, as in YOLOX (Ge et al. 2021,
arXiv:2107.08430): offset of the centre, logarithm of the size, objectness, classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qcompiler.models.layers import conv, norm

#: Pixels of a cell of each map.
STRIDES = (8, 16)
#: An object belongs to the coarse map if its longer side has more pixels than this many cells of the fine one.
COARSE_FROM = 2
#: A predicted size is at most e^4 cells, so that no logit overflows.
_LARGEST_LOG = 4.0


class ConvSiLU(nnx.Module):
    """Convolution, BatchNorm, SiLU: `float[n, h, w, channels_in]` to `float[n, h/stride, w/stride, channels]`."""

    def __init__(self, channels_in: int, channels: int, kernel: int = 3, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv = conv(channels_in, channels, kernel, stride, rngs=rngs)
        self.norm = norm(channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(self.norm(self.conv(x)))


class CrossStage(nnx.Module):
    """Two 1x1 ways, one of them with a residual 3x3 block, joined (Wang et al. 2019, arXiv:1911.11929).

    Maps `float[n, h, w, channels_in]` to `float[n, h, w, channels]`.
    """

    def __init__(self, channels_in: int, channels: int, *, rngs: nnx.Rngs):
        half = channels // 2
        self.deep = ConvSiLU(channels_in, half, 1, rngs=rngs)
        self.direct = ConvSiLU(channels_in, half, 1, rngs=rngs)
        self.inner = nnx.List([ConvSiLU(half, half, rngs=rngs) for _ in range(2)])
        self.join = ConvSiLU(2 * half, channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.deep(x)
        y = y + self.inner[1](self.inner[0](y))
        return self.join(jnp.concatenate([y, self.direct(x)], axis=-1))


class Detector(nnx.Module):
    """The detector.

    Args:
      classes: kinds of objects.
      width: channels at half the image's size; they double with every halving.
      channels: channels of the input images.
      rngs: where the weights' randomness comes from.

    Calling it maps images `float32[n, height, width, channels]`, of multiples of 16 pixels, to predictions
    `float32[n, cells, 5 + classes]`: corners x1, y1, x2, y2 in pixels, objectness and class probabilities, 0 to 1.
    """

    def __init__(self, classes: int, width: int = 16, *, channels: int = 3, rngs: nnx.Rngs):
        self.classes = classes
        self.stem = ConvSiLU(channels, width, 3, 2, rngs=rngs)
        self.down = nnx.List([ConvSiLU(width * 2**i, width * 2 ** (i + 1), 3, 2, rngs=rngs) for i in range(3)])
        self.stages = nnx.List([CrossStage(width * 2 ** (i + 1), width * 2 ** (i + 1), rngs=rngs) for i in range(3)])
        self.lateral = ConvSiLU(8 * width, 4 * width, 1, rngs=rngs)
        self.fuse = CrossStage(8 * width, 4 * width, rngs=rngs)
        self.heads = nnx.List([nnx.Conv(w * width, 5 + classes, (1, 1), rngs=rngs) for w in (4, 8)])
        # Nearly all cells are empty, which the heads say from the start (Lin et al. 2017, arXiv:1708.02002).
        for head in self.heads:
            head.bias[...] = head.bias[...].at[4].set(-4.0)

    def raw(self, x: jax.Array) -> jax.Array:
        """Predictions before they are decoded, `float32[n, cells, 5 + classes]`: fine map first, rows first."""
        x = self.stem(x)
        maps = []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        fine, coarse = maps[1], maps[2]
        upper = self.lateral(coarse)
        n, h, w, c = upper.shape
        upper = jax.image.resize(upper, (n, 2 * h, 2 * w, c), "nearest")
        fine = self.fuse(jnp.concatenate([upper, fine], axis=-1))
        outputs = [head(y) for head, y in zip(self.heads, (fine, coarse), strict=True)]
        return jnp.concatenate([y.reshape(n, -1, 5 + self.classes) for y in outputs], axis=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        raw = self.raw(x)
        boxes = decode(raw[..., :4], x.shape[1], x.shape[2])
        return jnp.concatenate([boxes, jax.nn.sigmoid(raw[..., 4:])], axis=-1)


def cells(height: int, width: int) -> np.ndarray:
    """Centre x, centre y and stride of every cell in pixels, `float32[cells, 3]`, in the order of `Detector.raw`.

    Raises:
      ValueError: a size is no multiple of the largest stride.
    """
    if height % STRIDES[-1] or width % STRIDES[-1]:
        raise ValueError(f"height and width must be multiples of {STRIDES[-1]}, got {height}x{width}")
    parts = []
    for stride in STRIDES:
        y, x = np.mgrid[: height // stride, : width // stride]
        centres = (np.stack([x, y], axis=-1).reshape(-1, 2) + 0.5) * stride
        parts.append(np.concatenate([centres, np.full((len(centres), 1), stride)], axis=-1))
    return np.concatenate(parts).astype(np.float32)


def decode(raw: jax.Array, height: int, width: int) -> jax.Array:
    """Corners in pixels from offsets and log sizes in cells, `float[n, cells, 4]` both."""
    grid = cells(height, width)
    stride = grid[:, 2:]
    centre = grid[:, :2] + raw[..., :2] * stride
    half = jnp.exp(jnp.minimum(raw[..., 2:], _LARGEST_LOG)) * (stride / 2)
    return jnp.concatenate([centre - half, centre + half], axis=-1)


# Training


def assign(boxes: jax.Array, labels: jax.Array, height: int, width: int) -> jax.Array:
    """Which object each cell should predict: the map by the object's size, the cell by its centre.

    Args:
      boxes: `float32[n, objects, 4]`, corners in pixels.
      labels: `int32[n, objects]`, -1 where there is no object.
      height, width: of the images.

    Returns:
      `int32[n, cells]`, -1 for cells without an object; of two objects in a cell the smaller one has it.
    """
    grid = cells(height, width)
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    stride = jnp.where(jnp.max(size, axis=-1) > COARSE_FROM * STRIDES[0], float(STRIDES[1]), float(STRIDES[0]))
    offset, half = centre[:, None] - grid[:, None, :2], grid[:, None, 2:] / 2
    # Half-open cells: a centre on an edge belongs to one cell only.
    within = jnp.all((offset >= -half) & (offset < half), axis=-1)
    candidate = within & (stride[:, None] == grid[:, None, 2]) & (labels >= 0)[:, None]
    area = jnp.where(candidate, jnp.prod(size, axis=-1)[:, None], jnp.inf)
    return jnp.where(jnp.any(candidate, axis=-1), jnp.argmin(area, axis=-1).astype(jnp.int32), -1)


def loss(model: Detector, images: jax.Array, targets: tuple[jax.Array, jax.Array]) -> jax.Array:
    """What training minimizes: generalized IoU (Rezatofighi et al. 2019, arXiv:1902.09630) and cross-entropies.

    Args:
      model: the detector.
      images: `float32[n, height, width, 3]`.
      targets: boxes and labels as `assign` takes them.

    Returns:
      `float32[]`: the sum over cells, divided by the number of objects.
    """
    boxes, labels = targets
    raw = model.raw(images)
    height, width = images.shape[1:3]
    owner = assign(boxes, labels, height, width)
    full = (owner >= 0).astype(raw.dtype)
    rows = jnp.maximum(owner, 0)
    wanted = jnp.take_along_axis(boxes, rows[..., None], axis=1)
    kind = jnp.maximum(jnp.take_along_axis(labels, rows, axis=1), 0)
    overlap = _generalized_iou(decode(raw[..., :4], height, width), wanted)
    presence = optax.sigmoid_binary_cross_entropy(raw[..., 4], full)
    classes = optax.sigmoid_binary_cross_entropy(raw[..., 5:], jax.nn.one_hot(kind, model.classes)).sum(-1)
    total = jnp.sum(presence) + jnp.sum(full * (2 * (1 - overlap) + classes))
    return total / jnp.maximum(jnp.sum(full), 1)


def _generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """IoU of boxes `[..., 4]`, less the share of their hull that neither covers: -1 to 1."""
    area = lambda low, high: jnp.prod(jnp.maximum(high - low, 0), axis=-1)
    both = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    hull = area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    return both / (union + 1e-6) - (hull - union) / (hull + 1e-6)
