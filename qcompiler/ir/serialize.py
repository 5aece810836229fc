"""Programs in files: primitive names and parameters as JSON, arrays beside it, one zip; nothing in it is executed.

    save(program, "after_partition.zip");  program = load("after_partition.zip")

`program.json` holds the equations in order, with operands as positions (weights, inputs, then results), types, scopes
and the user's source lines; `arrays/<n>.npy` hold the weights and the statistics. `load` binds each equation again
inside `jax.make_jaxpr`, and then checks that what came out is what the file says. Only primitives and parameter classes
in tables of this process can come out of a file; none is imported by a name in it.

What does not survive: gradient rules of `custom_jvp`/`custom_vjp` calls inside `scan`/`while`/`cond` bodies (the calls
come back inlined), shardings, and which calls led to a user's line (only that line is kept).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import io
import json
import os
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax

from qcompiler.errors import QuantizationError, SerializationError
from qcompiler.ir import _compat
from qcompiler.ir._serial_decode import Reader
from qcompiler.ir._serial_encode import Writer
from qcompiler.ir._serial_names import CLASSES as _CLASSES
from qcompiler.ir._serial_names import PRIMITIVES as _PRIMITIVES
from qcompiler.ir.program import Program
from qcompiler.numerics import ranges
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.types import QuantType

#: Raised whenever older readers could misread what newer writers write.
FORMAT = 1
_DOCUMENT = "program.json"
_ARRAY = "arrays/{}.npy"
#: The same bytes for the same program, whenever it is written.
_TIME = (1980, 1, 1, 0, 0, 0)


def register_primitives(primitives: Iterable[_compat.Primitive]) -> None:
    """Makes primitives known to `save` and `load` by their names."""
    _PRIMITIVES.update((p.name, p) for p in primitives)


def register_classes(*classes: type) -> None:
    """Makes enums, dataclasses and named tuples known, by their names, as parameters and notes.

    Raises:
      TypeError: a class is none of these.
    """
    for cls in classes:
        if not (issubclass(cls, enum.Enum) or dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")):
            raise TypeError(f"{cls.__name__} is no enum, dataclass or named tuple")
        _CLASSES[cls.__name__] = cls


for _name in (
    "AccuracyMode ConvDimensionNumbers DotAlgorithm DotAlgorithmPreset FftType GatherDimensionNumbers GatherScatterMode"
    " Precision RaggedDotDimensionNumbers RandomAlgorithm RoundingMethod ScatterDimensionNumbers Tolerance"
).split():
    with contextlib.suppress(AttributeError, TypeError):  # some are plain classes, or missing, in some versions
        register_classes(getattr(lax, _name))
register_classes(QuantType, Encoding, FixedRange, ranges.MinMax, ranges.MovingAverage, ranges.Percentile)
register_classes(ranges.MSE, ranges.Entropy)


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Writes `program` to one file; `path` holds the old file or the whole new one at any time.

    The same program gives the same bytes.

    Raises:
      SerializationError: the program holds something that a file cannot: a primitive or parameter of an unknown kind, a
        PRNG key, a pytree node other than dict, list, tuple and None. Nothing is written then.
      OSError: the file cannot be written.
    """
    writer = Writer()
    document = {"format": FORMAT, "jax": jax.__version__, **writer.program(program)}
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                info = zipfile.ZipInfo(_DOCUMENT, _TIME)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, text)
                for k, array in enumerate(writer.arrays):
                    with archive.open(zipfile.ZipInfo(_ARRAY.format(k), _TIME), "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, array, version=(1, 0), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `save` wrote.

    Ids, module paths, source lines, weights, statistics and notes are those of the saved program.

    Raises:
      SerializationError: the file is no program, is damaged, is of another format, or holds primitives or parameters
        that this version of JAX does not have.
      OSError: the file cannot be read.
    """
    document: Any = None
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            document = json.loads(archive.read(_DOCUMENT))
            if document["format"] != FORMAT:
                raise SerializationError(f"it has format {document['format']}; this version reads {FORMAT}")
            return Reader(document, functools.partial(_read_array, archive)).program()
    except OSError:
        raise
    except QuantizationError as error:
        raise SerializationError(f"cannot load {os.fspath(path)}: {error}{_versions(document)}") from error
    except Exception as error:  # whatever a damaged file makes zipfile, json, numpy or jax say
        detail = f"{type(error).__name__}: {error}"
        raise SerializationError(
            f"{os.fspath(path)} is damaged or no program: {detail}{_versions(document)}"
        ) from error


def _read_array(archive: zipfile.ZipFile, index: int) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(archive.read(_ARRAY.format(index))), allow_pickle=False)


def _versions(document: Any) -> str:
    written = document.get("jax") if isinstance(document, dict) else None
    return f" (written by jax {written}, this is jax {jax.__version__})" if written else ""
