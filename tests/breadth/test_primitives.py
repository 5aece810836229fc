"""One small function per primitive of `docs/primitives.md`: no islands, bit-exact, near float on unseen data."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import qcompiler as qc
from qcompiler.debug import primitives
from qcompiler.ir import _compat, classes, tracing
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

ROOT = Path(__file__).resolve().parents[2]

ROWS = (5, 8)
IMAGE = (6, 6, 4)
RNG = np.random.default_rng(3)
SQUARE = (RNG.normal(size=(8, 8)) / np.sqrt(8)).astype(np.float32)
LAYERS = (RNG.normal(size=(10, 8, 8)) / np.sqrt(8)).astype(np.float32)
KERNEL = (RNG.normal(size=(3, 3, 4, 5)) / 6).astype(np.float32)
NHWC = ("NHWC", "HWIO", "NHWC")


def case(fun, *shapes, data="normal", sqnr=30.0):
    """A function, its inputs' shapes and kinds of data, and the least SQNR in dB."""
    return fun, shapes or (ROWS,), data, sqnr


def conv(x, kernel, **params):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, **params)


def windows(fun, start, **params):
    return lambda x: lax.reduce_window(x, np.float32(start), fun, (1, 3, 3, 1), (1, 1, 1, 1), "SAME", **params)


def choose(truth):
    """A comparison or logic, seen in what it selects."""
    return lambda x, y: jnp.where(truth(x, y), x, y)


def rows(x, i):
    """One row per sample, at a traced place."""
    return jnp.arange(x.shape[0]), i


def compared(op):
    return case(choose(op), ROWS, ROWS)


def at_places(method):
    """`x.at[...]` with one update per sample."""
    fun = lambda x, y, i: getattr(x.at[rows(x, i)], method)(y[:, 0])
    return case(fun, ROWS, ROWS, (), data=("normal", "normal", "places"))


UNARY = """abs ceil cos erf erfc exp exp2 expm1 floor log1p:probabilities logistic neg sign sin sqrt:positive
 square tanh asinh atan sinh cosh cbrt:positive log:positive rsqrt:positive erf_inv:probabilities asin:probabilities
 acos:probabilities atanh:probabilities acosh:large digamma:positive lgamma:positive tan:probabilities
 stop_gradient""".split()


def unary(name, data="normal"):
    fun = getattr(lax, name)
    if data == "large":
        return case(lambda x: fun(x + 1.5), data="probabilities")
    return case(fun, data=data)


