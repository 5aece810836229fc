"""Fisher and Hessian losses against derivatives taken one by one, and `stored` against the pass's own pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qcompiler as qc
from qcompiler import ops
from qcompiler.candidates import NAMED, Candidate
from qcompiler.curvature import Curvature
from qcompiler.numerics import types
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import ACTIVATION, WEIGHT, QuantType
from qcompiler.switchable import Switchable, _ways, stored


def _switchable(fn, params, x, candidates):
    calibrated = qc.trace(fn, x, params=params).calibrate([x])
    return Switchable(calibrated.program, qc.Recipe(), candidates)


@pytest.mark.parametrize(
    "qtype",
    [
        QuantType(8),
        QuantType(4, symmetric=True, narrow_range=True),
        QuantType(16, symmetric=True),
        QuantType(8, axis=(1,)),
        QuantType(3, symmetric=True, axis=(1,)),
    ],
    ids=lambda t: t.name,
)
def test_what_is_stored_is_what_a_pair_gives(qtype):
    draw = np.random.default_rng(0)
    x = (draw.normal(size=(64, 6)) * draw.uniform(0.1, 30, 6)).astype(np.float32)
    x[0], x[1, 0], x[2, 1], x[3, 2] = 0, np.inf, -np.inf, np.nan
    low = np.full((1, 6), -2.5) * np.arange(1, 7) if qtype.axis else np.float64(-2.5)
    scale, zero = types.scale_and_zero_point(low, -1.7 * low, qtype)
    ways = _ways([(1, Encoding(qtype, scale, zero)), (2, None)], x.ndim)
    wanted = np.asarray(ops.fake_quantize(x, scale, zero, qtype))
    for row in (1, jnp.int32(1)):
        np.testing.assert_array_equal(np.asarray(jax.jit(stored)(x, ways, row)), wanted)
    np.testing.assert_array_equal(np.asarray(stored(x, ways, 1)), wanted)
    np.testing.assert_array_equal(np.asarray(stored(x, ways, jnp.int32(0))), x)
    halves = np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(np.asarray(stored(x, ways, jnp.int32(2))), halves)


def _linear(params, x):
    return x @ params["w"]


def _curved(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def _arrays(seed=0, inputs=5, hidden=6, outputs=4, count=12):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    return {"w": normal(inputs, hidden), "v": normal(hidden, outputs)}, normal(count, inputs)


WEIGHTS_ONLY = {"int4": Candidate(NAMED["int4"].weight), "int8": Candidate(WEIGHT)}


def _weight_error(array, qtype):
    return np.asarray(types_error(array, qtype), np.float64)


def types_error(array, qtype):
    per_channel = QuantType(qtype.bits, symmetric=True, narrow_range=True, axis=(1,))
    scale, zero = types.scale_and_zero_point(array.min(0, keepdims=True), array.max(0, keepdims=True), per_channel)
    return np.asarray(ops.fake_quantize(array, scale, zero, per_channel)) - array


def _mean(estimates):
    rows = np.stack(list(estimates))
    return rows.mean(0), rows.std(0) / np.sqrt(len(rows))


def test_hutchinson_is_exact_where_the_hessian_is_diagonal():
    """y = x w with orthogonal x: every sign of a probe meets itself alone, so that one draw gives the trace."""
    params, _ = _arrays()
    x = 3 * np.eye(5, dtype=np.float32)
    network = _switchable(_linear, {"w": params["w"]}, x, WEIGHTS_ONLY)
    (found,) = Curvature(network, "mse").hessian([[x]], 1)
    # The loss is sum((x dw)^2) / size, its Hessian 2 x^T x / size = 18 / 30 on the diagonal.
    error = [np.sum(_weight_error(params["w"], t.weight) ** 2) for t in WEIGHTS_ONLY.values()]
    np.testing.assert_allclose(found, [[0.5 * 18 / 30 * e for e in error]], rtol=1e-4)


@pytest.mark.parametrize("of", ["mse", "kl_nats"])
def test_hutchinson_gives_the_trace_of_the_hessian(of):
    params, x = _arrays()
    network = _switchable(_curved, params, x, WEIGHTS_ONLY)
    reference = _curved(params, x)

    def loss(params):
        y = _curved(params, x)
        if of == "mse":
            return jnp.mean(jnp.square(y - reference))
        p, q = jax.nn.log_softmax(reference), jax.nn.log_softmax(y)
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))

    found, deviation = _mean(Curvature(network, of).hessian([[x]], 200))
    hessian = jax.hessian(loss)(params)
    for k, name in enumerate(("w", "v")):
        size = params[name].size
        trace = np.trace(np.asarray(hessian[name][name]).reshape(size, size))
        for c, candidate in enumerate(WEIGHTS_ONLY.values()):
            wanted = 0.5 * trace / size * np.sum(_weight_error(params[name], candidate.weight) ** 2)
            # Four standard deviations of the mean of 200 draws, which are some tenths of the trace.
            assert deviation[k, c] < 0.1 * wanted and abs(found[k, c] - wanted) < 4 * deviation[k, c]


@pytest.mark.parametrize("of", ["mse", "kl_nats"])
@pytest.mark.parametrize("operand", ["weights", "activations"])
def test_fisher_is_the_mean_square_of_gradients_sample_by_sample(of, operand):
    """Against all labels, or all outputs, one sample and one gradient at a time."""
    params, x = _arrays()
    candidate = Candidate(WEIGHT) if operand == "weights" else Candidate(activation=ACTIVATION)
    network = _switchable(_curved, params, x, {"int8": candidate})
    found, deviation = _mean(Curvature(network, of).fisher([[x]], 400))

    def outputs(operands, sample):
        hidden = jnp.tanh((sample + operands["in"]) @ operands["w"]) + operands["hidden"]
        return hidden @ operands["v"]

    operands = {**params, "in": jnp.zeros(5), "hidden": jnp.zeros(6)}
    errors = {name: _weight_error(params[name], WEIGHT) for name in ("w", "v")}
    hidden = np.asarray(jnp.tanh(x @ params["w"]))
    for k, (name, array) in enumerate({"in": x, "hidden": hidden}.items()):
        ways = next(iter(network.activation_ways[network.layers[k].id].values()))
        errors[name] = np.asarray(stored(jnp.asarray(array), ways, 1)) - array
    total = dict.fromkeys(errors, 0.0)
    for n, sample in enumerate(x):
        y = outputs(operands, sample)
        for j in range(y.size):
            if of == "mse":
                gradient, weight = jax.grad(lambda o, n=sample, j=j: outputs(o, n)[j])(operands), 1 / (len(x) * y.size)
            else:
                likelihood = lambda o, n=sample, j=j: jax.nn.log_softmax(outputs(o, n))[j]
                gradient, weight = jax.grad(likelihood)(operands), 0.5 * float(jax.nn.softmax(y)[j]) / len(x)
            for name in total:
                error = errors[name] if name in params else errors[name][n]
                total[name] += weight * float(np.sum(np.square(np.asarray(gradient[name])) * np.square(error)))
    names = ("w", "v") if operand == "weights" else ("in", "hidden")
    for k, name in enumerate(names):
        # Four standard deviations of the mean of 400 draws.
        assert deviation[k, 0] < 0.1 * total[name] and abs(found[k, 0] - total[name]) < 4 * deviation[k, 0]


def test_a_loss_of_ones_own():
    """Labels in the loss: the square of the batch's gradient."""
    params, x = _arrays()
    target = np.ones((12, 4), np.float32)
    loss = lambda outputs, batch: jnp.mean(jnp.square(outputs - target))
    network = _switchable(_curved, params, x, WEIGHTS_ONLY)
    (found,) = Curvature(network, loss).fisher([[x]], 8)
    gradient = jax.grad(lambda p: loss(_curved(p, x), None))(params)
    for k, name in enumerate(("w", "v")):
        for c, candidate in enumerate(WEIGHTS_ONLY.values()):
            error = _weight_error(params[name], candidate.weight)
            wanted = 0.5 * np.sum(np.square(np.asarray(gradient[name]) * error))
            np.testing.assert_allclose(found[k, c], wanted, rtol=1e-4)


def test_while_loops_have_no_gradients():
    def fn(params, x):
        return lax.while_loop(lambda c: jnp.sum(jnp.abs(c)) > 1.0, lambda c: 0.5 * (c @ params["w"]), x)

    params, x = {"w": np.eye(5, dtype=np.float32)}, _arrays()[1]
    calibrated = qc.trace(fn, x, params=params).calibrate([x])
    assert calibrated.sensitivity(candidates=("int4",), metric="mse").layers
    with pytest.raises(qc.QuantizationError, match="no gradients through a while loop"):
        calibrated.sensitivity(candidates=("int4",), metric="fisher_mse")
