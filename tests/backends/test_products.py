"""Every form of a conv, a dot and a window sum against plain NumPy in int64, on full-range codes."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qcompiler as qc
from qcompiler.backends.lax_int import depthwise, products, windows
from qcompiler.ir import _compat

CONV = "conv_general_dilated"
LAYOUTS = {
    "NHWC": ("NHWC", "HWIO", "NHWC"),
    "NCHW": ("NCHW", "OIHW", "NCHW"),
    "NHWC-NCHW": ("NHWC", "OHWI", "NCHW"),
    "NCHW-NHWC": ("NCHW", "HWIO", "NHWC"),
    "NWC": ("NWC", "WIO", "NWC"),
    "NCW": ("NCW", "OIW", "NCW"),
    "NDHWC": ("NDHWC", "DHWIO", "NDHWC"),
    "NCDHW": ("NCDHW", "OIDHW", "NCDHW"),
    "NC": ("NC", "IO", "NC"),
}


def codes(*shape, seed=0):
    """Full-range int8, both ends among them."""
    x = np.random.default_rng([seed, *shape]).integers(-128, 128, shape, dtype=np.int8)
    x.reshape(-1)[:2] = (-128, 127)[: x.size]
    return x


def dilated(x, holes):
    """x with holes - 1 zeros between its elements, along spatial dimensions from 1 on."""
    for d, hole in enumerate(holes, 1):
        shape = list(x.shape)
        shape[d] = max(0, (shape[d] - 1) * hole + 1)
        wide = np.zeros(shape, x.dtype)
        wide[(slice(None),) * d + (slice(None, None, hole),)] = x
        x = wide
    return x


def padded(x, padding):
    for d, (low, high) in enumerate(padding, 1):
        widths = [(0, 0)] * x.ndim
        widths[d] = max(low, 0), max(high, 0)
        x = np.pad(x, widths)
        x = x[(slice(None),) * d + (slice(max(-low, 0), x.shape[d] - max(-high, 0)),)]
    return x


def conv_reference(image, kernel, strides, padding, holes, spread, groups):
    """[N, *S, C] and [*K, C / groups, O], int64 in and out, one product per element of the kernel and group."""
    image = padded(dilated(image, holes), padding)
    window, (depth, features) = kernel.shape[:-2], kernel.shape[-2:]
    counts = [
        (n - (k - 1) * r - 1) // s + 1 for n, k, s, r in zip(image.shape[1:-1], window, strides, spread, strict=True)
    ]
    out = np.zeros((image.shape[0], *counts, features), np.int64)
    for offset in itertools.product(*map(range, window)):
        cut = tuple(
            slice(k * r, k * r + (n - 1) * s + 1, s) for k, r, n, s in zip(offset, spread, counts, strides, strict=True)
        )
        seen = image[(slice(None), *cut)]
        for g in range(groups):
            mine = slice(g * (features // groups), (g + 1) * (features // groups))
            out[..., mine] += seen[..., g * depth : (g + 1) * depth] @ kernel[offset][:, mine]
    return out


def equations(fun, *args):
    """The equations of a traced function; none computes on floats."""
    eqns = _compat.open_jaxpr(jax.make_jaxpr(fun)(*args)).eqns
    assert not [v for e in eqns for v in e.outvars if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    return eqns


def census(eqns):
    """Name of a primitive -> how many there are; 0 for those that are not."""
    return collections.Counter(e.primitive.name for e in eqns)


def check_conv(
    size, channels, kernel, features, *, layout="NHWC", batch=1, strides=None, padding="SAME", holes=None, spread=None,
    groups=1, known=True,
):  # fmt: skip
    """Compares, under jit, and returns the census."""
    rank = len(size)
    strides, holes, spread = (x or (1,) * rank for x in (strides, holes, spread))
    if isinstance(padding, str):
        wide = [(n - 1) * h + 1 for n, h in zip(size, holes, strict=True)]
        reach = [(k - 1) * r + 1 for k, r in zip(kernel, spread, strict=True)]
        padding = lax.padtype_to_pads(wide, reach, strides, padding)
    image = codes(batch, *size, channels)
    weights = codes(*kernel, channels // groups, features, seed=1)
    expected = conv_reference(image.astype(np.int64), weights.astype(np.int64), strides, padding, holes, spread, groups)
    names = LAYOUTS[layout]
    lhs, rhs, out = (tuple(n) for n in names)
    spatial = names[0].replace("N", "").replace("C", "")
    image = image.transpose([("N", *spatial, "C").index(d) for d in lhs])
    weights = weights.transpose([(*spatial, "I", "O").index(d) for d in rhs])
    expected = expected.transpose([("N", *spatial, "C").index(d) for d in out])
    params = {
        "window_strides": tuple(strides), "padding": tuple(map(tuple, padding)), "lhs_dilation": tuple(holes),
        "rhs_dilation": tuple(spread), "feature_group_count": groups, "batch_group_count": 1,
        "dimension_numbers": lax.conv_dimension_numbers(image.shape, weights.shape, names),
    }  # fmt: skip
    fun = lambda x, w: products.conv(x, w, params, weights if known else None)
    got = jax.jit(fun)(image, weights)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got), expected)
    eqns = equations(fun, image, weights)
    # Convs of int8 with groups are wrong on CUDA; on the CPU all but 2-D NHWC without dilation of the image are slow.
    for eqn in eqns:
        if eqn.primitive.name == CONV:
            assert eqn.params["feature_group_count"] == 1 and eqn.params["lhs_dilation"] == (1, 1)
            assert eqn.params["dimension_numbers"].lhs_spec == (0, 3, 1, 2)
            assert max(eqn.invars[1].aval.shape[2:]) > 16
    return census(eqns)


@pytest.mark.parametrize("known, multiplier", [(True, 1), (False, 1), (True, 3)])
@pytest.mark.parametrize(
    "options",
    [
        {"size": (7, 6), "kernel": (3, 3)},
        {"size": (7, 6), "kernel": (3, 3), "strides": (2, 2), "batch": 2},
        {"size": (7, 6), "kernel": (5, 2), "strides": (1, 3), "padding": ((0, 3), (2, 0))},
        {"size": (9, 9), "kernel": (3, 3), "spread": (2, 3), "padding": "VALID"},
        {"size": (9, 8), "kernel": (3, 3), "padding": ((-1, 2), (1, -2))},
        {"size": (2, 2), "kernel": (5, 5)},
        {"size": (1, 1), "kernel": (3, 3), "strides": (2, 2)},
        {"size": (6, 5), "kernel": (1, 1)},
        {"size": (5, 4), "kernel": (3, 3), "layout": "NCHW", "strides": (2, 1)},
        {"size": (5, 4), "kernel": (3, 3), "layout": "NHWC-NCHW"},
        {"size": (9,), "kernel": (4,), "layout": "NWC", "strides": (2,)},
        {"size": (9,), "kernel": (4,), "layout": "NCW", "padding": ((3, 0),)},
        {"size": (4, 5, 3), "kernel": (2, 3, 3), "layout": "NDHWC"},
        {"size": (4, 3), "kernel": (4, 3), "holes": (2, 2), "padding": ((2, 2), (1, 1))},
        {"size": (4, 3), "kernel": (3, 2), "holes": (3, 2), "strides": (2, 4), "layout": "NCHW"},
    ],
    ids=str,
)
def test_depthwise(options, known, multiplier):
    counts = check_conv(**{"channels": 6, "features": 6 * multiplier, "groups": 6, "known": known} | options)
    assert not counts[CONV] and not counts["dot_general"]


def test_depthwise_of_one_channel():
    assert not check_conv((6, 5), 1, (3, 3), 1)[CONV]


def test_depthwise_with_a_large_kernel():
    counts = check_conv((12, 12), 3, (13, 13), 3, groups=3)
    assert not counts[CONV] and counts["mul"] == 169


def test_products_of_a_depthwise_conv_share_int16_where_the_kernel_proves_it():
    small = np.full((9, 4), 28, np.int8)  # 9 * 28 * 128 = 32,256
    assert depthwise.int16_groups(9, small) == [list(range(9))]
    assert depthwise.int16_groups(9, None) == [[k] for k in range(9)]
    assert depthwise.int16_groups(3, np.full((3, 1), -128, np.int8)) == [[0], [1], [2]]  # 2 * 128 * 128 = 2**15
    assert depthwise.int16_groups(3, np.full((3, 1), 127, np.int8)) == [[0, 1], [2]]
    # 128 + 128 of both signs: 128 * 128 + 128 * 127 is the most.
    assert depthwise.int16_groups(2, np.int8([[127], [-128]])) == [[0, 1]]
    held = codes(9, 6)
    groups = depthwise.int16_groups(9, held)
    assert sorted(k for g in groups for k in g) == list(range(9))
    for group in groups:
        for sign in (1, -1):  # each weight meets the code that is worst for it
            worst = np.where(sign * held[group].astype(np.int64) > 0, 127, -128)
            sums = (worst * held[group].astype(np.int64)).sum(0)
            assert np.all((sums >= -(2**15)) & (sums < 2**15))


@pytest.mark.parametrize("fill", [-128, 127])
@pytest.mark.parametrize("weight", [-128, -127, 127, 85, -86, 28])
def test_depthwise_at_the_ends_of_int16(fill, weight):
    image, kernel = np.full((1, 4, 4, 2), fill, np.int8), np.full((3, 3, 2), weight, np.int8)
    got = depthwise.conv(jnp.asarray(image), jnp.asarray(kernel), (1, 2), 3, (1, 1), (1, 1), kernel)
    assert np.all(np.asarray(got) == 9 * fill * weight)


@pytest.mark.parametrize(
    "convs, options",
    [
        (1, {"channels": 8, "features": 12, "groups": 2}),
        (1, {"channels": 8, "features": 12, "groups": 4, "strides": (2, 2), "batch": 2}),
        (1, {"channels": 40, "features": 20, "groups": 4, "padding": ((1, 0), (0, 2))}),
        (5, {"channels": 264, "features": 132, "groups": 33, "size": (4, 3)}),
        (2, {"channels": 160, "features": 32, "groups": 2, "size": (4, 3)}),
        (1, {"channels": 9, "features": 6, "groups": 3, "layout": "NCHW", "spread": (2, 1)}),
        (1, {"channels": 6, "features": 4, "groups": 2, "size": (8,), "kernel": (3,), "layout": "NWC"}),
        (1, {"channels": 6, "features": 4, "groups": 2, "size": (3, 4, 4), "kernel": (2, 3, 3), "layout": "NDHWC"}),
        (6, {"channels": 8, "features": 12, "groups": 4, "holes": (2, 3), "strides": (1, 2)}),
        (1, {"channels": 48, "features": 48, "groups": 3, "kernel": (1, 1)}),
    ],
    ids=str,
)
def test_grouped(convs, options):
    """Neighbouring groups share a conv, up to 640 products per output; a dilated image has one per phase."""
    counts = check_conv(**{"size": (7, 6), "kernel": (3, 3)} | options)
    assert counts[CONV] + counts["dot_general"] == convs


@pytest.mark.parametrize("channels, features", [(3, 20), (8, 16), (16, 4), (20, 20)])
@pytest.mark.parametrize(
    "options",
    [
        {"size": (7, 6), "kernel": (3, 3)},
        {"size": (7, 6), "kernel": (1, 1)},
        {"size": (7, 6), "kernel": (1, 1), "strides": (2, 3), "padding": ((1, 0), (0, -1)), "batch": 2},
        {"size": (9, 10), "kernel": (3, 3), "strides": (2, 2)},
        {"size": (11, 12), "kernel": (7, 7), "strides": (2, 2), "padding": ((3, 3), (3, 2))},
        {"size": (11, 12), "kernel": (4, 3), "strides": (3, 2), "padding": "VALID"},
        {"size": (8, 9), "kernel": (5, 1)},
        {"size": (8, 9), "kernel": (1, 7), "strides": (1, 2)},
        {"size": (9, 9), "kernel": (3, 3), "spread": (3, 2), "batch": 2},
        {"size": (2, 2), "kernel": (3, 3)},
        {"size": (2, 1), "kernel": (5, 4), "padding": ((4, 4), (3, 3))},
        {"size": (3, 3), "kernel": (3, 3), "padding": ((5, 4), (0, 6))},
        {"size": (6, 6), "kernel": (3, 3), "padding": ((-2, 1), (1, -1))},
    ],
    ids=str,
)
def test_dense(options, channels, features):
    counts = check_conv(channels=channels, features=features, **options)
    assert counts[CONV] + counts["dot_general"] == 1


@pytest.mark.parametrize("channels, features", [(1, 20), (2, 3), (3, 32), (12, 12), (16, 16), (20, 1), (40, 3)])
@pytest.mark.parametrize("size, kernel, strides", [((7, 6), (5, 5), (1, 1)), ((11, 12), (7, 7), (2, 2))])
def test_dense_of_few_channels(size, kernel, strides, channels, features):
    counts = check_conv(size, channels, kernel, features, strides=strides)
    assert counts[CONV] + counts["dot_general"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "NCHW", "strides": (2, 1)},
        {"layout": "NHWC-NCHW", "padding": ((0, 2), (3, 1))},
        {"layout": "NCHW-NHWC", "kernel": (1, 1)},
        {"layout": "NWC", "size": (9,), "kernel": (3,), "strides": (2,)},
        {"layout": "NCW", "size": (9,), "kernel": (4,), "padding": ((3, 0),), "spread": (2,)},
        {"layout": "NDHWC", "size": (4, 5, 3), "kernel": (3, 3, 3)},
        {"layout": "NDHWC", "size": (5, 4, 4), "kernel": (2, 3, 1), "strides": (2, 1, 3), "spread": (2, 1, 1)},
        {"layout": "NCDHW", "size": (3, 4, 4), "kernel": (3, 3, 3), "padding": ((2, 0), (0, 1), (-1, 1)), "batch": 2},
        {"layout": "NC", "size": (), "kernel": (), "padding": ()},
    ],
    ids=str,
)
@pytest.mark.parametrize("channels, features", [(3, 20), (20, 5)])
def test_layouts_and_ranks(options, channels, features):
    counts = check_conv(**{"size": (7, 6), "kernel": (3, 3), "channels": channels, "features": features} | options)
    assert counts[CONV] + counts["dot_general"] == 1


@pytest.mark.parametrize("channels, features", [(3, 2), (20, 20)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": (2, 2), "holes": (2, 2), "padding": ((1, 1), (1, 1))},
        {"kernel": (4, 4), "holes": (2, 2), "padding": ((2, 2), (2, 2)), "batch": 2},
        {"kernel": (3, 3), "holes": (2, 2), "padding": ((1, 2), (1, 2))},
        {"kernel": (3, 3), "holes": (2, 2), "padding": ((2, 2), (2, 2))},
        {"kernel": (5, 2), "holes": (3, 4), "padding": ((4, 2), (0, 3))},
        {"kernel": (2, 2), "holes": (3, 3), "padding": ((1, 1), (1, 1))},
        {"kernel": (1, 1), "holes": (2, 3), "padding": ((0, 0), (1, 2))},
        {"kernel": (3, 3), "holes": (2, 2), "padding": ((-1, 1), (2, -2))},
        {"kernel": (3, 3), "holes": (2, 3), "strides": (3, 2), "padding": ((2, 3), (2, 2))},
        {"kernel": (3, 3), "holes": (4, 2), "strides": (2, 4), "padding": ((2, 3), (4, 4))},
        {"kernel": (3, 4), "holes": (2, 4), "spread": (2, 2), "padding": ((2, 3), (3, 2))},
        {"kernel": (3, 3), "holes": (4, 3), "spread": (3, 2), "strides": (3, 1), "padding": ((6, 3), (3, 2))},
        {"kernel": (3, 3), "holes": (2, 1), "padding": ((2, 2), (1, 1)), "layout": "NCHW"},
        {"kernel": (8, 8), "holes": (4, 4), "padding": ((6, 6), (6, 6))},
        {"kernel": (3,), "size": (5,), "holes": (2,), "padding": ((1, 2),), "layout": "NWC"},
        {"kernel": (2, 3, 2), "size": (2, 3, 3), "holes": (2, 2, 2), "padding": ((1, 1),) * 3, "layout": "NDHWC"},
        {"kernel": (2, 2), "holes": (5, 5), "padding": ((-1, -1), (-1, -1)), "size": (2, 2)},
    ],
    ids=str,
)
def test_transposed(options, channels, features):
    options = {"size": (4, 5)} | options
    counts = check_conv(channels=channels, features=features, **options)
    assert counts[CONV] + counts["dot_general"] <= int(np.prod(options["holes"]))


def test_a_transposed_conv_whose_phases_read_the_same_pixels_is_one_dot():
    counts = check_conv((4, 5), 20, (2, 2), 20, holes=(2, 2), padding=((1, 1), (1, 1)))
    assert counts["dot_general"] == 1 and not counts[CONV]


def test_a_conv_that_nothing_reaches_and_one_without_results():
    check_conv((4, 5), 3, (2, 2), 4, holes=(9, 9), padding=((-2, -2), (-2, -2)))
    check_conv((2, 2), 3, (3, 3), 4, padding="VALID")
    check_conv((2, 2), 6, (3, 3), 6, padding="VALID", groups=6)
    check_conv((4, 4), 3, (3, 3), 4, batch=0)


@pytest.mark.parametrize("m, k, n", [(1, 7, 5), (4, 7, 1), (1, 7, 1), (1, 1, 1), (4, 7, 5)])
def test_dot(m, k, n):
    x, w = codes(m, k), codes(k, n, seed=1)
    numbers = (((1,), (0,)), ((), ()))
    fun = lambda x, w: products.dot(x, w, numbers)
    np.testing.assert_array_equal(np.asarray(jax.jit(fun)(x, w)), x.astype(np.int64) @ w.astype(np.int64))
    (eqn,) = [e for e in equations(fun, x, w) if e.primitive.name == "dot_general"]
    assert min(eqn.outvars[0].aval.shape) >= 2


def test_dot_in_batches():
    x, w = codes(3, 1, 2, 7), codes(7, 3, 1, seed=1)
    fun = lambda x, w: products.dot(x, w, (((3,), (0,)), ((0,), (1,))))
    expected = np.einsum("bijk,kbn->bijn", x.astype(np.int64), w.astype(np.int64))
    np.testing.assert_array_equal(np.asarray(jax.jit(fun)(x, w)), expected)
    # An operand that is contracted whole has no row to double.
    fun = lambda x, w: products.dot(x, w, (((0, 1), (0, 1)), ((), ())))
    x = codes(3, 4)
    assert jax.jit(fun)(x, x) == (x.astype(np.int64) ** 2).sum()


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
@pytest.mark.parametrize(
    "options",
    [
        {"window": (1, 2, 2, 1), "strides": (1, 2, 2, 1)},
        {"window": (1, 3, 3, 1), "padding": ((0, 0), (1, 1), (0, 2), (0, 0)), "strides": (1, 2, 1, 1)},
        {"window": (1, 7, 7, 1)},
        {"window": (1, 7, 6, 1), "padding": ((0, 0), (3, 3), (2, 3), (0, 0))},
        {"window": (1, 9, 11, 1), "padding": ((0, 0), (5, 5), (6, 9), (0, 0)), "strides": (1, 2, 3, 1)},
        {"window": (1, 10, 8, 1), "padding": ((0, 0), (15, 15), (9, 9), (0, 0)), "spread": (1, 2, 2, 1)},
        {"window": (1, 3, 2, 1), "padding": ((0, 0), (-1, 1), (2, -1), (0, 0)), "holes": (1, 2, 3, 1)},
        {"window": (2, 1, 1, 3), "strides": (1, 3, 1, 2)},
        {"window": (1, 1, 1, 1)},
        {"window": (1, 40, 1, 1), "padding": ((0, 0), (40, 40), (0, 0), (0, 0)), "strides": (1, 40, 1, 1)},
        {"window": (1, 8, 1, 1)},
    ],
    ids=str,
)
def test_window_sum(options, dtype):
    x = codes(2, 7, 6, 5).astype(dtype) * (dtype(1) if dtype == np.int8 else dtype(10_000))
    ones = (1,) * x.ndim
    strides, holes, spread = (options.get(k, ones) for k in ("strides", "holes", "spread"))
    padding = options.get("padding", ((0, 0),) * x.ndim)
    fun = lambda x: windows.window_sum(x, options["window"], strides, padding, holes, spread)
    got = jax.jit(fun)(x)
    wide = padded(dilated(x.astype(np.int64)[None, ..., None], holes), padding)[0, ..., 0]
    reference = np.ones((*options["window"], 1, 1), np.int64)
    expected = conv_reference(wide[None, ..., None], reference, strides, ((0, 0),) * 4, ones, spread, 1)[0, ..., 0]
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got), expected)
    assert not [e for e in equations(fun, x) if e.primitive.name.startswith("reduce_window")]


def test_a_wide_window_takes_few_additions():
    fun = lambda x: windows.window_sum(x, (1, 100, 1), (1, 1, 1), ((0, 0), (99, 0), (0, 0)))
    assert census(equations(fun, np.zeros((1, 200, 8), np.int32)))["add"] <= 2 * 7


def test_average_pooling_is_lowered_so():
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    pool = lambda x: (
        lax.reduce_window(x, np.float32(0), lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME") * np.float32(1 / 9)
    )
    qmodel = qc.quantize(pool, [x], strict=True)
    assert not [e for e in qmodel.program.eqns if e.primitive.name.startswith("reduce_window")]
