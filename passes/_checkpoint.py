"""Finished layers in files, so that an interrupted run goes on behind them.

A file's name is a hash of all that decides its contents (the program with its weights, the samples, the options) with
the layer's id in it, so that a folder may hold those of many runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qcompiler.errors import SerializationError
from qcompiler.ir.program import Program


class Checkpoint:
    """The layers of one run.

    Args:
      options: a dataclass with a field `checkpoint`: the folder, or None to keep nothing.
      real, simulated: the programs that are walked.
      batches: the samples.
    """

    def __init__(self, options: Any, real: Program, simulated: Program, batches: Sequence[Sequence[Any]]) -> None:
        self._folder = None if options.checkpoint is None else Path(options.checkpoint)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._hash = hashlib.sha256()
        self._hash.update(repr(dataclasses.replace(options, checkpoint=None)).encode())
        for program in (real, simulated):
            # Functions that parameters hold print with their address.
            self._hash.update(re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)).encode())
            for name, array in program.weights.items():
                self._add(name, array)
        for batch in batches:
            for array in batch:
                self._add("", array)

    def _add(self, name: str, array: Any) -> None:
        plain = jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array
        plain = np.asarray(plain)
        self._hash.update(f"{name} {plain.dtype} {plain.shape} ".encode())
        self._hash.update(np.ascontiguousarray(plain).tobytes())

    def _path(self, layer: str) -> Path:
        assert self._folder is not None
        own = self._hash.copy()
        own.update(layer.encode())
        return self._folder / f"{own.hexdigest()[:32]}.npz"

    def load(self, layer: str) -> dict[str, np.ndarray] | None:
        """What was saved of a layer, or None.

        Raises:
          SerializationError: the file is damaged.
        """
        if self._folder is None:
            return None
        path = self._path(layer)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except FileNotFoundError:
            return None
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise SerializationError(f"{path} is damaged ({error}); delete it, and {layer} is rounded again") from error

    def save(self, layer: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keeps a finished layer: its file is there whole, or not at all."""
        if self._folder is None:
            return
        path = self._path(layer)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, **arrays)
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, path)
