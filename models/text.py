"""Text that every Python carries: the sources of its standard library, as bytes to predict and functions to find.

Files are taken in the order of their paths and are training or held-out data as a whole. Other versions of Python have
other sources: `fingerprint` tells them apart.
"""

import ast
import dataclasses
import functools
import hashlib
import math
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")

#: Folders without code to learn from: what is installed besides, tests, tables, copies of other folders.
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
#: One file of so many is held out.
_HELD_OUT_SHARE = 16


def _digest(*parts: str | int) -> int:
    """A number that depends on the parts alone, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


@functools.cache
def _files(root: Path) -> tuple[tuple[str, bytes], ...]:
    """Path below the root with slashes, and contents, of every source file, in the order of the paths."""
    paths: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise FileNotFoundError(f"{root} holds no sources: this Python came without its standard library's")
    return tuple(sorted((path.relative_to(root).as_posix(), path.read_bytes()) for path in paths))


def _standard_library() -> tuple[tuple[str, bytes], ...]:
    return _files(Path(sysconfig.get_paths()["stdlib"]))


def _is_held_out(name: str) -> bool:
    return _digest("held out", name) % _HELD_OUT_SHARE == 0


@functools.cache
def corpus(part: Part) -> np.ndarray:
    """The sources of one part, one file behind the other: `uint8[bytes]`, read-only.

    Raises:
      ValueError: no such part.
      FileNotFoundError: this Python has no sources.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    files = [contents for name, contents in _standard_library() if _is_held_out(name) == (part == "held_out")]
    return np.frombuffer(b"".join(files), np.uint8)


@functools.cache
def fingerprint() -> str:
    """A hash of all sources and of their split: 16 hexadecimal digits."""
    return hashlib.sha256(b"".join(hashlib.sha256(corpus(part)).digest() for part in PARTS)).hexdigest()[:16]


def sequences(start: int, count: int, *, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Training sequences `start` to `start + count - 1` of an endless stream: bytes, and the bytes behind them.

    Args:
      start: sequence `index` is the same at every call and in every batch.
      count: how many.
      length: bytes of a sequence.
      seed: other seeds give other sequences.

    Returns:
      `(tokens, following)`, `int32[count, length]` each: `following[:, t]` is to be predicted from `tokens[:, :t + 1]`.

    Raises:
      ValueError: a negative index, or sequences longer than the corpus.
    """
    text = corpus("train")
    if start < 0 or count < 0 or not 0 < length < len(text):
        raise ValueError(f"sequences {start} to {start + count} of {length} bytes are not in {len(text)} bytes")
    places = [_digest(seed, index) % (len(text) - length) for index in range(start, start + count)]
    windows = text[np.array(places, np.int64)[:, None] + np.arange(length + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def held_out(count: int, *, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of files that no training reads, spread evenly over them; as `sequences` gives them.

    Raises:
      ValueError: there are fewer bytes than so many sequences take.
    """
    text = corpus("held_out")
    if count < 1 or length < 1 or count * (length + 1) > len(text):
        raise ValueError(f"{count} sequences of {length} bytes are not in {len(text)} bytes")
    places = np.arange(count) * (len(text) // count)
    windows = text[places[:, None] + np.arange(length + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def bits_per_byte(
    predict: Callable[[np.ndarray], jax.Array], tokens: np.ndarray, following: np.ndarray, *, batch_size: int = 16
) -> float:
    """The mean of -log2 of the probability of the byte that follows; `2 ** bits_per_byte` is the perplexity.

    Args:
      predict: maps `int32[batch_size, s]` to logits `float32[batch_size, s, 256]`.
      tokens, following: `int32[n, s]`, of `held_out`.
      batch_size: sequences of a call; divides `n`, so that all calls have one shape.

    Raises:
      ValueError: shapes differ, or `batch_size` does not divide `n`.
    """
    if tokens.shape != following.shape or len(tokens) == 0 or len(tokens) % batch_size:
        raise ValueError(
            f"tokens {tokens.shape} and following {following.shape} must agree, in batches of {batch_size}"
        )
    total = 0.0
    for first in range(0, len(tokens), batch_size):
        rows = slice(first, first + batch_size)
        logits = np.asarray(predict(tokens[rows]), np.float64)
        logits = logits - logits.max(axis=-1, keepdims=True)
        of_byte = np.take_along_axis(logits, following[rows][..., None], axis=-1)[..., 0]
        total += float(np.sum(np.log(np.sum(np.exp(logits), axis=-1)) - of_byte))
    return total / tokens.size / math.log(2)


# Retrieval


@dataclasses.dataclass(frozen=True)
class Function:
    """A documented function.

    Attributes:
      name: file and qualified name, such as `json/encoder.py:JSONEncoder.encode`.
      description: first paragraph of its docstring, on one line.
      source: its code without the docstring.
    """

    name: str
    description: str
    source: str


@functools.cache
def functions() -> tuple[Function, ...]:
    """The functions of the standard library that a description can find, in an order that looks random.

    Descriptions have 6 to 60 words and are unlike each other; code has at least two lines behind its head.
    """
    found: dict[str, Function] = {}
    for path, contents in _standard_library():
        try:
            text = contents.decode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes, which are not our files' to mend
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue  # sources of other encodings, and files that are wrong on purpose
        lines = text.split("\n")  # `splitlines` also ends lines at form feeds, which Python's parser does not
        for name, node in _definitions(tree, ()):
            function = _documented(f"{path}:{name}", node, lines)
            if function is not None:
                found.setdefault(function.description.lower(), function)
    return tuple(sorted(found.values(), key=lambda f: _digest(f.name)))


def _definitions(node: ast.AST, outer: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Qualified name and node of every function of a module and of its classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, (*outer, child.name))
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield ".".join((*outer, child.name)), child


def _documented(name: str, node: Any, lines: list[str]) -> Function | None:
    """None where there is no docstring, one of another length, or too little code."""
    docstring = ast.get_docstring(node)
    if docstring is None:
        return None
    description = " ".join(docstring.split("\n\n")[0].split())
    first = node.body[0]
    head, code = lines[node.lineno - 1 : first.lineno - 1], lines[first.end_lineno : node.end_lineno]
    if not 6 <= len(description.split()) <= 60 or len(code) < 2:
        return None
    # Not `textwrap.dedent`: strings over several lines may start further left than the code around them.
    indent = node.col_offset
    kept = [line[indent:] if line[:indent].isspace() else line for line in head + code]
    return Function(name, description, "\n".join(kept))


def recall_at_1(queries: np.ndarray, documents: np.ndarray) -> float:
    """The share of queries that are nearest to the document of their own row, 0 to 1.

    Args:
      queries, documents: vectors of length 1, `float[n, d]`; nearness is their scalar product.

    Raises:
      ValueError: shapes differ.
    """
    if queries.shape != documents.shape or queries.ndim != 2 or not len(queries):
        raise ValueError(f"queries {queries.shape} and documents {documents.shape} must be pairs of vectors")
    nearest = np.argmax(np.asarray(queries) @ np.asarray(documents).T, axis=-1)
    return float(np.mean(nearest == np.arange(len(queries))))
