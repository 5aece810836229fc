"""Masks saturate: whatever a model spells them as, they widen no range, and what they hide stays hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qcompiler as qc
from qcompiler.debug import fuzz, reference
from qcompiler.debug.report import sqnr_db
from qcompiler.errors import CalibrationError
from qcompiler.numerics import masks

SMALLEST = float(np.finfo(np.float32).min)
SPELLINGS = [-1e4, -1e9, -1e30, SMALLEST, -np.inf]
RNG = np.random.default_rng(0)
Q, K, V = (RNG.normal(size=(2, 24, 32)).astype(np.float32) for _ in range(3))
CAUSAL = np.broadcast_to(np.tril(np.ones((24, 24), bool)), (2, 24, 24))
PADDING = np.broadcast_to(np.arange(24) < np.array([24, 17])[:, None, None], (2, 24, 24))
KEPT = {"causal": CAUSAL, "padding": PADDING, "both": CAUSAL & PADDING}
#: int8 queries, keys and values leave 40 dB of attention over a hundred keys, and a causal mask leaves fewer keys.
LEAST_DB = 36.0


def _attention(score):
    def fun(weights, q, k, v, *masks):
        s = score(jnp.einsum("bqd,bkd->bqk", q, k) / np.float32(np.sqrt(32)), *masks)
        return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(s), v)

    return fun


def _checked(fun, *inputs, weights=None, least=LEAST_DB):
    """The compiled stages; their integers agree with float."""
    stages = fuzz.compile_stages(fun, weights or {}, inputs)
    assert not stages.folded.notes["islands"]
    exact = jax.jit(fun)(weights or {}, *inputs)
    (got,) = reference.evaluate(stages.folded, list(inputs))
    assert sqnr_db([exact], [got]) >= least
    return stages


def _ranges(stages):
    """Largest magnitude of every observed value."""
    return {key: max(-s.min, s.max) for key, s in stages.folded.stats.items()}


def _spelled(how, kept, value):
    """(function of scores and masks, further inputs)"""
    added = np.where(kept, 0, value).astype(np.float32)
    return {
        "selected": (lambda s: jnp.where(kept, s, np.float32(value)), ()),
        "added": (lambda s: s + added, ()),
        "input": (lambda s, m: s + m, (added,)),
        "chosen_by_input": (lambda s, m: jnp.where(m, s, np.float32(value)), (kept,)),
        "computed": (lambda s, m: s + (1.0 - m.astype(np.float32)) * np.float32(value), (kept.astype(np.int32),)),
        "subtracted": (lambda s, m: s - (1.0 - m.astype(np.float32)) * np.float32(-value), (kept.astype(np.int32),)),
    }[how]


@pytest.mark.parametrize("value", SPELLINGS)
@pytest.mark.parametrize("how", ["selected", "added", "input", "chosen_by_input", "computed", "subtracted"])
def test_every_spelling(how, value):
    if np.isinf(value) and how in ("computed", "subtracted"):
        pytest.skip("0 times infinity is NaN in float, too")
    score, masks = _spelled(how, CAUSAL, value)
    stages = _checked(_attention(score), Q, K, V, *masks)
    # Of all that is stored, nothing is far beyond the scores but masks on their own.
    assert all(most <= 1e4 for most in _ranges(stages).values())


@pytest.mark.parametrize("kept", KEPT)
def test_every_kind(kept):
    score, masks = _spelled("added", KEPT[kept], -1e9)
    stages = _checked(_attention(score), Q, K, V, *masks)
    scores = np.einsum("bqd,bkd->bqk", Q, K) / np.sqrt(32)
    (product,) = (m for key, m in _ranges(stages).items() if key == "dot_general#0")
    assert product == pytest.approx(np.abs(scores).max(), rel=1e-5)


@pytest.mark.parametrize("value", SPELLINGS)
def test_a_bias_and_a_mask_in_one_array(value):
    bias = RNG.normal(size=(24, 24)).astype(np.float32)
    both = np.where(CAUSAL, bias, np.float32(value))
    _checked(_attention(lambda s: s + both), Q, K, V)
    if value <= -masks.MASK:
        # An input of -1e4 is a number: only what the model itself has can be told for a mask so near.
        _checked(_attention(lambda s, m: s + m), Q, K, V, both)


def test_a_maximum_of_what_is_masked():
    """The other way round: large positive numbers lose against a minimum. Brought near they still cost some range."""
    stages = _checked(lambda w, x: jnp.min(jnp.where(x > 0, x, np.float32(np.inf)), axis=1), Q, least=30)
    assert all(most < 1e4 for most in _ranges(stages).values())


# What is no mask


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinity_that_a_product_reads_is_refused_by_name(value):
    def fun(weights, x):
        with jax.named_scope("layer"):
            return jnp.where(x > 1.0, np.float32(value), x).reshape(-1, 32) @ weights

    with pytest.raises(CalibrationError, match=r"gives infinity in layer/select_n#0 .*test_masks\.py"):
        fuzz.compile_stages(fun, np.eye(32, dtype=np.float32), [Q])


def test_large_numbers_that_a_product_reads_widen_its_range():
    fun = lambda w, x: jnp.where(x > 2.0, np.float32(-1e9), x) @ w
    stages = fuzz.compile_stages(fun, np.eye(32, dtype=np.float32), [Q])
    assert _ranges(stages)["select_n#0"] == 1e9


@pytest.mark.parametrize("fun", [lambda w, x: x @ w, lambda w, x: jnp.sum(x, axis=1), lambda w, x: jnp.tanh(x * 1e-9)])
def test_inputs_that_are_large_themselves(fun):
    x = Q * np.float32(2.0**30)
    stages = fuzz.compile_stages(fun, np.eye(32, dtype=np.float32), [x])
    assert _ranges(stages)["input:x0"] == np.abs(x).max()


# Numbers


def test_brought_near():
    near = lambda *values, **options: masks.brought_near(np.array(values, np.float32), **options).tolist()
    assert near(1.0, -2.0, -1e9) == [1.0, -2.0, -264.0]
    assert near(3.0, -np.inf, SMALLEST) == [3.0, -268.0, -268.0]
    assert near(0.0, -1e9) == [0.0, -1e4]
    assert near(1.0, 1e9) == [1.0, 260.0]
    assert near(1.0, 1e9, above=False) == [1.0, 1e9]
    # Numbers in between say that all are numbers.
    assert near(-1e9, -3e7, 1.0) == [-1e9, -3e7, 1.0]
    assert near(1.0, -9e7) == [1.0, -9e7]
    assert np.isnan(near(np.nan, -1e9)[0])


def test_a_masked_probability_is_zero():
    """exp(-256) is 0 in int16 whatever the row's largest score."""
    array = np.array([50.0, 49.0, -np.inf], np.float32)
    near = masks.brought_near(array)
    assert np.exp(near[2] - near[0]) * 2**15 < 0.5