CASES = {
    **{spec.partition(":")[0]: unary(*spec.split(":")) for spec in UNARY},
    # Elementwise
    "add": case(lambda x, y: x + y, ROWS, ROWS),
    "sub": case(lambda x, y: x - y, ROWS, ROWS),
    "mul": case(lambda x, y: x * y, ROWS, ROWS),
    "div": case(lambda x, y: x / y, ROWS, ROWS, data=("normal", "positive")),
    "rem": case(lambda x, y: lax.rem(x, jnp.exp(y)), ROWS, ROWS, sqnr=20.0),
    "pow": case(lambda x, y: lax.pow(x, y), ROWS, ROWS, data=("probabilities", "normal")),
    "integer_pow": case(lambda x: x**3),
    "one_minus_square": case(lambda x: jax.jvp(jnp.tanh, (x,), (jnp.ones_like(x),))[1]),
    "log2": case(lambda x: jnp.log2(x), data="positive"),
    "atan2": case(lax.atan2, ROWS, ROWS, sqnr=20.0),
    "max": case(lax.max, ROWS, ROWS),
    "min": case(lax.min, ROWS, ROWS),
    "clamp": case(lambda x, low, high: (lax.clamp(low - 3, x, high + 3), jnp.clip(x, -1, 1)), ROWS, ROWS, ROWS),
    "round": case(lambda x: (lax.round(4 * x), jnp.round(4 * x))),
    "select_n": case(
        lambda x, y, i: lax.select_n(i // 2 + i % 2, x, y, x * y), ROWS, ROWS, ROWS, data=("normal", "normal", "places")
    ),
    "is_finite": case(lambda x: jnp.where(jnp.isfinite(x), jnp.exp(x), 0)),
    "convert_element_type": case(
        lambda x, n: ((4 * x).astype(jnp.int32).astype(jnp.float32) + x, n.astype(jnp.float32) * x),
        ROWS,
        ROWS,
        data=("normal", "int8"),
    ),
    "nextafter": case(lambda x: lax.nextafter(x, np.float32(9))),
    "polynomial": case(lambda x: jnp.polyval(jnp.array([1.0, -2.0, 0.5]), x)),
    "name": case(lambda x: checkpoint_name(x * 2, "doubled") + 1),
    "lt_to": case(lambda x: jnp.searchsorted(jnp.array([-1.0, 0.01, 1.0]), x, side="right")),
    "le_to": case(lambda x: jnp.searchsorted(jnp.array([-1.0, 0.01, 1.0]), x)),
    "reduce_precision": case(lambda x: lax.reduce_precision(x, 8, 7)),
    "copy": case(lambda x: jnp.copy(x) * 2),
    "eq": compared(lambda x, y: jnp.sign(x) == jnp.sign(y)),
    "ne": compared(lambda x, y: jnp.sign(x) != jnp.sign(y)),
    "lt": compared(lambda x, y: x < y),
    "le": compared(lambda x, y: x <= y),
    "gt": compared(lambda x, y: x > y),
    "ge": compared(lambda x, y: x >= y),
    "and": compared(lambda x, y: (x > y) & (x > 0)),
    "or": compared(lambda x, y: (x > y) | (x > 0)),
    "xor": compared(lambda x, y: (x > y) ^ (x > 0)),
    "not": compared(lambda x, y: ~((x > y) & (x > 0))),
    # Shapes and places
    "broadcast_in_dim": case(lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 2, *x.shape[1:]))),
    "reshape": case(lambda x: x.reshape(x.shape[0], -1)),
    "transpose": case(lambda x: x.swapaxes(1, 2)),
    "squeeze": case(lambda x: x[:, :1].squeeze(1)),
    "concatenate": case(lambda x, y: jnp.concatenate([x, 2 * y], 1), ROWS, ROWS),
    "split": case(lambda x: jnp.split(x, 2, 2)),
    "unstack": case(lambda x: jnp.unstack(x, axis=1)),
    "stack": case(lambda x, y: jnp.stack([x, y], 1), ROWS, ROWS),
    "tile": case(lambda x: jnp.tile(x, (1, 2, 1))),
    "pad": case(
        lambda x: (jnp.pad(x, ((0, 0), (1, 2), (0, 0))), lax.pad(x, x[0, 0, 0], ((0, 0, 0), (1, -1, 1), (0, 0, 0))))
    ),
    "rev": case(lambda x: x[:, ::-1]),
    "slice": case(lambda x: x[:, 1:4:2]),
    "dynamic_slice": case(
        lambda x, i: (
            lax.dynamic_slice(x, (0, i[0], 0), (x.shape[0], 2, 8)),
            jax.vmap(lambda row, k: lax.dynamic_slice(row, (k, 0), (2, 8)))(x, i),
        ),
        ROWS,
        (),
        data=("normal", "places"),
    ),
    "dynamic_update_slice": case(
        lambda x, y, i: (
            lax.dynamic_update_slice(x, y[:, :2], (0, i[0], 0)),
            lax.dynamic_update_slice(jnp.zeros_like(x), y[:, :1], (0, i[1], 0)),
            jax.vmap(lambda row, new, k: lax.dynamic_update_slice(row, new[:1], (k, 0)))(x, y, i),
        ),
        ROWS,
        ROWS,
        (),
        data=("normal", "normal", "places"),
    ),
    "gather": case(
        lambda x, i: (
            x[rows(x, i)],
            jnp.take(x, i, axis=1),
            jnp.take_along_axis(x, jnp.broadcast_to(i[:, None, None], x.shape), 2),
            x.at[:, i + 3].get(mode="fill", fill_value=0.5),
            jnp.take(SQUARE, i, axis=0),
        ),
        ROWS,
        (),
        data=("normal", "places"),
    ),
    "scatter": case(
        lambda x, y, i: (
            x.at[rows(x, i)].set(y[:, 0]),
            x.at[:, i[0]].set(0.5),
            x.at[:, i[0] + 3].set(y[:, 1], mode="drop"),
            x.at[:, np.array([0, 3])].set(y[:, :2]),
        ),
        ROWS,
        ROWS,
        (),
        data=("normal", "normal", "places"),
    ),
    "scatter-max": at_places("max"),
    "scatter-min": at_places("min"),
    "scatter-add": case(
        lambda x, y, i: (x.at[rows(x, i)].add(y[:, 0]), jax.ops.segment_sum(y[:, 0], i, 4)),
        ROWS,
        ROWS,
        (),
        data=("normal", "normal", "places"),
        sqnr=20.0,
    ),
    "scatter-mul": case(
        lambda x, y, i: x.at[rows(x, i)].mul(y[:, 0], unique_indices=True),
        ROWS,
        ROWS,
        (),
        data=("normal", "normal", "places"),
        sqnr=20.0,
    ),
    # Reductions
    "reduce_sum": case(lambda x: (x.sum(1), x.mean((1, 2), keepdims=True))),
    "reduce_max": case(lambda x: (x.max(1), x.max((1, 2)))),
    "reduce_min": case(lambda x: (x.min(1), x.min((1, 2)))),
    "reduce_prod": case(lambda x: x.prod(1), data="positive", sqnr=20.0),
    "reduce_and": case(lambda x: jnp.where((x > -1).all(2, keepdims=True), x, -x)),
    "reduce_or": case(lambda x: jnp.where((x > 1).any(2, keepdims=True), x, -x)),
    "reduce": case(lambda x: lax.reduce(x, np.float32(0.5), lambda a, b: a + b, (2,))),
    "argmax": case(lambda x: (jnp.argmax(x, 1), jnp.argmax(x, -1))),
    "argmin": case(lambda x: (jnp.argmin(x, 1), jnp.argmin(x, -1))),
    "cumsum": case(lambda x: (jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True))),
    "cumprod": case(lambda x: lax.cumprod(x, 1), data="probabilities"),
    "cummax": case(lambda x: (lax.cummax(x, 1), lax.cummax(x, 2, reverse=True))),
    "cummin": case(lambda x: (lax.cummin(x, 1), lax.cummin(x, 2, reverse=True))),
    "cumlogsumexp": case(lambda x: (lax.cumlogsumexp(x, 1), lax.cumlogsumexp(x, 2, reverse=True))),
    "reduce_window_sum": case(
        lambda x: (windows(lax.add, 0)(x), windows(lax.add, 0, window_dilation=(1, 2, 2, 1))(x)), IMAGE
    ),
    "reduce_window_max": case(windows(lax.max, -np.inf), IMAGE),
    "reduce_window_min": case(windows(lax.min, np.inf), IMAGE),
    "reduce_window": case(windows(lax.mul, 1), IMAGE, data="probabilities"),
    # Order
    "sort": case(
        lambda x, y: (
            jnp.sort(x),
            jnp.sort(x, 1, descending=True),
            jnp.argsort(x, 1),
            jnp.median(x, 2),
            lax.sort((x, y), num_keys=1),
            lax.sort((jnp.round(x), y), num_keys=2),
        ),
        ROWS,
        ROWS,
    ),
    "top_k": case(lambda x: (lax.top_k(x, 3), lax.top_k(x.swapaxes(1, 2), 2)[0])),
    "approx_top_k": case(lambda x: (lax.approx_max_k(x, 3), lax.approx_min_k(x, 2))),
    # Products
    "dot_general": case(
        lambda x, y: (
            x @ SQUARE,
            jnp.einsum("ij,bkj->bik", SQUARE, x),
            jnp.einsum("bij,bkj->bki", x, y),
            jnp.einsum("bij,ejk->bekij", x, LAYERS[:2]),
        ),
        ROWS,
        ROWS,
        sqnr=27.0,
    ),
    "conv_general_dilated": case(
        lambda x: (
            conv(x, KERNEL),
            conv(x[:3], jnp.tanh(x[:3, :3, :3].transpose(1, 2, 3, 0))),
            conv(x, np.concatenate([KERNEL, -KERNEL], 3), batch_group_count=2),
        ),
        IMAGE,
        sqnr=20.0,
    ),
    "ragged_dot_general": case(
        lambda x, i: lax.ragged_dot(x, LAYERS[:3], jnp.bincount(i, length=3)),
        (8,),
        (),
        data=("normal", "places"),
        sqnr=20.0,
    ),
    # Loops and branches
    "scan": case(
        lambda x: (
            lax.scan(lambda h, w: (jax.nn.relu(h @ w) + h, None), x, LAYERS)[0],
            lax.scan(lambda h, t: ((h + t) / 2, h), x[:, 0], x.swapaxes(0, 1), reverse=True),
            lax.map(lambda row: jax.nn.softmax(row @ SQUARE), x),
            lax.fori_loop(0, 3, lambda k, h: h * 0.5 + k, x),
            lax.fori_loop(0, 300, lambda _, h: jnp.tanh(h + x), x),
        ),
        sqnr=20.0,
    ),
    "while": case(
        lambda x: lax.while_loop(lambda s: s[0] < jnp.argmax(x) % 3, lambda s: (s[0] + 1, jnp.tanh(s[1] + x)), (0, x)),
        sqnr=20.0,
    ),
    "cond": case(
        lambda x: (
            lax.cond(jnp.array(True), lambda x: x * 2, lambda x: x @ SQUARE, x),
            lax.cond(jnp.max(x) > -100, lambda x: jnp.tanh(x @ SQUARE), lambda x: jnp.zeros_like(x), x),
        ),
        sqnr=20.0,
    ),
}


