"""JSON files that people write and edit: strict when read, whole or not at all when written."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qcompiler.errors import RecipeError
from qcompiler.names import nearest


def read(path: str | os.PathLike[str]) -> Any:
    """The data in a JSON file.

    Raises:
      RecipeError: it is no JSON, or holds NaN, infinity, or one key twice; the line is named.
      OSError: the file cannot be read.
    """

    def refuse(constant: str) -> NoReturn:
        raise RecipeError(f"{path} holds {constant}, which is no number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise RecipeError(f"{path} has the key {key!r} twice")
            found[key] = value
        return found

    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text, parse_constant=refuse, object_pairs_hook=pairs)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path} is no JSON: {error}") from error


def write(path: str | os.PathLike[str], data: Any) -> None:
    """Writes JSON; `path` holds the old file or the whole new one at any time.

    Raises:
      RecipeError: a number is NaN or infinite.
      OSError: the file cannot be written.
    """
    try:
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fields_of(cls: type, data: Any, where: str) -> dict[str, Any]:
    """The arguments of a dataclass from an object of JSON, which has lists where the dataclass has tuples.

    Raises:
      RecipeError: it is no object, or has a key that is no field.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: the fields of a {cls.__name__} are an object, got {data!r}")
    check_keys(data, [f.name for f in dataclasses.fields(cls)], where)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises `RecipeError` for a key that is not known; names the nearest that is."""
    known = sorted(known)
    for key in given:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(key, known, 1)}")
