"""Recipes as JSON files that people read, edit, compare and keep beside a model; nothing in one is executed.

    {"qcompiler": "recipe", "version": 1, "recipe": {
      "weight": {"$QuantType": "int4sn"},
      "rules": [{"$Rule": {"path": {"$regex": "block_(0|11)/.*"}, "activation": {"$QuantType": "int16s"}}}]}}

`$Name` stands for an object of a class in a table here, by its fields; those that a file leaves out have their
defaults. A quantized type is its name: bits, `s` for symmetric, `n` for a narrow range, `[axis/block]`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompiler import json_files
from qcompiler.candidates import Candidate
from qcompiler.errors import QuantizationError, RecipeError
from qcompiler.names import nearest
from qcompiler.numerics import ranges
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.fixed_range import FixedRange
from qcompiler.numerics.types import QuantType
from qcompiler.precision import Assignment, Choice, Precision
from qcompiler.range_choice import OutputError, Tiers
from qcompiler.recipe import GRANULARITIES, Granularity, Recipe, Rule, Supergroup
from qcompiler.rounding import GPTQ, AdaRound, SequentialMSE

#: Raised whenever older readers could misread what newer writers write.
VERSION = 1

#: Name in files -> class. All are dataclasses of what a file can hold.
CLASSES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        Encoding,
        FixedRange,
        Granularity,
        Rule,
        Supergroup,
        ranges.Entropy,
        ranges.MSE,
        ranges.MinMax,
        ranges.MovingAverage,
        ranges.Percentile,
        OutputError,
        Tiers,
        Candidate,
        Precision,
        Assignment,
        Choice,
        AdaRound,
        GPTQ,
        SequentialMSE,
    )
}


def register_classes(*classes: type) -> None:
    """Makes dataclasses known to files by their names, as values of a recipe's fields.

    Raises:
      TypeError: a class is no dataclass.
    """
    for cls in classes:
        if not dataclasses.is_dataclass(cls):
            raise TypeError(f"{cls.__name__} is no dataclass")
        CLASSES[cls.__name__] = cls


_TYPE = re.compile(r"int(?P<bits>\d+)(?P<s>s?)(?P<n>n?)(\[(?P<axis>\d+(/\d+)?(,\d+(/\d+)?)*)\])?")


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes a recipe; see `Recipe.save`."""
    fields = {f.name: _written(getattr(recipe, f.name), f.name) for f in dataclasses.fields(recipe)}
    json_files.write(path, {"qcompiler": "recipe", "version": VERSION, "recipe": fields})


def load(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe; see `Recipe.load`."""
    document = json_files.read(path)
    if not isinstance(document, dict) or document.get("qcompiler") != "recipe":
        raise RecipeError(f"{path} is no recipe: it does not start with {{'qcompiler': 'recipe', ...}}")
    if document.get("version") != VERSION:
        raise RecipeError(f"{path} is a recipe of version {document.get('version')!r}; this one reads {VERSION}")
    json_files.check_keys(document, ("qcompiler", "version", "recipe"), str(path))
    return _made(Recipe, document.get("recipe"), f"{path}: recipe")


def _written(value: Any, where: str) -> Any:
    """A value as JSON."""
    if isinstance(value, QuantType):
        return {"$QuantType": value.name}
    if isinstance(value, re.Pattern):
        if value.flags != re.compile("").flags:
            raise RecipeError(
                f"{where}: a file holds no flags of regular expressions; write (?i) into {value.pattern!r}"
            )
        return {"$regex": value.pattern}
    if isinstance(value, Granularity) and value in GRANULARITIES.values():
        return next(name for name, known in GRANULARITIES.items() if known == value)
    if dataclasses.is_dataclass(value) and CLASSES.get(type(value).__name__) is type(value):
        fields = [f for f in dataclasses.fields(value) if not isinstance(value, Rule) or _is_set(value, f)]
        return {f"${type(value).__name__}": {f.name: _written(getattr(value, f.name), where) for f in fields}}
    if isinstance(value, np.ndarray | np.generic):
        return {"$array": np.asarray(value).tolist(), "dtype": str(np.asarray(value).dtype)}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _written(v, f"{where}[{k!r}]") for k, v in value.items()}
        return {"$pairs": [[_written(k, where), _written(v, where)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return [_written(v, f"{where}[{k}]") for k, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise RecipeError(f"{where}: {value!r} cannot be written to a recipe file")


def _is_set(value: Any, field: dataclasses.Field[Any]) -> bool:
    now = getattr(value, field.name)
    return isinstance(now, Encoding) or now != field.default


def _read(value: Any, where: str) -> Any:
    """The value behind JSON."""
    if isinstance(value, list):
        return tuple(_read(v, f"{where}[{k}]") for k, v in enumerate(value))
    if not isinstance(value, dict):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {k: _read(v, f"{where}[{k!r}]") for k, v in value.items()}
    json_files.check_keys(value, (tag, "dtype") if tag == "$array" else (tag,), where)
    content = value[tag]
    if tag == "$QuantType":
        return _type(content, where)
    if tag == "$regex":
        return _regex(content, where)
    if tag == "$array":
        return _array(content, value.get("dtype"), where)
    if tag == "$pairs":
        if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
            raise RecipeError(f"{where}: $pairs is a list of [key, value]")
        return {_read(k, where): _read(v, f"{where}[{k!r}]") for k, v in content}
    if tag[1:] not in CLASSES:
        known = [f"${name}" for name in (*CLASSES, "QuantType")]
        raise RecipeError(f"{where}: nothing is called {tag!r}{nearest(tag, known, 1)}")
    return _made(CLASSES[tag[1:]], content, where)


def _made(cls: type, fields: Any, where: str) -> Any:
    """An object of a class from its fields in JSON."""
    if not isinstance(fields, dict):
        raise RecipeError(f"{where}: the fields of a {cls.__name__} are an object, got {fields!r}")
    json_files.check_keys(fields, [f.name for f in dataclasses.fields(cls)], where)
    values = {name: _read(value, f"{where}.{name}") for name, value in fields.items()}
    try:
        return cls(**values)
    except (QuantizationError, TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error


def _type(text: Any, where: str) -> QuantType:
    found = _TYPE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise RecipeError(f"{where}: a quantized type is written as 'int8', 'int4sn' or 'int8s[3]', got {text!r}")
    dims = [part.split("/") for part in (found["axis"] or "").split(",") if part]
    sizes = tuple(int(part[1]) if len(part) == 2 else 1 for part in dims)
    axis = tuple(int(part[0]) for part in dims)
    blocks = sizes if any(n > 1 for n in sizes) else ()
    try:
        return QuantType(int(found["bits"]), bool(found["s"]), axis, bool(found["n"]), blocks)
    except QuantizationError as error:
        raise RecipeError(f"{where}: {error}") from error


def _regex(text: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise RecipeError(f"{where}: {text!r} is no regular expression: {error}") from error


def _array(content: Any, dtype: Any, where: str) -> np.ndarray:
    if dtype not in ("float32", "int32"):
        raise RecipeError(f"{where}: arrays are of float32 (scales) or int32 (zero points), not {dtype!r}")
    try:
        array = np.asarray(content, np.float64)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: an array is numbers in lists of equal lengths: {error}") from error
    if dtype == "int32" and not (np.isfinite(array) & (np.rint(array) == array) & (np.abs(array) < 2.0**31)).all():
        raise RecipeError(f"{where}: int32 holds no {array.ravel()[0]}")
    return array.astype(dtype)