@pytest.mark.parametrize("large", [-1e4, -1e9, -1e30, float(np.finfo(np.float32).min)])
def test_a_mask_of_zeros_and_ones_as_floats(large):
    """`(1 - mask) * large`: where the mask is 1 nothing is added, not even a rounding error times `large`."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 8, 16)).astype(np.float32)
    mask = (generator.random((2, 1, 8)) > 0.3).astype(np.float32)

    def fun(x, mask):
        scores = x @ x.transpose(0, 2, 1) + (np.float32(1) - mask) * np.float32(large)
        return jax.nn.softmax(scores, -1) @ x

    qmodel = qc.quantize(fun, [(x, mask)], strict=True, verify="types")
    assert sqnr_db([np.asarray(fun(x, mask))], [np.asarray(qmodel(x, mask))]) > 35


def test_masks_beside_tiny_scores():
    """No integer code of their step is far enough below scores of a millionth."""
    x = 1e-6 * RNG.normal(size=(2, 8, 8)).astype(np.float32)
    kept = np.tril(np.ones((8, 8), bool))
    fun = lambda p, x: jax.nn.softmax(jnp.where(kept, x, np.float32(-1e9)), -1)
    qmodel = qc.quantize(fun, [x], params={}, verify="types", strict=True)
    np.testing.assert_allclose(qmodel(x), fun({}, x), atol=1e-4)  # int16 codes of numbers up to one
    assert np.all(np.asarray(qmodel(x))[:, ~kept] == 0)
