"""What has been compiled for one layer serves all layers that compute the same."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Any

import jax

#: Functions that are kept, the last used ones.
_MOST = 128
_KEPT: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()


def compiled(key: Hashable, make: Callable[[], Callable[..., Any]], **options: Any) -> Callable[..., Any]:
    """The compiled function of a key.

    Args:
      key: names all that decides what `make` gives.
      make: the function.
      **options: of `jax.jit`.
    """
    if key not in _KEPT:
        _KEPT[key] = jax.jit(make(), **options)
        if len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key]
