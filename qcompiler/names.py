"""What a message says of a name that nothing has: the nearest ones that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.0) -> str:
    """`; nearest: 'a', 'b'`, to be put behind a message; empty where nothing is near.

    Args:
      name: that is not known.
      known: names that are.
      most: how many are named.
      cutoff: how alike they must be, 0 to 1 (`difflib.get_close_matches`).
    """
    near = difflib.get_close_matches(name, sorted(set(known)), most, cutoff)
    return f"; nearest: {', '.join(map(repr, near))}" if near else ""
