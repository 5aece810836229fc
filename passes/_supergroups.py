"""Supergroups of a recipe against regions: rows of ops that should be one integer op, and those that are.

Conv, Relu   and   region[conv]{ conv, add, max 0 }      ->      agrees
Conv, Sigmoid   and   region[conv]{ conv }, region[table]{ logistic }      ->      disagrees: two regions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qcompiler.errors import RecipeError
from qcompiler.ir import _compat, classes
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.names import nearest
from qcompiler.passes import _regions


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """An equation, the region it is in (or its own id), and what it reads that varies; `zero`: it reads a zero, too."""

    primitive: str
    region: str
    reads: tuple[Any, ...]
    results: tuple[Any, ...]
    zero: bool


def _named(*primitives: str) -> Callable[[_Node], bool]:
    return lambda node: node.primitive in primitives


def _of_two(primitive: str) -> Callable[[_Node], bool]:
    return lambda node: node.primitive == primitive and len(node.reads) == 2


#: ONNX's name of an op -> whether an equation is one. A BatchNormalization is in the weights by now.
_OPS: dict[str, Callable[[_Node], bool]] = {
    "Conv": _named("conv_general_dilated"),
    "ConvTranspose": _named("conv_general_dilated"),
    "Gemm": _named("dot_general"),
    "MatMul": _named("dot_general"),
    "Relu": lambda node: node.primitive == "max" and node.zero,
    "Clip": _named("clamp", "min", "max"),
    "Add": _of_two("add"),
    "Sub": _of_two("sub"),
    "Mul": _of_two("mul"),
    "Sigmoid": _named("logistic"),
    "Tanh": _named("tanh"),
    "Exp": _named("exp"),
    "Erf": _named("erf"),
    "Sqrt": _named("sqrt", "rsqrt"),
    "MaxPool": _named("reduce_window_max"),
    "ReduceSum": _named("reduce_sum"),
    "ReduceMax": _named("reduce_max"),
}
_FOLDED = frozenset({"BatchNormalization"})
#: What stands between two ops without being one: biases, factors, other shapes.
_BETWEEN = classes.AFFINE | classes.IDENTITY | frozenset("convert_element_type reshape transpose squeeze".split())


def compared(parts: Sequence[Program], supergroups: Sequence[Any]) -> list[dict[str, Any]]:
    """How regions agree with supergroups.

    Args:
      parts: a partitioned program, and the bodies of its loops.
      supergroups: with `ops` and `fuse`; see `qcompiler.recipe.Supergroup`.

    Returns:
      Per supergroup `ops`, `fuse`, `agree` (how many rows of such ops do), `disagree`: the regions of each other row.

    Raises:
      RecipeError: no op has that name.
    """
    found = []
    for group in supergroups:
        ops = [op for op in group.ops if op not in _FOLDED]
        if unknown := [op for op in ops if op not in _OPS]:
            raise RecipeError(f"no op of a supergroup is called {unknown[0]!r}{nearest(unknown[0], _OPS)}")
        rows = [row for part in parts for row in _rows(part, [_OPS[op] for op in ops])]
        wanted = 1 if group.fuse else len(ops)
        agree = [row for row in rows if len(set(row)) == wanted]
        other = [" -> ".join(dict.fromkeys(row)) for row in rows if len(set(row)) != wanted]
        found.append({"ops": list(group.ops), "fuse": group.fuse, "agree": len(agree), "disagree": other})
    return found


def _rows(program: Program, ops: Sequence[Callable[[_Node], bool]]) -> Iterator[list[str]]:
    """The regions of the ops of each row of equations that are such ops, each the only reader of the one before."""
    nodes, results = _flat(program)
    readers: dict[Any, list[_Node]] = {}
    for node in nodes:
        for key in node.reads:
            readers.setdefault(key, []).append(node)
    for first in nodes:
        row, node = [first.region] if ops and ops[0](first) else [], first
        while row and len(row) < len(ops):
            after = readers.get(node.results[0], [])
            if len(after) != 1 or node.results[0] in results:
                break
            (node,) = after
            if ops[len(row)](node):
                row.append(node.region)
            elif node.primitive not in _BETWEEN or len(node.reads) != 1:
                break
        if row and len(row) == len(ops):
            yield row


def _flat(program: Program) -> tuple[list[_Node], set[Any]]:
    """The equations inside and outside of regions, and what the program gives, by the variables they go by."""
    constants, same = Constants(program), {}
    nodes: list[_Node] = []

    def key(atom: Any, where: Any) -> Any:
        return same.get((where, atom), (where, atom))

    def add(eqn: _compat.JaxprEqn, where: Any, region: str, known: Callable[[Any], bool]) -> None:
        reads = tuple(key(v, where) for v in eqn.invars if not isinstance(v, _compat.Literal) and not known(v))
        zero = any(isinstance(v, _compat.Literal) and not v.aval.shape and v.val == 0 for v in eqn.invars)
        nodes.append(_Node(eqn.primitive.name, region, reads, tuple(key(v, where) for v in eqn.outvars), zero))

    for eqn in program.eqns:
        if not _regions.is_region(eqn):
            add(eqn, None, program.ids[eqn.outvars[0]], lambda v: v in constants)
            continue
        region = eqn.params["id"]
        body = _compat.open_jaxpr(eqn.params["body"])
        fixed = {inner for inner, outer in zip(body.invars, eqn.invars, strict=True) if outer in constants}
        same.update(
            ((region, inner), key(outer, None))
            for inner, outer in zip(body.invars, eqn.invars, strict=True)
            if inner not in fixed
        )
        for inner in body.eqns:
            if all(isinstance(v, _compat.Literal) or v in fixed for v in inner.invars):
                fixed.update(inner.outvars)
        for inner in body.eqns:
            if inner.outvars[0] not in fixed:
                add(inner, region, region, lambda v, fixed=fixed: v in fixed)
        for outer, inner in zip(eqn.outvars, body.outvars, strict=True):
            if not isinstance(inner, _compat.Literal):
                same[None, outer] = key(inner, region)
    return nodes, {key(v, None) for v in program.outvars if not isinstance(v, _compat.Literal)}
