"""Dumps per pass: the program as text, the difference to the pass before, and a line of numbers.

DIR/00-trace.txt, DIR/01-simplify.txt, DIR/01-simplify.diff, ..., DIR/summary.json
"""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from qcompiler.ir.program import Program


class Dumper:
    """Writes a file per pass into a folder, and prints the passes asked for; does nothing without either.

    Args:
      folder: where to write; None: `QCOMPILER_DUMP_TO`, or nowhere.
      environment: heed the environment's variables.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, environment: bool = True) -> None:
        variables = os.environ if environment else {}
        folder = folder if folder is not None else variables.get("QCOMPILER_DUMP_TO") or None
        self.folder = Path(folder) if folder is not None else None
        self.print_after = frozenset(filter(None, variables.get("QCOMPILER_PRINT_AFTER", "").split(",")))
        self._before: list[str] = []
        self._summary: list[dict[str, Any]] = []
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def active(self) -> bool:
        """Whether a pass would be written or printed."""
        return self.folder is not None or bool(self.print_after)

    def after(self, name: str, program: Program, **numbers: Any) -> None:
        """Records the program after the pass `name`, with numbers for the summary."""
        if not self.active:
            return
        text = program.text()
        if name in self.print_after or "all" in self.print_after:
            print(f"# after {name}\n{text}", file=sys.stderr)
        if self.folder is None:
            return
        lines = text.splitlines(keepends=True)
        stem = f"{len(self._summary):02d}-{name}"
        write_text(self.folder / f"{stem}.txt", text)
        if self._before:
            diff = "".join(difflib.unified_diff(self._before, lines, "before", name, n=1))
            write_text(self.folder / f"{stem}.diff", diff)
        ops = Counter(eqn.primitive.name for eqn in program.eqns)
        # JSON has no infinity.
        numbers = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in numbers.items()}
        self._summary.append({"pass": name, "equations": len(program.eqns), "ops": dict(ops.most_common()), **numbers})
        write_text(self.folder / "summary.json", json.dumps(self._summary, indent=1) + "\n")
        self._before = lines


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
