"""JSON files that people write and edit: strict when read, whole or not at all when written."""

from __future__ import annotations

import difflib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from qcompiler.errors import RecipeError


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


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises `RecipeError` for a key that is not known; names the nearest that is."""
    known = sorted(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.0)
            raise RecipeError(f"{where}: unknown key {key!r}; nearest: {', '.join(map(repr, near))}")
