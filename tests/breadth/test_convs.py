"""Convolutions by `jax.lax` itself: 1-D to 3-D, strides, dilations, groups, layouts and paddings."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

LAYOUTS = {
    "NWC": ("NWC", "WIO", "NWC"),
    "NCW": ("NCW", "OIW", "NCW"),
    "NHWC": ("NHWC", "HWIO", "NHWC"),
    "NCHW": ("NCHW", "OIHW", "NCHW"),
    "NDHWC": ("NDHWC", "DHWIO", "NDHWC"),
    "NCDHW": ("NCDHW", "OIDHW", "NCDHW"),
}
#: layout -> input shape after the batch, with 4 channels, and kernel shape from 4 to 6 channels.
SHAPES = {
    "NWC": ((9, 4), (3, 4, 6)),
    "NCW": ((4, 9), (6, 4, 3)),
    "NHWC": ((6, 7, 4), (3, 3, 4, 6)),
    "NCHW": ((4, 6, 7), (6, 4, 3, 3)),
    "NDHWC": ((4, 5, 3, 4), (2, 3, 3, 4, 6)),
    "NCDHW": ((4, 4, 5, 3), (6, 4, 2, 3, 3)),
}


def weight(*shape):
    return np.random.default_rng([5, *shape]).normal(size=shape).astype(np.float32)


def conv(layout, kernel, strides=1, padding="SAME", act=lambda y: y, bias=True, **options):
    """`fun(weights, x)` and its weights."""
    rank = len(layout) - 2
    channels = kernel[LAYOUTS[layout][1].index("O")]
    at = layout.index("C")

    def fun(w, x):
        stride = (strides,) * rank if isinstance(strides, int) else strides
        y = lax.conv_general_dilated(x, w["w"], stride, padding, dimension_numbers=LAYOUTS[layout], **options)
        if bias:
            y = y + w["b"].reshape([-1 if k == at else 1 for k in range(rank + 2)])
        return act(y)

    return fun, {"w": weight(*kernel), "b": weight(channels)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_layouts(compiled, layout, strides, padding):
    shape, kernel = SHAPES[layout]
    fun, params = conv(layout, kernel, strides, padding)
    assert compiled(fun, shape, params=params).kinds() == ["conv"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_asymmetric_padding_with_a_zero_point(compiled, layout):
    """Every dimension padded differently on both sides; only the zero point's code gives the right borders."""
    shape, kernel = SHAPES[layout]
    padding = [(1, 2), (0, 3), (2, 0)][: len(shape) - 1]
    fun, params = conv(layout, kernel, 1, padding)
    compiled(fun, shape, params=params, data="positive")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strides", [1, 2])
def test_depthwise(compiled, layout, strides):
    shape, kernel = SHAPES[layout]
    kernel = tuple({"O": 4, "I": 1}.get(c, n) for c, n in zip(LAYOUTS[layout][1], kernel, strict=True))
    fun, params = conv(layout, kernel, strides, feature_group_count=4)
    compiled(fun, shape, params=params, data="positive")


