"""`Report`: what became of a program, in numbers; prints as a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.ir import _compat, classes, loops
from qcompiler.ir.program import Program


@dataclasses.dataclass(frozen=True)
class Island:
    """Part of the program that stays float.

    Attributes:
      primitive: of the equation.
      module_path: in the parameter tree; empty at the top.
      source: the user's line.
      reason: why there are no integers.
      mac_share: its share of the program's multiply-adds, 0 to 1.
    """

    primitive: str
    module_path: str
    source: str
    reason: str
    mac_share: float


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """One pass: its name, seconds with verification, and what it changed, in words."""

    name: str
    seconds: float
    changed: str


@dataclasses.dataclass(frozen=True)
class RuleRecord:
    """A rule of the recipe as text, None for the layers that no rule matches, and the ids of the layers it decides."""

    rule: str | None
    layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SupergroupRecord:
    """Ops that a recipe wants to be one (or, without `fuse`, apart), and where the program does otherwise.

    Attributes:
      ops: names as ONNX has them.
      fuse: whether they are to be one.
      agree: how many rows of such ops are as wanted.
      disagree: the regions of each other row.
    """

    ops: tuple[str, ...]
    fuse: bool
    agree: int
    disagree: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """Attributes:

    islands: what stays float, in program order; before types are assigned, as far as it is known.
    integer_mac_share: multiply-adds done in integers, 0 to 1; 1 where there are none; None before types are assigned.
    qdq_pairs_before: quantize/dequantize pairs that a placement per op would have had.
    qdq_pairs_after: pairs left between integer ops.
    integer_ops: equations of the final program with integer results.
    float_ops: equations with float results, the entry and exit among them.
    weight_bytes: bytes of the final program's weights, everything counted.
    float_weight_bytes: bytes of the weights that the user gave.
    sqnr_db: signal to quantization noise of the integers against float on the probe batch; None if not verified.
    rules: of the recipe, in its order, and last the layers that none matches; empty before types are assigned.
    supergroups: of the recipe.
    unfollowed: encodings of the recipe that the program does not have, and why.
    passes: in the order they ran.
    dump: folder of the dumps, or None.
    precision: what was decided of each layer's types by data, with the reasons; None where nothing was.
    """

    islands: tuple[Island, ...] = ()
    integer_mac_share: float | None = 1.0
    qdq_pairs_before: int = 0
    qdq_pairs_after: int = 0
    integer_ops: int = 0
    float_ops: int = 0
    weight_bytes: int = 0
    float_weight_bytes: int = 0
    sqnr_db: float | None = None
    rules: tuple[RuleRecord, ...] = ()
    supergroups: tuple[SupergroupRecord, ...] = ()
    unfollowed: tuple[str, ...] = ()
    passes: tuple[PassRecord, ...] = ()
    dump: str | None = None
    precision: Any = None

    @property
    def integer_only(self) -> bool | None:
        """Whether everything between the entry and the exit is integers; None before types are assigned."""
        return None if self.integer_mac_share is None else not self.islands

    def __str__(self) -> str:
        if self.integer_mac_share is None:
            lines = ["integer only         undecided: the model is not quantized yet"]
        else:
            lines = [
                f"integer only         {'yes' if self.integer_only else 'no'}",
                f"islands              {len(self.islands)}",
                f"multiply-adds        {self.integer_mac_share:.1%} in integers",
                f"QDQ pairs            {self.qdq_pairs_before} per op before, {self.qdq_pairs_after} left",
            ]
        lines += [
            f"ops                  {self.integer_ops} integer, {self.float_ops} float",
            f"weights              {self.float_weight_bytes:,} bytes before, {self.weight_bytes:,} after",
        ]
        if self.sqnr_db is not None:
            lines.append(f"SQNR on the probe    {self.sqnr_db:.1f} dB")
        if self.dump:
            lines.append(f"dumps                {self.dump}")
        if any(r.rule for r in self.rules):
            lines.append("rules")
            lines += [f"  {r.rule or 'no rule'}: {_some(r.layers)}" for r in self.rules if r.layers]
        for group in self.supergroups:
            what = f"{', '.join(group.ops)}: {group.agree} {'fused' if group.fuse else 'apart'}"
            lines.append(f"supergroup           {what}" + (f", not {_some(group.disagree)}" if group.disagree else ""))
        lines += [f"not followed         {text}" for text in self.unfollowed]
        lines.append("passes")
        lines += [f"  {p.name:<18} {p.seconds:7.2f} s  {p.changed}" for p in self.passes]
        if self.islands:
            lines.append("islands")
            lines += [
                f"  {i.primitive:<22} {i.module_path or '<top level>'}  {i.source}  ({i.mac_share:.1%})  {i.reason}"
                for i in self.islands
            ]
        if self.precision is not None:
            lines.append(str(self.precision))
        return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def rules_of(program: Program) -> tuple[RuleRecord, ...]:
    """What `assign_precision` noted of rules."""
    return tuple(RuleRecord(r["rule"], tuple(r["layers"])) for r in program.notes.get("rules", ()))


def supergroups_of(program: Program) -> tuple[SupergroupRecord, ...]:
    """What `assign_precision` noted of supergroups."""
    found = program.notes.get("supergroups", ())
    return tuple(SupergroupRecord(tuple(g["ops"]), g["fuse"], g["agree"], tuple(g["disagree"])) for g in found)


def unfollowed_of(notes: Mapping[str, Any]) -> tuple[str, ...]:
    """What `insert_qdq` noted of encodings that it could not follow, in bodies of loops too."""
    inside = (unfollowed_of(body) for bodies in notes.get(loops.BODIES, {}).values() for body in bodies)
    return (*notes.get("unfollowed", ()), *(text for found in inside for text in found))


def islands_of(program: Program) -> tuple[Island, ...]:
    """The islands that partition noted."""
    total = max(1, program.notes.get("total_macs", 0))
    return tuple(
        Island(i["primitive"], i["module_path"], i["source"], i["reason"], i["macs"] / total)
        for i in _noted(program.notes)
    )


def _noted(notes: Mapping[str, Any], times: int = 1) -> Iterator[dict[str, Any]]:
    """The islands of a program, then those of its loops' bodies, their multiply-adds in all steps."""
    yield from ({**island, "macs": times * island["macs"]} for island in notes.get("islands", ()))
    for bodies in notes.get(loops.BODIES, {}).values():
        for body in bodies:
            yield from _noted(body, times * body.get("steps", 1))