def traced(fun, *inputs):
    names = tuple(f"x{k}" for k in range(len(inputs)))
    with jax.numpy_dtype_promotion("standard"):
        return tracing.trace(lambda p, *xs: fun(*xs), {}, inputs, parameter_names=names)


def bound(jaxpr):
    """The names of all primitives of a jaxpr and of the bodies in it."""
    found = set()
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        found |= {eqn.primitive.name}.union(*map(bound, _compat.sub_jaxprs(eqn)))
    return found


#: `backends/lax_int/wide.py` looks trigonometry up where it is not.


@pytest.mark.parametrize("name", CASES)
def test_primitive(compiled, name):
    fun, shapes, data, sqnr = CASES[name]
    compiled(fun, *shapes, data=data, sqnr=sqnr)


@pytest.mark.parametrize("name", CASES)
def test_cases_hold_the_primitive_that_names_them(name):
    fun, shapes, data, _ = CASES[name]
    kinds = (data,) * len(shapes) if isinstance(data, str) else data
    dtypes = [{"places": np.int32, "int8": np.int8}.get(kind, np.float32) for kind in kinds]
    program = traced(fun, *(np.ones((16, *s), d) for s, d in zip(shapes, dtypes, strict=True)))
    # Some releases of JAX lack a primitive, and spell the function otherwise.
    assert name in bound(program.jaxpr) or name not in _compat.primitives_by_name()


