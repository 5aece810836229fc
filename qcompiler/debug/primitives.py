"""The table of `docs/primitives.md`: how each primitive becomes integers, read from the compiler's own registries."""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.ir import _compat, classes
from qcompiler.passes import _canonical, _growth, _unroll

#: Where every primitive that becomes integers has a test, under its own name.
TESTS = "tests/breadth/test_primitives.py"

_SUMS = frozenset(name for name, kind in _growth.KIND_OF_ANCHOR.items() if kind == "reduce")
#: Linear in one or two values, with clamps and choices: what a product's epilogue computes too.
_LINEAR = classes.AFFINE | classes.CLAMP | classes.COMPARE | classes.LOGIC | frozenset({"abs", "select_n"})
_LOOPS = {
    "scan": f"unrolled, up to {_unroll.MOST_EQUATIONS} equations, or {_unroll.MOST_LAYERS} steps over stacked weights; "
    "batched where nothing is carried; else a body of integers",
    "while": "condition and body of integers",
    "cond": "the branch, where it is known; else branches of integers",
}
#: Names of the registries that no public function binds.
_NOT_BOUND = frozenset({"copy_p", "expand_dims"})
_FLOAT_ALONE = frozenset(classes.FLOAT_ONLY) - frozenset(_canonical.FORMS)


def ways(name: str) -> list[str]:
    """How a primitive becomes integers; empty if it stays float."""
    if name in _FLOAT_ALONE:
        return []
    found = {
        "as other primitives": name in _canonical.FORMS,
        _LOOPS.get(name, ""): name in _LOOPS,
        "linear": name in _LINEAR,
        "exact product in int32": name in classes.PRODUCT or name == "mul",
        "exact sum in int32": name in _SUMS,
        "order of codes": name in classes.SEARCH | classes.ORDER,
        "codes move": name in classes.VIEW | classes.MERGE,
        "nothing to do": name in classes.IDENTITY,
        "table": name in classes.ELEMENTWISE - _LINEAR - classes.IDENTITY,
        "general arithmetic": name in classes.WIDE - classes.IDENTITY,
        "never folded, passes through": name in _compat.RANDOM,
    }
    return [way for way, holds in found.items() if holds]


def names() -> list[str]:
    """All primitives of the table."""
    registered = classes.ELEMENTWISE | classes.WIDE | classes.MERGE | classes.VIEW | classes.ORDER | classes.PRODUCT
    found = {*registered, *_SUMS, *_canonical.FORMS, *_LOOPS, *_compat.RANDOM, *classes.FLOAT_ONLY}
    return sorted(found - _NOT_BOUND)


def tested() -> list[str]:
    """The primitives that must have a test."""
    return [name for name in names() if ways(name) and name not in _compat.RANDOM]


def document() -> str:
    """The text of `docs/primitives.md`."""
    rows = [(f"`{name}`", ", ".join(ways(name)), _note(name)) for name in names()]
    return "\n".join([*_HEAD, *_table(("primitive", "in integers", "stays float"), rows), ""])


def _note(name: str) -> str:
    if name in _compat.RANDOM:
        return "reals made of random bits are islands"
    return classes.FLOAT_ONLY.get(name, "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


_HEAD = [
    "# How primitives become integers",
    "",
    "Written by `python -m qcompiler primitives`; a test holds it to what the compiler does.",
    "",
    "| in integers | what it means |",
    "|---|---|",
    "| linear | sums of scaled codes, clamps and choices among them, rounded once; free behind a product or sum |",
    "| exact product, sum in int32 | of codes less their zero points, with a proof that int32 cannot overflow |",
    "| codes move | the result's elements are codes of operands in one encoding; nothing is rounded. What a gather "
    "finds out of bounds, which would be NaN, is the code of 0 |",
    "| order of codes | integers that follow from the order of reals alone |",
    "| table | any function of one value, however long: one entry per code |",
    "| general arithmetic | software floating point of integers within a region, rounded once at its result |",
    "| as other primitives | `simplify` spells it so |",
    "| a body of integers | the loop stays one; what it carries keeps one encoding |",
    "",
    f"Each has a test of its name: `{TESTS}::test_primitive[NAME]`. Primitives that read and give integers alone stay "
    "as they are, exact.",
    "",
]
