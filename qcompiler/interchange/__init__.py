"""Encodings of other tools: `load` makes a recipe of such a file, `save` writes those of a quantized model.

    qmodel.export_encodings("model.encodings", format="aimet2")
    recipe = qc.interchange.load("model.encodings")          # the same integers, bit for bit

Names in a file are value ids (`input:x`, `stem/conv_general_dilated#0`) and names of weights as the program holds them
(`print(qmodel.program)`), or those of another program, with `names` from ours to theirs.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from qcompiler import json_files
from qcompiler.errors import RecipeError
from qcompiler.interchange import aimet, qnn
from qcompiler.interchange.collecting import Encodings as Encodings
from qcompiler.interchange.collecting import encodings_of as encodings_of
from qcompiler.ir import patterns
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType
from qcompiler.recipe import Recipe, Supergroup

#: Name of a format -> what makes a document of encodings, and encodings of a document.
FORMATS: dict[str, tuple[Callable[[Encodings], Any], Callable[[Any, str], Any]]] = {
    "aimet2": (aimet.document, aimet.parse),
    "qnn": (qnn.document, qnn.parse),
}


def save(
    encodings: Encodings,
    path: str | os.PathLike[str],
    format: str = "aimet2",
    names: Mapping[str, str] | None = None,
) -> None:
    """Writes encodings as another tool reads them; the file is replaced whole or not at all.

    Args:
      encodings: of `encodings_of`.
      path: of the file.
      format: `aimet2` (AIMET's encodings 2.0.0) or `qnn` (`quantization_overrides.json`).
      names: our name -> the name in the file, for those that are called otherwise there.

    Raises:
      RecipeError: no such format, or two encodings would get one name.
      OSError: the file cannot be written.
    """
    write, _ = _format(format)
    json_files.write(path, write(encodings.renamed(names or {})))


def load(
    path: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
    format: str | None = None,
    base: Recipe | None = None,
) -> Recipe:
    """A recipe with the encodings, types and supergroups of a file.

    Args:
      path: of the file.
      names: our name -> the name in the file. Wildcards in the file match names in the file.
      format: see `save`; None: the file tells.
      base: what the file leaves open; the default recipe if None.

    Raises:
      RecipeError: the file is none of a known format, or an encoding in it cannot be; its tensor is named. Names that
        the model does not have are found when it is quantized.
      OSError: the file cannot be read.
    """
    document = json_files.read(path)
    _, parse = _format(_told(document, path) if format is None else format)
    encodings, groups = parse(document, str(path))
    found = _ours(encodings, names or {})
    supergroups = tuple(Supergroup(tuple(ops), fuse) for ops, fuse in groups)
    return dataclasses.replace(base or Recipe(), encodings=found, supergroups=supergroups)


def _format(name: str) -> tuple[Callable[[Encodings], Any], Callable[[Any, str], Any]]:
    if name not in FORMATS:
        raise RecipeError(f"unknown format {name!r} of encodings; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def _told(document: Any, path: str | os.PathLike[str]) -> str:
    keys = set(document) if isinstance(document, dict) else set()
    if "encodings" in keys:
        return "aimet2"
    if keys & {"activation_encodings", "param_encodings", "supergroups"}:
        return "qnn"
    raise RecipeError(
        f"{path} holds no encodings: neither `encodings` (AIMET 2.0.0) nor `activation_encodings` and "
        "`param_encodings` (QNN, AIMET before 2.0.0)"
    )


def _ours(
    encodings: Mapping[str, Encoding | QuantType], names: Mapping[str, str]
) -> dict[str | re.Pattern[str], Encoding | QuantType]:
    """The encodings by our names; those spelled out first, so that wildcards do not replace them."""
    by_theirs: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        by_theirs.setdefault(theirs, []).append(ours)
    found: dict[str | re.Pattern[str], Encoding | QuantType] = {}
    for exact in (True, False):
        for name, given in encodings.items():
            if (patterns.is_exact(name) or name in by_theirs) == exact:
                for key in _ours_of(name, by_theirs):
                    found.setdefault(key, given)
    return found


def _ours_of(name: str, by_theirs: Mapping[str, list[str]]) -> list[str | re.Pattern[str]]:
    if name in by_theirs:
        return list(by_theirs[name])
    if patterns.is_exact(name):
        start, at, which = name.rpartition("@")
        return [f"{ours}@{which}" for ours in by_theirs.get(start, ())] if at and start in by_theirs else [name]
    # No glob of a name starts with a dot and a star, but regular expressions do.
    try:
        pattern = re.compile(name) if name.startswith(".*") else name
    except re.error as error:
        raise RecipeError(f"the name {name!r} is no regular expression: {error}") from error
    matched = [ours for theirs, every in by_theirs.items() if patterns.matches(pattern, theirs) for ours in every]
    return [*matched] if matched else [pattern]
