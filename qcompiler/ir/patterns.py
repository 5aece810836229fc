"""Patterns of names: globs, and compiled regular expressions."""

from __future__ import annotations

import fnmatch
import re


def matches(pattern: str | re.Pattern[str], text: str) -> bool:
    """Whether a glob, or a compiled regular expression, matches the whole text."""
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(text) is not None
    return fnmatch.fnmatchcase(text, pattern)


def is_exact(pattern: str | re.Pattern[str]) -> bool:
    """Whether a pattern can match nothing but itself."""
    return isinstance(pattern, str) and not any(c in pattern for c in "*?[")
