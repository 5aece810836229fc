"""What the exporter to ONNX finds in a transformer, and that what it writes computes the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qcompiler as qc
from benchmarks import onnx_patterns
from qcompiler import pipeline
from qcompiler.debug.report import sqnr_db
from qcompiler.models import bert, vit


def folded(model, *inputs, **options):
    program = qc.trace(model, *inputs, **options).program
    for name in ("simplify", "fold_norms"):
        program = pipeline.PASSES[name](program, None)
    return program


def found(program, primitive, match):
    return [m for e in program.eqns if e.primitive.name == primitive and (m := match(program, e)) is not None]


def test_a_softmax_is_found_whatever_its_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    for axis in range(3):
        program = folded(lambda x, axis=axis: jax.nn.softmax(x * 2.0, axis=axis), x)
        ((scores, at),) = found(program, "div", onnx_patterns.softmax_of)
        assert at == axis and scores.aval.shape == x.shape


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.exp(x) / jnp.sum(jnp.exp(2 * x), axis=-1, keepdims=True),
        lambda x: x / jnp.sum(x, axis=-1, keepdims=True),
        lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), axis=(1, 2), keepdims=True),
    ],
)
def test_what_is_no_softmax_is_left_alone(function):
    program = folded(function, jnp.ones((2, 3, 3), jnp.float32))
    assert not found(program, "div", onnx_patterns.softmax_of)


def test_a_layer_norm_is_found_and_a_changed_one_is_not():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    norm = nnx.LayerNorm(8, epsilon=1e-3, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(1.0, 9.0)
    (match,) = found(folded(norm, x), "mul", onnx_patterns.layer_norm_of)
    assert match.epsilon == pytest.approx(1e-3)

    def other(x):  # The mean of the first half is taken off, the deviation is of all.
        mean = jnp.mean(x[..., :4], axis=-1, keepdims=True)
        variance = jnp.maximum(0.0, jnp.mean(x**2, axis=-1, keepdims=True) - mean**2)
        return (x - mean) * (jax.lax.rsqrt(variance + 1e-3) * jnp.arange(1.0, 9.0))

    assert not found(folded(other, x), "mul", onnx_patterns.layer_norm_of)


def run(program, *inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from benchmarks import onnx_export

    model = onnx_export.export(program, fixed=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {f"input{i}": np.asarray(x) for i, x in enumerate(inputs)}
    return {node.op_type for node in model.graph.node}, session.run(None, feed)[0]


def test_a_vit_with_a_stem():
    model = vit.ViT(16, 8, width=16, depth=1, heads=2, hidden=32, stem=(4, 8), classes=5, rngs=nnx.Rngs(0))
    model.eval()
    x = np.random.default_rng(0).uniform(size=(1, 16, 16, 3)).astype(np.float32)
    program = folded(model, x)
    ops, got = run(program, x)
    # Other orders of the same float32 sums, 2**-24 each.
    assert sqnr_db([np.asarray(model(x))], [got]) > 100
    assert {"Softmax", "LayerNormalization", "Erf", "MatMul", "Conv"} <= ops and not {"Exp", "Sqrt"} & ops


def test_a_sentence_encoder_with_a_mask():
    config = bert.BertConfig(vocabulary=50, width=16, depth=1, heads=2, hidden=32, positions=12)
    model = bert.SentenceEncoder(config)
    tokens = np.random.default_rng(0).integers(0, 50, (1, 12)).astype(np.int32)
    mask = (np.arange(12)[None] < 7).astype(np.int32)
    variables = model.init(jax.random.key(0), tokens, mask)
    ops, got = run(folded(model, tokens, mask, variables=variables), tokens, mask)
    # As above.
    assert sqnr_db([np.asarray(model.apply(variables, tokens, mask))], [got]) > 100
    assert {"Gather", "Where", "Softmax", "LayerNormalization"} <= ops


def test_a_bias_is_its_convolutions():
    conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(4.0)
    x = np.random.default_rng(0).uniform(size=(1, 8, 8, 3)).astype(np.float32)
    ops, got = run(folded(conv, x), x)
    # As above.
    assert sqnr_db([np.asarray(conv(x))], [got]) > 100
    assert "Add" not in ops


def test_an_open_batch_says_what_it_cannot_move():
    pytest.importorskip("onnx")
    from benchmarks import onnx_export
    from benchmarks.onnx_graph import NoOnnxRule

    program = folded(lambda x: x.reshape(6, 4) * 2.0, np.ones((2, 3, 4), np.float32))
    with pytest.raises(NoOnnxRule, match="moves the batch axis"):
        onnx_export.export(program)
