import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qcompiler.models.lstm import RecurrentLM


def tokens_of(n=2, length=9):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (n, length)), jnp.int32)


def made(cell, depth=2):
    return RecurrentLM(16, depth, cell=cell, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("depth", [1, 2])
def test_reading_in_parts_gives_the_logits_of_the_whole(cell, depth):
    model, tokens = made(cell, depth), tokens_of()
    whole = model(tokens)
    assert whole.shape == (2, 9, 256) and whole.dtype == jnp.float32
    state, parts = model.initial_state(2), []
    for part in (tokens[:, :4], *(tokens[:, i : i + 1] for i in range(4, 9))):
        logits, state = model.step(part, state)
        parts.append(logits)
    # The same sums in the same order, but for batched matmuls of another shape.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_time_is_a_scan_and_a_token_sees_only_what_is_before_it(cell):
    model, tokens = made(cell), tokens_of()
    graph, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens)
    assert str(jaxpr).count(" scan[") == 2
    differs = np.abs(model(tokens.at[:, 5].add(1)) - model(tokens)).max(axis=(0, 2))
    assert np.all(differs[:5] == 0) and np.all(differs[5:] > 1e-6)


def test_an_lstm_is_the_published_equations():
    """One layer against NumPy: c = f c + i g, h = o tanh(c), gates in the order i, f, g, o."""
    model, tokens = made("lstm", 1), tokens_of()
    cell = model.layers[0].cell
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    wx, wh, b = (np.asarray(v[...]) for v in (cell.dense_i.kernel, cell.dense_h.kernel, cell.dense_h.bias))
    c = h = np.zeros((2, 16), np.float32)
    for t in range(tokens.shape[1]):
        x = np.asarray(model.embedding.embedding[...])[np.asarray(tokens[:, t])]
        i, f, g, o = np.split(x @ wx + h @ wh + b, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    expected = h @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(model(tokens)[:, -1], expected, atol=1e-5)  # float32, nine steps


def test_other_cells_are_refused():
    with pytest.raises(ValueError, match="cell must be one of lstm, gru, got 'rnn'"):
        made("rnn")