def test_every_primitive_of_the_table_has_a_case():
    assert set(primitives.tested()) == set(CASES)


def test_the_table_is_up_to_date():
    """Written by `python -m qcompiler primitives > docs/primitives.md`."""
    assert (ROOT / "docs" / "primitives.md").read_text() == primitives.document()


X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
ISLANDS = {
    "bitcast_convert_type": lambda x: x * jax.random.normal(jax.random.key(0), x.shape),
    "scatter-mul": lambda x: x.at[jnp.argmax(x, 1) % 4].mul(x),
    "reduce": lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + 0.5 * b, (1,)),
    "cholesky": lambda x: lax.linalg.cholesky(x @ x.T),
    "igamma": lambda x: lax.igamma(jnp.exp(x), jnp.exp(x[::-1])),
}


@pytest.mark.parametrize("name", ISLANDS)
def test_islands_give_the_reason_of_the_table(name):
    islands = partition(simplify(traced(ISLANDS[name], X))).notes["islands"]
    assert (name, classes.FLOAT_ONLY[name]) in [(i["primitive"], i["reason"]) for i in islands]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision(compiled, dtype):
    def fun(x, i):
        half = x.astype(dtype)
        made = (
            jax.nn.softmax(half),
            jax.nn.silu(half) @ SQUARE.astype(dtype),
            jnp.sort(half, 1),
            half.at[rows(x, i)].add(half[:, 0]),
            half.mean(1),
        )
        return [y.astype(jnp.float32) for y in made]

    # Half precision itself rounds to 8 bits (bfloat16) where integers do not.
    compiled(fun, ROWS, (), data=("normal", "places"), sqnr=20.0)


def test_random_bits_pass_through_strictly_where_they_choose():
    """Bits that are compared as integers are no reals; the key is an argument like any other."""

    def fun(key, x):
        keep = jax.random.bits(jax.random.wrap_key_data(key), x.shape, jnp.uint32) < np.uint32(1 << 31)
        return jnp.where(keep, 2 * x, 0)

    keys = [np.array([0, k], np.uint32) for k in range(3)]
    model = qc.quantize(fun, [(keys[0], X)], strict=True)
    first, second = (np.asarray(model(k, X)) for k in keys[1:])
    np.testing.assert_allclose(first, np.asarray(fun(keys[1], X)), atol=1e-3)
    assert np.any((first == 0) != (second == 0))