def count_ops(program: Program) -> tuple[int, int]:
    """(integer, float) equations of a program by their results."""
    kinds = Counter(classes.is_float(eqn.outvars[0]) for eqn in _equations(program.jaxpr))
    return kinds[False], kinds[True]


def _equations(jaxpr: Any) -> Iterator[_compat.JaxprEqn]:
    """The equations, with those in bodies of loops; a region is one."""
    for eqn in _compat.open_jaxpr(jaxpr).eqns:
        inside = _compat.sub_jaxprs(eqn) if loops.is_loop(eqn) else ()
        yield from (e for sub in inside for e in _equations(sub))
        if not inside:
            yield eqn


def weight_bytes(arrays: Any) -> int:
    """Bytes of arrays; types of fewer than 8 bits count as stored."""
    return int(sum(np.prod(a.shape, dtype=np.int64) * a.dtype.itemsize for a in arrays))


def sqnr_db(reference: Any, value: Any) -> float:
    """10 log10(E[reference²] / E[(reference - value)²]) over all arrays together; inf where they are equal."""
    pairs = [(np.asarray(r, np.float64), np.asarray(v, np.float64)) for r, v in zip(reference, value, strict=True)]
    with np.errstate(invalid="ignore"):
        signal = sum(float(np.sum(r**2)) for r, _ in pairs)
        noise = sum(float(np.sum((r - v) ** 2)) for r, v in pairs)
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")
