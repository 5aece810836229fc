"""How the steps of random programs are drawn: their operands, options and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.debug.fuzz.steps import ACTIVATIONS, FUNCTIONS

if TYPE_CHECKING:
    from qcompiler.debug.fuzz.generator import Generator

#: The values that a step reads, its options, its weights.
_Drawn = tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]


def _size(x: np.ndarray) -> float:
    return max(float(np.abs(x).mean()), 1e-6)


def _conv(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    rank = x.ndim - 2
    layout = "first" if g.chance(0.15) else "last"
    channels, maps = (x.shape[1], x.shape[2:]) if layout == "first" else (x.shape[-1], x.shape[1:-1])
    window = tuple(g.pick((1, 2, 3, 3) if g.chance(0.9) else (5,)) for _ in range(rank))
    groups = g.pick((1, 1, 1, channels, 2 if channels % 2 == 0 else 1))
    features = groups * g.pick((1, 2)) if groups == channels > 1 else g.pick((1, 4, 8, 20))
    features = features if features % groups == 0 else groups
    spread = tuple(g.pick((1, 1, 1, 2)) for _ in range(rank))
    holes = tuple(g.pick((1, 2)) for _ in range(rank)) if g.chance(0.12) else (1,) * rank
    reach = [(k - 1) * d + 1 for k, d in zip(window, spread, strict=True)]
    padding: Any = g.pick(("SAME", "SAME", "VALID", "some"))
    if holes != (1,) * rank or (padding == "VALID" and any(r > n for r, n in zip(reach, maps, strict=True))):
        padding = "some"
    if padding == "some":
        # Any numbers, negative ones too, that leave something.
        padding = []
        for n, r, h in zip(maps, reach, holes, strict=True):
            low, high = (int(g.rng.integers(-1 if g.chance(0.2) else 0, 3)) for _ in range(2))
            short = max(0, r - ((n - 1) * h + 1 + low + high))
            padding.append((low + short, high))
        padding = tuple(padding)
    options = {
        "layout": layout,
        "window_strides": tuple(g.pick((1, 1, 2, 3 if g.chance(0.2) else 1)) for _ in range(rank)),
        "padding": padding,
        "lhs_dilation": holes,
        "rhs_dilation": spread,
        "feature_group_count": groups,
    }
    shape = (*window, channels // groups, features)
    if layout == "first":
        shape = (features, channels // groups, *window)
    depth = math.prod(window) * channels // groups
    return (source,), options, g.kernel(shape, depth, _size(x), features=0 if layout == "first" else -1)


def _dot(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, g.kernel((x.shape[-1], g.pick((1, 4, 8))), x.shape[-1], _size(x))


def _left_dot(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, g.kernel((g.pick((1, 4)), x.shape[1]), x.shape[1], _size(x), bias=False)


def _dot_tokens(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, g.kernel((*x.shape[1:], g.pick((1, 4))), math.prod(x.shape[1:]), _size(x), bias=False)


def _attend(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source, g.pick(g.alike(lambda v: v.ndim == 3 and v.shape[2] == x.shape[2]))), {}, {}


def _sum(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    same = g.alike(lambda v: v.shape == x.shape)
    others = [g.pick(same) for _ in range(g.pick((1, 1, 1, 2, 3)))]
    return (source, *others), {}, {}


def _sub(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source, g.pick(g.alike(lambda v: v.shape == x.shape))), {}, {}


def _clip(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    low = round(float(-_size(x) * g.rng.uniform(0, 2)), 4)
    return (source,), {"low": low, "high": round(float(_size(x) * g.rng.uniform(0.5, 3)), 4)}, {}


def _channel_affine(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    scale = g.rng.normal(size=x.shape[-1]) * 10.0 ** g.rng.uniform(-2, 2)
    shift = g.rng.normal(size=x.shape[-1]) * np.abs(scale).max() * _size(x)
    return (source,), {}, {"scale": scale, "shift": shift}


def _affine(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    scale = g.pick((-1.0, 2.0, 0.5, 1.0, round(float(g.rng.normal()), 3) or 1.0))
    return (source,), {"scale": scale, "shift": g.pick((0.0, round(float(g.rng.normal() * _size(x)), 4)))}, {}


def _pool(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    padding = "SAME" if min(x.shape[1:-1]) < 3 else g.pick(("SAME", "VALID"))
    options = {"window": g.pick((2, 3)), "stride": g.pick((1, 2)), "padding": padding, "largest": g.chance(0.8)}
    return (source,), options, {}


def _reduction(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"axes": tuple(range(1, max(x.ndim - 1, 2)))}, {}


def _add_mean(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    inner = (x.ndim - 1,) if x.ndim == 2 or g.chance(0.5) else tuple(range(1, x.ndim - 1))
    return (source,), {"axes": inner}, {}


def _reshape(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    flat = math.prod(x.shape[1:])
    whole = x.ndim == 3 or (flat < 64 and g.chance(0.5))
    return (source,), {"shape": (flat,) if whole else (flat // x.shape[-1], x.shape[-1])}, {}


def _transpose(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    order = [1 + int(d) for d in g.rng.permutation(x.ndim - 1)]
    return (source,), {"order": (0, *order)}, {}


def _axis(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"axis": int(g.rng.integers(1, x.ndim))}, {}


def _slice(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    axis = int(g.rng.integers(1, x.ndim))
    options = {"axis": axis, "start": min(g.pick((0, 1)), x.shape[axis] - 1), "stride": g.pick((1, 2))}
    return (source,), options, {}


def _alike(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    """Another value of the same shape, or one that is spread over it."""
    spread = lambda v: v.ndim == x.ndim and all(m in (1, n) for m, n in zip(v.shape, x.shape, strict=True))
    return (source, g.pick(g.alike(spread))), {}, {}


def _squeeze_excite(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    channels = x.shape[-1]
    return (source,), {}, {"kernel": g.rng.normal(size=(channels, channels)) / _size(x) / channels**0.5}


def _prelu(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, {"slope": g.rng.uniform(-0.2, 1.2, size=x.shape[-1])}


def _piecewise(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    size = _size(x)
    turn = g.pick((0.0, round(float(size * g.rng.normal()), 4)))
    below, above = (g.pick((0.0, 0.1, 1.0, round(float(g.rng.normal()), 3))) for _ in range(2))
    # The lines meet, as those of activations do: at a jump, rounding decides for one side or the other.
    offset = round(float(size * g.rng.normal()), 4)
    return (source,), {"turn": turn, "below": (below, offset), "above": (above, (below - above) * turn + offset)}, {}


def _where(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    other = g.pick(g.alike(lambda v: v.shape == x.shape))
    return (source, other, other), {}, {}


def _channel_clip(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    low = -_size(x) * g.rng.uniform(0, 2, size=x.shape[-1])
    return (source,), {}, {"low": low, "high": low + _size(x) * g.rng.uniform(0.1, 3, size=x.shape[-1])}


def _concat(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    axis = int(g.rng.integers(1, x.ndim))
    beside = lambda v: v.ndim == x.ndim and v.shape[:axis] + v.shape[axis + 1 :] == x.shape[:axis] + x.shape[axis + 1 :]
    return (source, g.pick(g.alike(beside))), {"axis": axis}, {}


def _pad(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    config = [(0, 0, 0)]
    for n in x.shape[1:-1]:
        low, high = (int(g.rng.integers(-1 if n > 3 and g.chance(0.2) else 0, 3)) for _ in range(2))
        config.append((low, high, int(g.chance(0.1))))
    number = g.pick((0.0, 0.0, round(float(_size(x) * g.rng.normal()), 4)))
    return (source,), {"config": (*config, (0, 0, 0)), "number": number}, {}


def _split(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"swap": g.chance(0.5)}, {}


def _resize(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"method": g.pick(("nearest", "linear")), "factor": g.pick((2, 2, 3))}, {}


def _average_pool(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, options, held = _pool(g, source, x)
    return reads, {k: v for k, v in options.items() if k != "largest"}, held


def _scaled(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    """With a factor that brings it to about one, or a few."""
    return (source,), {}, {"scale": g.rng.uniform(0.3, 3) / _size(x)}


def _scaled_along(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, _, held = _scaled(g, source, x)
    return reads, {"axis": g.pick((-1, 1))}, held


def _function(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, _, held = _scaled(g, source, x)
    return reads, {"name": g.pick(list(FUNCTIONS))}, held


def _norm(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    scale, shift = g.rng.normal(size=x.shape[-1]), 0.3 * g.rng.normal(size=x.shape[-1])
    return (source,), {"centred": g.chance(0.5)}, {"scale": scale, "shift": shift, "epsilon": 1e-3 * _size(x) ** 2}


def _unit(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"axis": g.pick((-1, 1))}, {"epsilon": 1e-2 * _size(x)}


def _divide(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, options, _ = _alike(g, source, x)
    return reads, options, {"epsilon": 0.1 * _size(g.values[reads[1]])}


def _logaddexp(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, options, _ = _alike(g, source, x)
    return reads, options, {"scale": 1 / max(_size(x), _size(g.values[reads[1]]))}


def _largest(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"count": int(g.rng.integers(1, x.shape[-1] + 1))}, {}


def _take(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    axis = int(g.rng.integers(1, x.ndim))
    places = [int(k) for k in g.rng.integers(0, x.shape[axis], size=g.pick((1, 3)))]
    return (source,), {"axis": axis, "places": tuple(places)}, {}


def _update(g: Generator, source: int, x: np.ndarray) -> _Drawn:
    fits = lambda v: v.ndim == x.ndim and all(m <= n for m, n in zip(v.shape, x.shape, strict=True))
    return (source, g.pick(g.alike(fits))), {"start": int(g.rng.integers(0, 2))}, {}


def _always(x: np.ndarray) -> bool:
    return True


def _features(x: np.ndarray) -> bool:
    return x.ndim >= 2


def _maps(x: np.ndarray) -> bool:
    return x.ndim >= 3


#: step -> how likely it is, the values it takes, and how its operands, options and weights are drawn.
KINDS: dict[str, tuple[int, Callable[[np.ndarray], bool], Callable[[Generator, int, np.ndarray], _Drawn | None]]] = {
    "conv": (12, lambda x: x.ndim in (4, 5), _conv),
    "conv_1d": (2, lambda x: x.ndim == 3, _conv),
    "dot": (6, lambda x: x.ndim in (2, 3), _dot),
    "left_dot": (1, lambda x: x.ndim == 3, _left_dot),
    "dot_each": (1, lambda x: x.ndim == 3, _dot_tokens),
    "dot_all": (1, lambda x: x.ndim == 3, _dot_tokens),
    "attend": (3, lambda x: x.ndim == 3, _attend),
    "act": (5, _always, lambda g, source, x: ((source,), {"name": g.pick(list(ACTIVATIONS))}, {})),
    "clip": (2, _always, _clip),
    "channel_affine": (2, _features, _channel_affine),
    "affine": (2, _always, _affine),
    "neg": (1, _always, lambda g, source, x: ((source,), {}, {})),
    "add": (5, _always, _sum),
    "sub": (2, _always, _sub),
    "add_mean": (2, _features, _add_mean),
    "pool": (2, _maps, _pool),
    "mean": (1, _features, _reduction),
    "sum": (1, _features, _reduction),
    "max": (1, _features, _reduction),
    "reshape": (2, _maps, _reshape),
    "transpose": (1, _maps, _transpose),
    "flip": (1, _features, _axis),
    "slice": (2, _maps, _slice),
    "cummax": (1, _features, _axis),
    "cumsum": (1, _features, _axis),
    "mul": (3, _features, _alike),
    "gate": (2, _features, _alike),
    "squeeze_excite": (2, _maps, _squeeze_excite),
    "sub_mean": (1, _features, _add_mean),
    "maximum": (1, _features, _alike),
    "minimum": (1, _features, _alike),
    "prelu": (2, _features, _prelu),
    "piecewise": (2, _always, _piecewise),
    "where": (1, _features, _where),
    "channel_clip": (1, _features, _channel_clip),
    "concat": (3, _features, _concat),
    "stack": (1, _features, _sub),
    "pad": (2, _maps, _pad),
    "split": (2, lambda x: x.ndim >= 2 and x.shape[-1] % 2 == 0, _split),
    "average_pool": (2, _maps, _average_pool),
    "resize": (1, lambda x: x.ndim == 4, _resize),
    "softmax": (2, _features, _scaled_along),
    "log_softmax": (1, _features, _scaled),
    "masked_softmax": (1, _maps, lambda g, source, x: ((source,), {"mask": g.pick((-1e9, -1e30, -np.inf))}, {})),
    "norm": (3, _features, _norm),
    "unit": (1, _features, _unit),
    "function": (3, _always, _function),
    "divide": (1, _features, _divide),
    "hypot": (1, _features, _alike),
    "atan2": (1, _features, _divide),
    "logaddexp": (1, _features, _logaddexp),
    "sort": (1, _features, _axis),
    "largest": (1, _features, _largest),
    "one_hot": (1, _features, lambda g, source, x: ((source,), {}, {})),
    "take": (1, _features, _take),
    "update": (1, _features, _update),
    "recurrent": (1, _maps, lambda g, source, x: ((source,), {}, {"scale": 1 / _size(x)})),
    "branch": (1, _features, lambda g, source, x: ((source,), {"limit": round(float(x.min()) - _size(x), 4)}, {})),
}
