"""Arrays kept on disk between runs: what took minutes to train is trained once.

A file is an `.npz` of named arrays with notes as JSON; nothing in it is executed when it is read. It is written beside
its place and moved there, so that a reader meets all of it or none. Its name holds a hash of what decides its contents.
"""

import ast
import hashlib
import inspect
import json
import os
import sys
import tempfile
import types
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

VARIABLE = "QCOMPILER_CACHE"
_NOTES = "__notes__"


class CacheError(RuntimeError):
    """A file of the cache is damaged or holds something else than its reader expects."""


def cache_folder() -> Path:
    """The folder in `QCOMPILER_CACHE`; without it `qcompiler` in the user's cache folder of the platform."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "qcompiler"


def key_of(settings: Mapping[str, Any], code: Sequence[types.ModuleType | types.FunctionType]) -> str:
    """A hash of settings and of what code says: 16 hexadecimal digits.

    Comments, docstrings and formatting of the code do not count, nor does the version of Python.

    Args:
      settings: JSON values.
      code: modules and functions at the top of a module whose source decides the result.
    """
    sources = {item.__name__: _structure(ast.parse(inspect.getsource(item))) for item in code}
    text = json.dumps([settings, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _structure(node: Any) -> Any:
    """A syntax tree as JSON values, without docstrings and without empty fields, which versions of Python differ in."""
    if isinstance(node, list):
        return [_structure(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if documented and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    kept = {name: _structure(value) for name, value in fields.items() if value is not None and value != []}
    return {type(node).__name__: kept}


def save(path: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    """Writes arrays and notes (JSON values), atomically; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.savez(file, **arrays, **{_NOTES: np.array(json.dumps(notes))})
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and notes that `save` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      CacheError: the file is damaged, or `save` did not write it.
    """
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("no archive of arrays")
            arrays = {name: archive[name] for name in archive.files}
        notes = json.loads(str(arrays.pop(_NOTES)))
    except FileNotFoundError:
        raise
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise CacheError(f"{path} is damaged ({error}); delete it, and what it holds is made again") from error
    return arrays, notes


def arrays_of(node: Any) -> dict[str, np.ndarray]:
    """Every variable of an nnx module or optimizer, by its path with slashes."""
    return {"/".join(map(str, path)): np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(node))}


def restore(node: Any, arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Sets every variable of an nnx module or optimizer, in place.

    Args:
      node: has variables of these paths, shapes and dtypes.
      arrays: of `arrays_of`.
      path: where they were read, for the message.

    Raises:
      CacheError: names, shapes or dtypes are others.
    """
    flat = {"/".join(map(str, parts)): (parts, v) for parts, v in nnx.to_flat_state(nnx.state(node))}
    described = lambda array: (tuple(array.shape), str(array.dtype))
    found = {name: described(array) for name, array in arrays.items()}
    wanted = {name: described(v.get_value()) for name, (_, v) in flat.items()}
    if found != wanted:
        differing = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        first = differing[0]
        raise CacheError(
            f"{path} does not fit {type(node).__name__}: {len(differing)} variables differ, first {first}: "
            f"{found.get(first, 'missing')} in the file, {wanted.get(first, 'missing')} in the model"
        )
    state = nnx.from_flat_state([(parts, v.replace(jnp.asarray(arrays[n]))) for n, (parts, v) in flat.items()])
    nnx.update(node, state)
