"""The progress of long work: one line on a terminal, silent everywhere else."""

from __future__ import annotations

import sys


class ProgressBar:
    """One line on a terminal's stderr, redrawn in place; silent when stderr is a file or a pipe.

    Args:
      label: what is being done.
      total: how many steps there are; None where that is not known, which shows the count alone.
    """

    def __init__(self, label: str, total: int | None = None) -> None:
        self._label, self._total = label, total
        self._drawn = False
        self._enabled = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        """Redraws the line with `done` steps behind it."""
        if not self._enabled:
            return
        if self._total is None:
            shown = f"{done}"
        else:
            filled = 24 * done // max(self._total, 1)
            shown = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{self._total}"
        sys.stderr.write(f"\r\x1b[K{self._label} {shown} {note}")
        sys.stderr.flush()
        self._drawn = True

    def close(self) -> None:
        """Ends the line, if one was drawn."""
        if self._drawn:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._drawn = False
