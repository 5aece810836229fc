"""The quantization primitives: one formula under every transformation."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qcompiler import ops
from qcompiler.ir import _compat
from qcompiler.numerics.types import ACTIVATION, BIAS, INDEX, STREAM, WEIGHT, QuantType

PER_CHANNEL = QuantType(8, symmetric=True, narrow_range=True, axis=(1,))
TYPES = [ACTIVATION, WEIGHT, STREAM, INDEX, QuantType(4), PER_CHANNEL]
NAMES = [t.name for t in TYPES]


def _normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def _parameters(qtype, channels=6, seed=1):
    """Scale and zero point of a type for values of about 1, per channel of axis 1 if it says so."""
    rng = np.random.default_rng(seed)
    shape = (1, channels) if qtype.axis else ()
    scale = (rng.uniform(1.0, 3.0, shape) / qtype.qmax).astype(np.float32)
    zero = np.zeros(shape, np.int32) if qtype.symmetric else np.asarray(qtype.qmax // 3, np.int32)
    return scale, zero


def _codes(x, scale, zero, qtype):
    """The formula, in NumPy: clamp(rint(x * float32(1 / s)) + z), ties to even; NaN is real zero."""
    with np.errstate(over="ignore"):
        steps = np.rint(np.asarray(x, np.float32) * (np.float32(1) / scale))
    steps = np.clip(np.where(np.isnan(steps), 0, steps), -(2.0**24), 2.0**24).astype(np.int64)
    return np.clip(steps + zero, qtype.qmin, qtype.qmax).astype(qtype.dtype)


def _reals(q, scale, zero):
    return (q.astype(np.int64) - zero).astype(np.float32) * scale


def _x(*shape):
    x = _normal(*(shape or (5, 6)), scale=2.0)
    x.ravel()[:5] = [np.nan, np.inf, -np.inf, 3e38, -3e38]
    return x


@pytest.mark.parametrize("qtype", TYPES, ids=NAMES)
def test_values(qtype):
    x, (scale, zero) = _x(), _parameters(qtype)
    q = ops.quantize(x, scale, zero, qtype)
    assert q.dtype == qtype.dtype and q.shape == x.shape
    np.testing.assert_array_equal(q, _codes(x, scale, zero, qtype))
    r = ops.dequantize(q, scale, zero, qtype)
    assert r.dtype == np.float32
    np.testing.assert_array_equal(r, _reals(np.asarray(q), scale, zero))
    np.testing.assert_array_equal(ops.fake_quantize(x, scale, zero, qtype), r)
    narrow = QuantType(8)
    s, z = np.float32(0.03), np.int32(-5)
    np.testing.assert_array_equal(
        ops.requantize(q, scale, zero, s, z, qtype, narrow), _codes(_reals(np.asarray(q), scale, zero), s, z, narrow)
    )


@pytest.mark.parametrize("qtype", TYPES, ids=NAMES)
def test_nan_is_the_zero_point_and_infinity_saturates(qtype):
    scale, zero = _parameters(qtype)
    x = np.broadcast_to(np.array([[np.nan], [np.inf], [-np.inf]], np.float32), (3, 6))
    q = np.asarray(ops.quantize(x, scale, zero, qtype))
    assert (q[0] == zero).all() and (q[1] == qtype.qmax).all() and (q[2] == qtype.qmin).all()
    assert (ops.fake_quantize(x, scale, zero, qtype)[0] == 0).all()


def test_ties_go_to_even_and_the_reciprocal_is_rounded_first():
    one = np.float32(1)
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)
    assert ops.quantize(x, one, np.int32(0), ACTIVATION).tolist() == [0, 2, 2, 0, -2]
    scale = np.float32(0.1)
    x = (np.arange(-600, 600, dtype=np.float32) / np.float32(2)) * scale
    np.testing.assert_array_equal(ops.quantize(x, scale, np.int32(0), STREAM), _codes(x, scale, 0, STREAM))


def _all(x, scale, zero, qtype):
    q = ops.quantize(x, scale, zero, qtype)
    narrow = ops.requantize(q, scale, zero, np.float32(0.03), np.int32(-5), qtype, ACTIVATION)
    return (
        q,
        ops.dequantize(q, scale, zero, qtype),
        ops.fake_quantize(x, scale, zero, qtype),
        narrow,
        ops.observe(x, "x"),
    )


def _same(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype and left.shape == right.shape
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("qtype", TYPES, ids=NAMES)
def test_jit_is_eager(qtype):
    x, (scale, zero) = _x(), _parameters(qtype)
    eager = _all(x, scale, zero, qtype)
    _same(jax.jit(lambda *a: _all(*a, qtype))(x, scale, zero), eager)
    _same(jax.jit(lambda x: _all(x, scale, zero, qtype))(x), eager)


def _stacked(values):
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *values)


@pytest.mark.parametrize("qtype", TYPES, ids=NAMES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_vmap_over_operands(qtype, compiled):
    xs = _x(3, 5, 6)
    pairs = [_parameters(qtype, seed=k) for k in range(3)]
    scales, zeros = _stacked(pairs)
    scale, zero = pairs[0]
    run = lambda fun, *args: (jax.jit(fun) if compiled else fun)(*args)
    over = lambda axes: lambda x, s, z: jax.vmap(lambda *a: _all(*a, qtype), in_axes=axes)(x, s, z)
    _same(run(over((0, None, None)), xs, scale, zero), _stacked([_all(x, scale, zero, qtype) for x in xs]))
    _same(run(over((None, 0, None)), xs[0], scales, zero), _stacked([_all(xs[0], s, zero, qtype) for s in scales]))
    both = [_all(x, s, z, qtype) for x, s, z in zip(xs, scales, zeros, strict=True)]
    _same(run(over((0, 0, 0)), xs, scales, zeros), _stacked(both))
    last = np.moveaxis(xs, 0, -1)
    _same(run(over((-1, 0, 0)), last, scales, zeros), _stacked(both))


def test_vmap_in_vmap():
    xs, (scale, zero) = _x(2, 3, 5, 6), _parameters(PER_CHANNEL)
    mapped = jax.vmap(jax.vmap(lambda x: ops.quantize(x, scale, zero, PER_CHANNEL)))(xs)
    np.testing.assert_array_equal(mapped, _codes(xs, scale, zero, PER_CHANNEL))


def test_types_per_channel_name_the_same_dimension_under_vmap():
    xs, (scale, zero) = _x(3, 5, 6), _parameters(PER_CHANNEL)
    jaxpr = jax.make_jaxpr(jax.vmap(lambda x: _all(x, scale, zero, PER_CHANNEL)[:4]))(xs)
    for eqn in jaxpr.eqns:
        if "type" in eqn.params:
            key = "in_type" if "in_type" in eqn.params else "type"
            assert eqn.params[key].axis == (2,)
    _compat.check_types(jaxpr)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_abstract_evaluation(dtype):
    x = jax.ShapeDtypeStruct((5, 6), dtype)
    scale, zero = _parameters(PER_CHANNEL)
    q, r, fake, narrow, seen = jax.eval_shape(lambda x: _all(x, scale, zero, PER_CHANNEL), x)
    assert [a.shape for a in (q, r, fake, narrow, seen)] == [(5, 6)] * 5
    assert [a.dtype for a in (q, r, fake, narrow, seen)] == [np.int8, np.float32, dtype, np.int8, dtype]
    wide = jax.eval_shape(lambda x: ops.quantize(x, np.float32(1), np.int32(0), BIAS), x)
    assert wide.dtype == np.int32


# Derivatives


@pytest.mark.parametrize("qtype", TYPES, ids=NAMES)
def test_fake_quantize_is_straight_through_inside_of_its_range(qtype):
    scale, zero = _parameters(qtype)
    x = _normal(50, 6, scale=3.0)
    # What rounds to the first or last code is inside.
    inside = ((qtype.qmin - zero - 0.5) * scale <= x) & (x <= (qtype.qmax - zero + 0.5) * scale)
    assert inside.any() and not inside.all()
    fun = lambda x: ops.fake_quantize(x, scale, zero, qtype)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(3.0 * fun(x)))(x), np.where(inside, 3, 0))
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: jnp.sum(fun(x))))(x), inside)
    out, tangent = jax.jvp(fun, (x,), (x,))
    np.testing.assert_array_equal(out, fun(x))
    np.testing.assert_array_equal(tangent, np.where(inside, x, 0))
    mapped = jax.vmap(jax.grad(lambda x: jnp.sum(fun(x))))(np.stack([x, x]))
    np.testing.assert_array_equal(mapped, np.stack([inside, inside]))


def test_scales_have_no_derivative():
    x = _normal(5, 6)
    grads = jax.grad(lambda s: jnp.sum(ops.fake_quantize(x, s, np.int32(0), STREAM)))(jnp.float32(0.1))
    assert grads == 0


def test_observe_is_the_identity_to_every_transformation():
    x = _normal(5, 6)
    fun = lambda x: jnp.sum(ops.observe(x, "here") ** 2)
    np.testing.assert_array_equal(jax.grad(fun)(x), 2 * x)
    jaxpr = jax.make_jaxpr(jax.vmap(fun))(x)
    assert [e.params["id"] for e in jaxpr.eqns if e.primitive is ops.observe_p] == ["here"]


# Regions


def _body(x, w, b):
    return [jax.nn.relu(x @ w + b)]


def _region(x, w, b):
    (y,) = ops.region(_body, x, w, b, id="layer/dot_general#0", kind="dot", roles=("activation", "weight", "bias"))
    return y


ARGS = (_normal(4, 3), _normal(3, 5, seed=1), _normal(1, 5, seed=2))


def test_a_region_is_its_body():
    _same(_region(*ARGS), _body(*ARGS)[0])
    # Compiled as a whole XLA may fuse; the same XLA program on both sides.
    _same(jax.jit(_region)(*ARGS), jax.jit(lambda *a: _body(*a)[0])(*ARGS))
    jaxpr = jax.make_jaxpr(_region)(*ARGS)
    assert [e.primitive.name for e in jaxpr.eqns] == ["qc_region"]
    assert jaxpr.out_avals[0].shape == (4, 5)


def test_a_region_has_the_derivative_of_its_body():
    sums = [lambda *a: jnp.sum(jnp.sin(_region(*a))), lambda *a: jnp.sum(jnp.sin(_body(*a)[0]))]
    got, expected = (jax.grad(f, argnums=(0, 1, 2))(*ARGS) for f in sums)
    for a, b in zip(got, expected, strict=True):
        # The same sums in another order: a few units of float32 rounding.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (0, 0, 0), (2, None, 0)])
def test_a_region_under_vmap(axes):
    args = [x if a is None else np.stack([x, 2 * x, -x], axis=a) for x, a in zip(ARGS, axes, strict=True)]
    mapped = jax.vmap(_region, in_axes=axes)(*args)
    expected = jax.vmap(lambda *a: _body(*a)[0], in_axes=axes)(*args)
    # A batched product may sum in another order.
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)
    eqns = [e for e in jax.make_jaxpr(jax.vmap(_region, in_axes=axes))(*args).eqns if e.primitive is ops.region_p]
    assert [(e.params["id"], e.params["roles"]) for e in eqns] == [
        ("layer/dot_general#0", ("activation", "weight", "bias"))
    ]


def test_a_region_must_not_close_over_an_array():
    held = jnp.ones((4, 3))
    with pytest.raises(AssertionError, match="closes over"):
        ops.region(lambda x: [x + held], ARGS[0], id="r", kind="linear", roles=("term",))


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_export_round_trip_in_process(platforms):
    scale, zero = _parameters(PER_CHANNEL, channels=5)

    def fun(x, w, b):
        y = ops.observe(_region(x, w, b), "y")
        return _all(y, scale, zero, PER_CHANNEL)

    exported = jax.export.export(jax.jit(fun), platforms=platforms)(*ARGS)
    _same(exported.call(*ARGS), jax.jit(fun)(*ARGS))


def test_integers_to_integers_in_a_region():
    def fun(q, scale, zero):
        shifted = lax.sub(q.astype(jnp.int32), zero)
        return [
            ops.quantize(ops.dequantize(shifted, scale, np.int32(0), BIAS), np.float32(0.5), np.int32(1), ACTIVATION)
        ]

    q = np.arange(-128, 128).astype(np.int8)
    operands = q, np.float32(0.1), np.int32(7)
    region = lambda *a: ops.region(fun, *a, id="r", kind="linear", roles=("term", "scale", "zero_point"))
    _same(region(*operands), fun(*operands))
    assert region(*operands)[0].dtype == np.int8
