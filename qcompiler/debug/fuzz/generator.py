"""Random programs, drawn from a seed in NumPy alone, so that a seed gives the same program everywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qcompiler.debug import reference
from qcompiler.debug.fuzz.cases import RECIPES, Case, Step, as_real
from qcompiler.debug.fuzz.steps import ACTIVATIONS, FUNCTIONS, STEPS

#: Larger values of a program are not made, nor larger numbers in them.
MOST_ELEMENTS = 20_000
MOST_MAGNITUDE = 1e12


def random_case(
    seed: int, steps: int | None = None, recipe: str | None = None, batch: int = 2, thorough: bool = False
) -> Case:
    """The random program of a seed.

    Args:
      seed: what everything is drawn from.
      steps: how many; None: 1 to 12, by the seed.
      recipe: name in `RECIPES`; None: all in turn, by the seed.
      batch: leading dimension of the inputs.
      thorough: see `check`.
    """
    names = list(RECIPES)
    origin = f"python -m qcompiler.debug.fuzz --count 1 --seed {seed}"
    origin += "" if steps is None else f" --steps {steps}"
    origin += "" if recipe is None else f" --recipe {recipe}"
    generator = _Generator(seed, steps or seed % 12 + 1, batch)
    return generator.case(origin, recipe or names[seed % len(names)], thorough)


def run_step(step: Step, operands: Sequence[np.ndarray], held: dict[str, np.ndarray]) -> np.ndarray:
    """The value of a step, computed in NumPy.

    Raises:
      TypeError, ValueError: the step does not take operands of these shapes.
    """
    apply = functools.partial(STEPS[step.name], **step.options)
    jaxpr = jax.make_jaxpr(lambda operands, held: apply(*operands, held))(list(operands), held)
    flat = [*operands, *(held[name] for name in sorted(held))]
    return reference.evaluate_floats(jaxpr, flat)[0]


class _Generator:
    """Grows a program step by step, looking at the values it has so far."""

    def __init__(self, seed: int, steps: int, batch: int) -> None:
        self.rng = np.random.default_rng([seed, steps])
        self.asked = steps
        self.inputs = [self.input(batch, self.shape())]
        if self.rng.random() < 0.2:
            same = self.rng.random() < 0.7
            self.inputs.append(self.input(batch, self.inputs[0].shape[1:] if same else self.shape()))
        self.steps: list[Step] = []
        self.weights: dict[str, dict[str, np.ndarray]] = {}
        self.values = [as_real(x) for x in self.inputs]

    def shape(self) -> tuple[int, ...]:
        """Images, mostly; tokens; now and then a volume or a vector."""
        kind = self.rng.random()
        if kind < 0.6:
            return self.pick((4, 5, 8)), self.pick((4, 5, 7)), self.pick((1, 3, 8, 8, 20))
        if kind < 0.9:
            return self.pick((3, 6, 9)), self.pick((4, 8))
        return (self.pick((2, 4)), 3, 4, self.pick((1, 4))) if kind < 0.95 else (self.pick((1, 5, 16)),)

    def input(self, batch: int, shape: tuple[int, ...]) -> np.ndarray:
        kind = self.rng.random()
        if kind < 0.05:
            return self.rng.integers(0, 256, (batch, *shape), np.uint8)
        if kind < 0.08:
            return self.rng.random((batch, *shape)) < 0.4
        size = float(10.0 ** self.rng.uniform(-2, 2))
        shift = self.pick((0.0, 0.0, 0.7, 3.0)) * size
        return (self.rng.normal(size=(batch, *shape)) * size + shift).astype(np.float32)

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def case(self, origin: str, recipe: str, thorough: bool) -> Case:
        while len(self.steps) < self.asked:
            self.step()
        read = {k for step in self.steps for k in step.reads}
        made = range(len(self.inputs), len(self.values))
        # Ends of the program, and now and then a value that is read as well.
        results = [k for k in made if k not in read or self.chance(0.05)]
        return Case(origin, recipe, self.steps, self.weights, self.inputs, results, thorough)

    def step(self) -> None:
        """Appends one step, mostly on the last value, unless its result is too large, or zero everywhere."""
        last = len(self.values) - 1
        source = last if self.chance(0.75) else int(self.rng.integers(len(self.values)))
        x = self.values[source]
        name = self.pick([n for n, (weight, fits, _) in _KINDS.items() if fits(x) for _ in range(weight)])
        drawn = _KINDS[name][2](self, source, x)
        if drawn is None:
            return
        reads, options, held = drawn
        step = Step(name, reads, options)
        held = {k: np.asarray(v, np.float32) for k, v in held.items()}
        value = run_step(step, [self.values[r] for r in reads], held)
        if not np.isfinite(value).all() or np.abs(value).max(initial=0) > MOST_MAGNITUDE or not value.size:
            return
        # What is zero everywhere has no range: its scale, and how finely what follows is summed, would be a guess.
        if value.size > MOST_ELEMENTS or not np.any(value):
            return
        if held:
            self.weights[str(len(self.steps))] = held
        self.steps.append(step)
        self.values.append(value)

    def alike(self, fits: Callable[[np.ndarray], bool]) -> list[int]:
        """The values of which something holds."""
        return [k for k, v in enumerate(self.values) if fits(v)]

    def kernel(
        self, shape: tuple[int, ...], depth: int, size: float, bias: bool = True, features: int = -1
    ) -> dict[str, Any]:
        """A kernel of any size with channels of different sizes, and a bias that does not drown what it is added to."""
        kernel = self.rng.normal(size=shape) * 10.0 ** self.rng.uniform(-3, 2)
        by_channel = np.moveaxis(kernel, features, -1)
        if self.chance(0.3):
            by_channel *= 10.0 ** self.rng.uniform(-2, 0, size=shape[features])
        if self.chance(0.1):
            by_channel[..., 0] = 0
        held = {"kernel": kernel}
        if bias and self.chance(0.6):
            reach = np.abs(by_channel).reshape(-1, shape[features]).max(axis=0) * size * depth**0.5
            held["bias"] = self.rng.normal(size=shape[features]) * reach * 10.0 ** self.rng.uniform(-3, 1)
        return held


_Drawn = tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]


def _size(x: np.ndarray) -> float:
    return max(float(np.abs(x).mean()), 1e-6)


def _conv(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
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


def _dot(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, g.kernel((x.shape[-1], g.pick((1, 4, 8))), x.shape[-1], _size(x))


def _left_dot(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, g.kernel((g.pick((1, 4)), x.shape[1]), x.shape[1], _size(x), bias=False)


def _dot_tokens(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, g.kernel((*x.shape[1:], g.pick((1, 4))), math.prod(x.shape[1:]), _size(x), bias=False)


def _attend(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source, g.pick(g.alike(lambda v: v.ndim == 3 and v.shape[2] == x.shape[2]))), {}, {}


def _sum(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    same = g.alike(lambda v: v.shape == x.shape)
    others = [g.pick(same) for _ in range(g.pick((1, 1, 1, 2, 3)))]
    return (source, *others), {}, {}


def _sub(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source, g.pick(g.alike(lambda v: v.shape == x.shape))), {}, {}


def _clip(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    low = round(float(-_size(x) * g.rng.uniform(0, 2)), 4)
    return (source,), {"low": low, "high": round(float(_size(x) * g.rng.uniform(0.5, 3)), 4)}, {}


def _channel_affine(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    scale = g.rng.normal(size=x.shape[-1]) * 10.0 ** g.rng.uniform(-2, 2)
    shift = g.rng.normal(size=x.shape[-1]) * np.abs(scale).max() * _size(x)
    return (source,), {}, {"scale": scale, "shift": shift}


def _affine(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    scale = g.pick((-1.0, 2.0, 0.5, 1.0, round(float(g.rng.normal()), 3) or 1.0))
    return (source,), {"scale": scale, "shift": g.pick((0.0, round(float(g.rng.normal() * _size(x)), 4)))}, {}


def _pool(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    padding = "SAME" if min(x.shape[1:-1]) < 3 else g.pick(("SAME", "VALID"))
    options = {"window": g.pick((2, 3)), "stride": g.pick((1, 2)), "padding": padding, "largest": g.chance(0.8)}
    return (source,), options, {}


def _reduction(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"axes": tuple(range(1, max(x.ndim - 1, 2)))}, {}


def _add_mean(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    inner = (x.ndim - 1,) if x.ndim == 2 or g.chance(0.5) else tuple(range(1, x.ndim - 1))
    return (source,), {"axes": inner}, {}


def _reshape(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    flat = math.prod(x.shape[1:])
    whole = x.ndim == 3 or (flat < 64 and g.chance(0.5))
    return (source,), {"shape": (flat,) if whole else (flat // x.shape[-1], x.shape[-1])}, {}


def _transpose(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    order = [1 + int(d) for d in g.rng.permutation(x.ndim - 1)]
    return (source,), {"order": (0, *order)}, {}


def _axis(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"axis": int(g.rng.integers(1, x.ndim))}, {}


def _slice(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    axis = int(g.rng.integers(1, x.ndim))
    options = {"axis": axis, "start": min(g.pick((0, 1)), x.shape[axis] - 1), "stride": g.pick((1, 2))}
    return (source,), options, {}


def _alike(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    """Another value of the same shape, or one that is spread over it."""
    spread = lambda v: v.ndim == x.ndim and all(m in (1, n) for m, n in zip(v.shape, x.shape, strict=True))
    return (source, g.pick(g.alike(spread))), {}, {}


def _squeeze_excite(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    channels = x.shape[-1]
    return (source,), {}, {"kernel": g.rng.normal(size=(channels, channels)) / _size(x) / channels**0.5}


def _prelu(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {}, {"slope": g.rng.uniform(-0.2, 1.2, size=x.shape[-1])}


def _piecewise(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    size = _size(x)
    turn = g.pick((0.0, round(float(size * g.rng.normal()), 4)))
    below, above = (g.pick((0.0, 0.1, 1.0, round(float(g.rng.normal()), 3))) for _ in range(2))
    # The lines meet, as those of activations do: at a jump, rounding decides for one side or the other.
    offset = round(float(size * g.rng.normal()), 4)
    return (source,), {"turn": turn, "below": (below, offset), "above": (above, (below - above) * turn + offset)}, {}


def _where(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    other = g.pick(g.alike(lambda v: v.shape == x.shape))
    return (source, other, other), {}, {}


def _channel_clip(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    low = -_size(x) * g.rng.uniform(0, 2, size=x.shape[-1])
    return (source,), {}, {"low": low, "high": low + _size(x) * g.rng.uniform(0.1, 3, size=x.shape[-1])}


def _concat(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    axis = int(g.rng.integers(1, x.ndim))
    beside = lambda v: v.ndim == x.ndim and v.shape[:axis] + v.shape[axis + 1 :] == x.shape[:axis] + x.shape[axis + 1 :]
    return (source, g.pick(g.alike(beside))), {"axis": axis}, {}


def _pad(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    config = [(0, 0, 0)]
    for n in x.shape[1:-1]:
        low, high = (int(g.rng.integers(-1 if n > 3 and g.chance(0.2) else 0, 3)) for _ in range(2))
        config.append((low, high, int(g.chance(0.1))))
    number = g.pick((0.0, 0.0, round(float(_size(x) * g.rng.normal()), 4)))
    return (source,), {"config": (*config, (0, 0, 0)), "number": number}, {}


def _split(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"swap": g.chance(0.5)}, {}


def _resize(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"method": g.pick(("nearest", "linear")), "factor": g.pick((2, 2, 3))}, {}


def _average_pool(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, options, held = _pool(g, source, x)
    return reads, {k: v for k, v in options.items() if k != "largest"}, held


def _scaled(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    """With a factor that brings it to about one, or a few."""
    return (source,), {}, {"scale": g.rng.uniform(0.3, 3) / _size(x)}


def _scaled_along(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, _, held = _scaled(g, source, x)
    return reads, {"axis": g.pick((-1, 1))}, held


def _function(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, _, held = _scaled(g, source, x)
    return reads, {"name": g.pick(list(FUNCTIONS))}, held


def _norm(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    scale, shift = g.rng.normal(size=x.shape[-1]), 0.3 * g.rng.normal(size=x.shape[-1])
    return (source,), {"centred": g.chance(0.5)}, {"scale": scale, "shift": shift, "epsilon": 1e-3 * _size(x) ** 2}


def _unit(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"axis": g.pick((-1, 1))}, {"epsilon": 1e-2 * _size(x)}


def _divide(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, options, _ = _alike(g, source, x)
    return reads, options, {"epsilon": 0.1 * _size(g.values[reads[1]])}


def _logaddexp(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    reads, options, _ = _alike(g, source, x)
    return reads, options, {"scale": 1 / max(_size(x), _size(g.values[reads[1]]))}


def _largest(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    return (source,), {"count": int(g.rng.integers(1, x.shape[-1] + 1))}, {}


def _take(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    axis = int(g.rng.integers(1, x.ndim))
    places = [int(k) for k in g.rng.integers(0, x.shape[axis], size=g.pick((1, 3)))]
    return (source,), {"axis": axis, "places": tuple(places)}, {}


def _update(g: _Generator, source: int, x: np.ndarray) -> _Drawn:
    fits = lambda v: v.ndim == x.ndim and all(m <= n for m, n in zip(v.shape, x.shape, strict=True))
    return (source, g.pick(g.alike(fits))), {"start": int(g.rng.integers(0, 2))}, {}


def _always(x: np.ndarray) -> bool:
    return True


def _features(x: np.ndarray) -> bool:
    return x.ndim >= 2


def _maps(x: np.ndarray) -> bool:
    return x.ndim >= 3


#: step -> how likely it is, the values it takes, and how its operands, options and weights are drawn.
_KINDS: dict[str, tuple[int, Callable[[np.ndarray], bool], Callable[[_Generator, int, np.ndarray], _Drawn | None]]] = {
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
    "atan2": (1, _features, _alike),
    "logaddexp": (1, _features, _logaddexp),
    "sort": (1, _features, _axis),
    "largest": (1, _features, _largest),
    "one_hot": (1, _features, lambda g, source, x: ((source,), {}, {})),
    "take": (1, _features, _take),
    "update": (1, _features, _update),
    "recurrent": (1, _maps, lambda g, source, x: ((source,), {}, {"scale": 1 / _size(x)})),
    "branch": (1, _features, lambda g, source, x: ((source,), {"limit": round(float(x.min()) - _size(x), 4)}, {})),
}