@pytest.mark.parametrize("layout", ["NWC", "NHWC", "NCHW", "NDHWC"])
@pytest.mark.parametrize(("groups", "multiplier"), [(2, 3), (4, 2)])
def test_groups(compiled, layout, groups, multiplier):
    """Two groups of ordinary convolutions; depthwise with more results than channels."""
    shape, kernel = SHAPES[layout]
    sizes = {"O": groups * multiplier, "I": 4 // groups}
    kernel = tuple(sizes.get(c, n) for c, n in zip(LAYOUTS[layout][1], kernel, strict=True))
    fun, params = conv(layout, kernel, feature_group_count=groups)
    compiled(fun, shape, params=params)


@pytest.mark.parametrize("layout", ["NWC", "NHWC", "NCHW", "NDHWC"])
@pytest.mark.parametrize("groups", [1, 4])
def test_dilation(compiled, layout, groups):
    shape, kernel = SHAPES[layout]
    sizes = {"O": 4, "I": 4 // groups}
    kernel = tuple(sizes.get(c, n) for c, n in zip(LAYOUTS[layout][1], kernel, strict=True))
    dilation = (2, 3, 1)[: len(shape) - 1]
    fun, params = conv(layout, kernel, rhs_dilation=dilation, feature_group_count=groups)
    compiled(fun, shape, params=params, data="positive")


@pytest.mark.parametrize("layout", ["NWC", "NHWC", "NCHW", "NDHWC"])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed(compiled, layout, padding, transpose_kernel):
    shape, kernel = SHAPES[layout]
    rank = len(shape) - 1
    names = LAYOUTS[layout]
    if transpose_kernel:  # gradient of a convolution from 6 to 4 channels
        kernel = tuple({"O": 4, "I": 6}.get(c, n) for c, n in zip(names[1], kernel, strict=True))

    def fun(w, x):
        return lax.conv_transpose(
            x, w, (2,) * rank, padding, dimension_numbers=names, transpose_kernel=transpose_kernel
        )

    compiled(fun, shape, params=weight(*kernel), data="positive")


@pytest.mark.parametrize("padding", [((2, 1), (0, 3)), ((0, 0), (1, 1))])
def test_transposed_with_explicit_padding(compiled, padding):
    fun = lambda w, x: lax.conv_transpose(x, w, (2, 3), padding, dimension_numbers=LAYOUTS["NHWC"])
    compiled(fun, (4, 3, 4), params=weight(3, 3, 4, 5), data="positive")


@pytest.mark.parametrize("layout", ["NWC", "NHWC", "NCHW", "NDHWC"])
@pytest.mark.parametrize("groups", [1, 4])
def test_kernel_larger_than_the_map(compiled, layout, groups):
    sizes = {"N": 1, "C": 4, "W": 3, "H": 2, "D": 2}
    shape = tuple(sizes[c] for c in layout[1:])
    kernel = tuple({"O": 4, "I": 4 // groups}.get(c, 5) for c in LAYOUTS[layout][1])
    fun, params = conv(layout, kernel, feature_group_count=groups)
    compiled(fun, shape, params=params, data="positive")


@pytest.mark.parametrize("channels_in", [1, 3])
@pytest.mark.parametrize("channels_out", [1, 2, 17])
def test_few_channels(compiled, channels_in, channels_out):
    fun, params = conv("NHWC", (3, 3, channels_in, channels_out), act=lambda y: jnp.maximum(y, 0))
    compiled(fun, (6, 7, channels_in), params=params)


@pytest.mark.parametrize("kernel", [(1, 1), (1, 3), (5, 1), (2, 2), (7, 7)])
def test_kernel_sizes(compiled, kernel):
    fun, params = conv("NHWC", (*kernel, 4, 6), strides=(1, 2))
    compiled(fun, (8, 7, 4), params=params)


def test_other_spellings_of_lax(compiled):
    """`lax.conv` is NCHW; `lax.conv_with_general_padding` has dilations by position; jnp.convolve is one channel."""

    def fun(w, x):
        y = lax.conv(x, w["a"], (1, 1), "SAME")
        return lax.conv_with_general_padding(y, w["b"], (1, 2), ((1, 1), (0, 2)), (1, 1), (2, 1))

    compiled(fun, (3, 6, 7), params={"a": weight(4, 3, 3, 3), "b": weight(5, 4, 2, 3)}, sqnr=28)


def test_numpy_convolution(compiled):
    """`vmap(jnp.convolve)` batches a convolution of one sample without channels, by a kernel it reverses."""
    import jax

    fun = lambda w, x: jax.vmap(lambda row: jnp.convolve(row, w, mode="same"))(x)
    compiled(fun, (32,), params=weight(5))


def test_vmapped_convolution_of_one_sample(compiled):
    import jax

    names = LAYOUTS["NHWC"]

    def one(w, x):
        return lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=names)[0]

    compiled(jax.vmap(one, in_axes=(None, 0)), (6, 5, 4), params=weight(3, 3, 4, 6))


def test_scaled_and_shifted_kernel(compiled):
    """What is computed from weights alone is done before any quantization."""
    fun, params = conv("NHWC", (3, 3, 4, 6))
    scaled = lambda w, x: fun({"w": jnp.tanh(w["w"]) * 2 - 1, "b": jnp.exp(w["b"])}, x)
    assert compiled(scaled, (6, 7, 4), params=params).kinds() == ["conv"]
