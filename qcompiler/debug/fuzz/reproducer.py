"""Programs in files: `NAME.json` for the steps, `NAME.npz` beside it for the arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.debug.fuzz.cases import RECIPES, Case, Step
from qcompiler.debug.fuzz.steps import STEPS
from qcompiler.errors import SerializationError

_FORMAT = "qcompiler fuzz program 1"


def save(case: Case, path: str | Path, promise: str = "") -> Path:
    """Writes a program.

    Args:
      case: the program.
      path: of the JSON file; the arrays go beside it.
      promise: what it broke.

    Returns:
      The path of the JSON file.
    """
    path = Path(path).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": _FORMAT,
        "promise": promise,
        "origin": case.origin,
        "recipe": case.recipe,
        "thorough": case.thorough,
        "steps": [{"name": s.name, "reads": s.reads, "options": s.options} for s in case.steps],
        "results": case.results,
        "inputs": len(case.inputs),
        "text": str(case).splitlines(),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    arrays = {f"input/{k}": x for k, x in enumerate(case.inputs)}
    arrays |= {f"weight/{k}/{name}": w for k, held in case.weights.items() for name, w in held.items()}
    with path.with_suffix(".npz").open("wb") as file:
        np.savez(file, **arrays)
    return path


def load(path: str | Path) -> tuple[Case, str]:
    """The program of a JSON file and of the arrays beside it, and what it broke.

    Raises:
      SerializationError: a file is missing, or is no such program.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise SerializationError(f"{path} is {content['format']!r}; this version reads {_FORMAT!r}")
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            inputs = [arrays[f"input/{k}"] for k in range(content["inputs"])]
            weights: dict[str, dict[str, np.ndarray]] = {}
            for key in (k for k in arrays.files if k.startswith("weight/")):
                _, step, name = key.split("/")
                weights.setdefault(step, {})[name] = arrays[key]
        steps = [Step(s["name"], tuple(s["reads"]), _tuples(s["options"])) for s in content["steps"]]
        unknown = {s.name for s in steps if s.name not in STEPS} | ({content["recipe"]} - set(RECIPES))
        if unknown:
            raise SerializationError(f"{path} uses {', '.join(sorted(unknown))}, which this version does not know")
        origin, recipe, thorough = (content[k] for k in ("origin", "recipe", "thorough"))
        return Case(origin, recipe, steps, weights, inputs, content["results"], thorough), content["promise"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SerializationError(f"{path} is no program of the fuzzer: {type(error).__name__}: {error}") from error


def _tuples(value: Any) -> Any:
    """JSON has lists where options have tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
