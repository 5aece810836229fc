"""Whether the mean over a stream's channels may be taken out of all that is written to it.

    mean = sum(x) / n; var = sum(x * x) / n - mean * mean; y = (x - mean) * rsqrt(var + eps)

LayerNorm does not see what is added to all channels of a row alike. Where every reader is such, each constant that
writes the stream can be centred over the channels, W (I - 1 1^T / n); then the mean is 0, subtracting it does nothing,
and the norm is an RMS norm (Ashkboos et al. 2024, "SliceGPT", arXiv:2401.15024, section 3.2). A row's numbers are
followed from its sums on, as multiples of sum(x), sum(x * x) and sum(x)^2: they must end in x - mean or in a variance.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from qcompiler.ir import _compat, identity
from qcompiler.passes import _affine
from qcompiler.passes._rotation import Refused, Stream

#: Constants such as 1 / n are float32.
_CLOSE = 1e-6
_SAME = frozenset("reshape broadcast_in_dim squeeze expand_dims convert_element_type copy stop_gradient".split())


@dataclasses.dataclass(frozen=True)
class _Multiple:
    """`times` of `sum`, `squares` or `squared sum` of x's channels."""

    kind: str
    x: Any
    times: float


def check(stream: Stream) -> None:
    """Lets the results of what subtracts means be what they are subtracted from, if the stream can be centred.

    Raises:
      Refused: somebody would see that the mean is gone.
    """
    for eqn in stream.uncentred.values():
        raise Refused(f"{identity.describe(eqn)} reads it with its mean, which norms subtract elsewhere")
    known: dict[Any, _Multiple] = {v: _Multiple("sum", x, 1.0) for v, x in stream.sums.items()}
    known |= {v: _Multiple("squares", x, times) for v, (x, times) in stream.squares.items()}
    subtracted = dict(stream.subtracted)
    for eqn in stream.program.eqns:
        operands = [known.get(v) if isinstance(v, _compat.Var) else None for v in eqn.invars]
        if not any(operands) or eqn.outvars[0] in known:
            continue
        if id(eqn) in subtracted:
            _, x = subtracted.pop(id(eqn))
            if not _is_mean(operands[1], x, stream.channels):
                raise Refused(f"{identity.describe(eqn)} subtracts another number than the mean of its channels")
            stream.drop(eqn, 0)
        elif _is_variance(eqn, operands, stream.channels):
            stream.drop(eqn, 0)
        else:
            known[eqn.outvars[0]] = _followed(stream, eqn, operands)
    for eqn, _ in subtracted.values():
        raise Refused(f"{identity.describe(eqn)} subtracts another number than the mean of its channels")
    if any(v in known for v in stream.program.outvars if isinstance(v, _compat.Var)):
        raise Refused("a sum over its channels is a result")


def _is_mean(found: _Multiple | None, x: Any, channels: int) -> bool:
    if found is None or found.kind != "sum" or found.x is not x:
        return False
    return math.isclose(found.times * channels, 1.0, rel_tol=_CLOSE)


def _is_variance(eqn: _compat.JaxprEqn, operands: list[_Multiple | None], channels: int) -> bool:
    """k sum(x * x) - k / n sum(x)^2, which is the same for x plus any number."""
    if eqn.primitive.name != "sub" or None in operands:
        return False
    squares, squared = operands
    assert squares is not None and squared is not None
    if (squares.kind, squared.kind) != ("squares", "squared sum") or squares.x is not squared.x:
        return False
    return math.isclose(squares.times, channels * squared.times, rel_tol=_CLOSE)


def _followed(stream: Stream, eqn: _compat.JaxprEqn, operands: list[_Multiple | None]) -> _Multiple:
    (found, *others) = [m for m in operands if m is not None]
    name, step = eqn.primitive.name, _affine.affine_of(eqn, stream.constants, spreads=True)
    squares = name == "square" or (name == "integer_pow" and eqn.params["y"] == 2)
    if squares or (name == "mul" and eqn.invars[0] is eqn.invars[1]):
        if found.kind == "sum":
            return _Multiple("squared sum", found.x, found.times**2)
    elif name in _SAME and not others:
        return found
    elif step is not None and step[1].size == 1 and not step[2].any():
        return dataclasses.replace(found, times=found.times * step[1].item())
    raise Refused(
        f"{identity.describe(eqn)} reads a {found.kind} over its channels, which is neither mean nor variance"
    )
