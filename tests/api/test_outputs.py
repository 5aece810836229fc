"""Results of every structure and kind: several heads, what is also an input or an intermediate value, constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bad_input import PARAMS, X, quantize, refused

import qcompiler as qc
from qcompiler.debug.report import sqnr_db

# int8 operands leave about 40 dB of what two layers make of Gaussian data.
LEAST_DB = 33.0


def hidden(params, x):
    return x @ params["w"] + params["b"]


def heads(params, x):
    h = jax.nn.relu(hidden(params, x))
    return {"logits": h @ params["v"], "gate": [jnp.tanh(h), None, (x @ params["w"],)]}


def intermediate(params, x):
    h = jax.nn.relu(hidden(params, x))
    return h, h @ params["v"]


def before_activation(params, x):
    h = hidden(params, x)
    return h, jax.nn.relu(h) @ params["v"], jax.nn.relu(h)


def before_bias(params, x):
    y = x @ params["w"]
    return y, jax.nn.relu(y + params["b"]) @ params["v"]


def twice(params, x):
    h = hidden(params, x)
    return h, h, h.T, h[:2]


def view_of_input(params, x):
    return x.T, x @ params["w"]


@pytest.mark.parametrize("fun", [heads, intermediate, before_activation, before_bias, twice, view_of_input])
def test_every_result_alone_agrees_with_float(fun):
    qmodel = quantize(fun, strict=True)
    results, expected = qmodel(X), qmodel.float(X)
    assert jax.tree_util.tree_structure(results) == jax.tree_util.tree_structure(expected)
    for result, reference in zip(*map(jax.tree_util.tree_leaves, (results, expected)), strict=True):
        assert result.dtype == reference.dtype and result.shape == reference.shape
        assert sqnr_db([reference], [result]) >= LEAST_DB
    assert qmodel.report.qdq_pairs_after == 0


@pytest.mark.parametrize("fun", [intermediate, twice, view_of_input])
def test_results_as_codes(fun):
    qmodel = quantize(fun, io="int")
    codes = qmodel(qmodel.input_encodings["x"].quantize(X))
    expected = jax.tree_util.tree_leaves(qmodel.float(X))
    for code, encoding, reference in zip(codes, qmodel.output_encodings, expected, strict=True):
        assert sqnr_db([reference], [encoding.dequantize(code)]) >= LEAST_DB
    qmodel.check_integer_only()


def test_one_value_given_twice_is_computed_once():
    first, second, turned, top = quantize(twice)(X)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first.T, turned)
    np.testing.assert_array_equal(first[:2], top)


def test_an_input_that_is_a_result_comes_back_as_it_is():
    x, _ = quantize(lambda params, x: (x, x @ params["w"]), strict=True)(X)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(quantize(lambda x: x, params=None, strict=True)(X), X)


def constants(params, x):
    return x @ params["w"], params["b"] * 2.0, jnp.ones(3), 2.5, np.int32(3)


def test_constant_results_are_exact():
    qmodel = quantize(constants, strict=True)
    _, *rest = qmodel(X)
    for result, reference in zip(rest, constants(PARAMS, X)[1:], strict=True):
        np.testing.assert_array_equal(result, reference)
    np.testing.assert_array_equal(quantize(lambda params, x: params["b"])(X), PARAMS["b"])


def test_no_results():
    assert quantize(lambda params, x: {"nothing": None})(X) == {"nothing": None}


def test_results_that_are_no_real_numbers():
    qmodel = quantize(lambda params, x: (jnp.argmax(hidden(params, x), 1), hidden(params, x) > 0), strict=True)
    best, positive = qmodel(X)
    assert best.dtype == np.int32 and positive.dtype == np.bool_
    # Half an int8 step of noise moves no maximum of this data, and few signs.
    np.testing.assert_array_equal(best, qmodel.float(X)[0])
    assert np.mean(np.asarray(positive) == np.asarray(qmodel.float(X)[1])) >= 0.95


@pytest.mark.parametrize(
    ("fun", "parts"),
    [
        (lambda params, x: (x, x @ params["w"]), ("input x is a result",)),
        (lambda params, x: (x @ params["w"], params["b"]), ("result 1 is a constant",)),
        (lambda params, x: (x @ params["w"], 2.5), ("result 1 is a constant",)),
    ],
    ids=["input", "weight", "number"],
)
def test_results_without_codes(fun, parts):
    with refused(qc.RecipeError, 'io="int"', *parts, "drop it"):
        quantize(fun, io="int")


def test_an_unused_input_without_codes():
    with refused(qc.RecipeError, "input y is read by nothing"):
        quantize(lambda params, x, y: x @ params["w"], [(X, X)], io="int")
