"""Errors of products count by how much the outputs depend on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax
from norms import layer_norm

import qcompiler as qc
from qcompiler.debug.report import sqnr_db
from qcompiler.ir.tracing import trace
from qcompiler.numerics.types import QuantType
from qcompiler.passes import _influence, correct_bias
from qcompiler.passes._influence import influences
from qcompiler.passes.partition import partition
from qcompiler.passes.simplify import simplify

WEIGHTS = {"w": normal(16, 6), "b": normal(6, seed=1)}
REGION = "dot_general#0"


def _partitioned(fun, weights, *inputs):
    return partition(simplify(trace(fun, weights, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs])))


def test_influence_is_the_square_of_what_a_result_is_multiplied_by():
    """One output per result, so that signs on outputs have nothing to average out."""
    by = normal(8, 6, seed=2)
    program = _partitioned(lambda p, x: jnp.sinh((x @ p["w"] + p["b"]) * by), WEIGHTS, normal(8, 16))
    batches = [[normal(8, 16, seed=3)], [normal(8, 16, seed=4)]]
    found = influences(program, batches)[REGION]
    slopes = [by * np.cosh((x @ WEIGHTS["w"] + WEIGHTS["b"]) * by) for (x,) in batches]
    expected = np.square(slopes) / np.mean(np.square(slopes), axis=(0, 1))
    # Float32 derivatives of numbers of about 10.
    np.testing.assert_allclose(np.stack(found.weights), expected, rtol=1e-4)


def test_all_rows_count_alike_where_all_do_the_same():
    program = _partitioned(lambda p, x: x @ p["w"] + p["b"], WEIGHTS, normal(8, 16))
    found = influences(program, [[normal(8, 16, seed=3)]])[REGION]
    np.testing.assert_array_equal(found.weights[0], np.ones((8, 6)))
    error = normal(8, 6, seed=5)
    np.testing.assert_allclose(found.mean([error]), error.mean(axis=0, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("layout", ["conv", "weight_left"])
def test_channels_are_where_the_weight_has_them(layout):
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = lambda p, x: lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
    fun, weights, x, axes = {
        "conv": (conv, {"k": normal(3, 3, 4, 6)}, normal(2, 5, 5, 4), (0, 1, 2)),
        "weight_left": (lambda p, x: p["w"] @ x, {"w": normal(6, 16)}, normal(16, 9), (1,)),
    }[layout]
    ((_, found),) = influences(_partitioned(fun, weights, x), [[x]]).items()
    error = np.asarray(fun(weights, x))
    np.testing.assert_allclose(found.mean([error]), error.mean(axis=axes, keepdims=True), atol=1e-6)


def test_of_large_results_some_rows_are_kept(monkeypatch):
    monkeypatch.setattr(_influence, "_MOST_ELEMENTS", 24)
    x = normal(8, 16)
    found = influences(_partitioned(lambda p, x: x @ p["w"] + p["b"], WEIGHTS, x), [[x]])[REGION]
    assert found.weights[0].shape == (4, 6)
    error = normal(8, 6, seed=5)
    np.testing.assert_allclose(found.mean([error])[0], error[found.drawn].mean(axis=0), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:qcompiler leaves 1 operations in float .svd")
@pytest.mark.parametrize(
    "fun",
    [
        lambda p, x: jnp.argmax(x @ p["w"] + p["b"], axis=-1),
        lambda p, x: jnp.linalg.svd(x @ p["w"] + p["b"], full_matrices=True)[1],
        lambda p, x: lax.while_loop(lambda y: jnp.sum(y) < 1e3, lambda y: y * 2, jnp.abs(x @ p["w"] + p["b"]) + 1),
    ],
    ids=["integers", "svd", "while"],
)
def test_without_derivatives_nothing_is_said(fun):
    x = normal(8, 16)
    program = _partitioned(fun, WEIGHTS, x)
    assert influences(program, [[x]]) == {}
    # Means are plain then, and biases are corrected all the same.
    model = qc.quantize(fun, [x], params=WEIGHTS, recipe=qc.Recipe(bias_correction="empirical"))
    assert set(model.program.notes["corrected"]) >= {REGION}


def test_products_without_elements_have_none():
    fun = lambda p, x: (x @ p["w"] + p["b"], x @ p["w"][:, :0])
    x = normal(8, 16)
    assert list(influences(_partitioned(fun, WEIGHTS, x), [[x]])) == [REGION]


def _masked(p, x, mask):
    """Rows that a mask leaves out are computed, and nobody reads them."""
    return jnp.sum(jax.nn.relu(x @ p["w"] + p["b"]) * mask[:, None], axis=0)


def test_rows_that_nobody_reads_do_not_shift_biases(passes):
    mask = (np.arange(64) % 4 == 0).astype(np.float32)
    x = normal(64, 16, seed=3, shift=1.0)
    other = np.where(mask[:, None] > 0, x, -3 * x)
    recipe = qc.Recipe(weight=QuantType(3, symmetric=True, narrow_range=True), activation_range="minmax")
    found = passes(_masked, WEIGHTS, [(x, mask)], recipe, until="insert_qdq")
    shifts = [
        correct_bias.decide(found["assign_precision"], found["insert_qdq"], [[given, mask]], "empirical").shifts[REGION]
        for given in (x, other)
    ]
    # Where a whole channel is negative, nobody reads any row of it.
    read = (np.asarray(x @ WEIGHTS["w"] + WEIGHTS["b"]) * mask[:, None]).max(axis=0) > 0
    assert read.sum() >= 3 and np.abs(shifts[0]).max() > 0.05
    np.testing.assert_array_equal(shifts[0][..., read], shifts[1][..., read])


def test_large_values_that_a_norm_divides_by_do_not_shift_the_rest(monkeypatch):
    """A few rows have a channel that is far larger, which 8 bits clip: the plain mean error is theirs alone."""
    spread = np.where(np.arange(256) % 64 == 0, 300.0, 1.0).astype(np.float32)[:, None]

    def fun(p, x, large):
        y = x @ p["w"] + p["b"] + large
        y = layer_norm(y @ p["square"], 4 * jnp.ones(16), jnp.zeros(16))
        return y @ p["v"]

    weights = {
        "w": 0.25 * normal(16, 16),
        "b": normal(16, seed=1),
        "square": normal(16, 16, seed=2),
        "v": normal(16, 4, seed=4),
    }
    at_zero = (np.arange(16) == 0).astype(np.float32)
    draw = lambda seed: (4 * normal(256, 16, seed=seed), spread * at_zero * np.abs(normal(256, 1, seed=seed + 1)))
    recipe = lambda method: qc.Recipe(activation_sqnr=None, activation_range=(-16.0, 16.0), bias_correction=method)
    calibration, test = qc.call(*draw(10)), draw(20)
    rest, found = spread[:, 0] == 1, {}
    for name, method in (("none", None), ("weighted", "empirical"), ("plain", "empirical")):
        if name == "plain":
            monkeypatch.setattr(correct_bias, "influences", lambda program, batches: {})
        model = qc.quantize(fun, [calibration], params=weights, recipe=recipe(method))
        found[name] = sqnr_db([fun(weights, *test)[rest]], [model(*test)[rest]])
    assert found["weighted"] >= found["none"] - 1, found
    assert found["weighted"] >= found["plain"] + 6, found
