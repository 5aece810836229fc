"""One check for every construct: compiled without islands, bit-exact, and near the float model on unseen data."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx

from qcompiler.debug import census, fuzz, reference
from qcompiler.debug.fuzz.checks import FAST_COMPILE
from qcompiler.debug.report import sqnr_db
from qcompiler.flax_adapter import source_of
from qcompiler.ir import tracing

#: Samples in a batch: one to calibrate on, and another to measure on.
BATCH = 16


@dataclasses.dataclass
class Compiled:
    """What a construct became.

    Attributes:
      stages: the programs of `fuzz.compile_stages`.
      sqnr_db: of the integers against float, by result, on inputs that were not calibrated on.
    """

    stages: fuzz.Stages
    sqnr_db: dict[str, float]

    def kinds(self) -> list[str]:
        """The kinds of regions, in program order."""
        return [e.params["kind"] for e in self.stages.folded.eqns if "kind" in e.params]


#: Kinds of input data: mean and deviation of a normal distribution. Where zero is no value of the data, padding with
#: any code but the zero point's shows.
DATA = {"normal": (0, 1), "positive": (3, 0.7), "negative": (-3, 0.7)}


def draw(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 data of a kind in `DATA`, 256 integers of the dtype named, or `bits`: bool; the same for the same seed.

    `places` are int32 from 0 to 3, `probabilities` float32 in [0.05, 0.95].

    Normal data is bounded, as images are: what lies outside of the range seen in calibration is clipped, and how much
    that costs is no question of these tests.
    """
    rng = np.random.default_rng([seed, *shape])
    if kind == "bits":
        return rng.random(shape) < 0.4
    if kind == "places":
        return rng.integers(0, 4, shape, np.int32)
    if kind == "probabilities":
        return rng.uniform(0.05, 0.95, shape).astype(np.float32)
    if kind in ("uint8", "int8", "int16", "int32"):
        low = 0 if kind == "uint8" else -128
        return rng.integers(low, low + 256, shape, kind)
    mean, deviation = DATA[kind]
    return (mean + deviation * np.clip(rng.normal(size=shape), -2.5, 2.5)).astype(np.float32)


def _filled(shapes: Any) -> Any:
    """Random weights of these shapes, among them biases other than 0, and scales and variances other than 1."""
    rng = np.random.default_rng(11)

    def fill(path: Any, leaf: Any) -> np.ndarray:
        shape = leaf.shape
        if {"var", "scale", "gain", "negative_slope"} & set(tracing.path_name(path).split("/")):
            values = rng.uniform(0.3, 1.5, shape)
        elif len(shape) > 1:
            values = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            values = 0.3 * rng.normal(size=shape)
        return values.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture
def compiled():
    """`compiled(model, *shapes, sqnr=27, ...)`: compiles and checks; see `run`."""

    def run(
        model: Any,
        *shapes: tuple[int, ...],
        params: Any = None,
        sqnr: float = 27.0,
        recipe: Any = None,
        data: str | tuple[str, ...] = "normal",
        **apply_kwargs: Any,
    ) -> Compiled:
        """Compiles a function (of `params`, if given, and inputs), an nnx or a linen module, and checks the result.

        No equation stays float; jitted integers equal the NumPy reference's bit for bit, each region its simulation
        within one step; no float value is left in the `io="int"` program; and the integers keep `sqnr` dB.

        Args:
          model: what to compile; Flax modules get random weights.
          *shapes: of the inputs, after the batch.
          sqnr: least SQNR in dB of every result. Rounding to 8 bits over 2.5 deviations to both sides leaves
            20 log10(sqrt(12) * 256 / 5) = 45 dB; so does a kernel's over 4, 39 together. Ranges are those of a few
            hundred values, and others lie outside of them: 28 to 40 were measured. A wrong scale or zero point leaves
            less than 10.
          data: kind of the inputs, of all or of each; see `draw`.
          **apply_kwargs: of a module's call.
        """
        kinds = (data,) * len(shapes) if isinstance(data, str) else data
        inputs = [draw(kind, (BATCH, *s), k) for k, (s, kind) in enumerate(zip(shapes, kinds, strict=True))]
        unseen = [draw(kind, (BATCH, *s), 100 + k) for k, (s, kind) in enumerate(zip(shapes, kinds, strict=True))]
        if isinstance(model, linen.Module):
            with jax.numpy_dtype_promotion("standard"):
                variables = jax.eval_shape(lambda *xs: model.init(jax.random.key(0), *xs, **apply_kwargs), *inputs)
            source = source_of(model, variables=_filled(variables), apply_kwargs=apply_kwargs)
        else:
            if isinstance(model, nnx.Module):
                model.eval()
                nnx.update(model, _filled(nnx.state(model, nnx.Not(nnx.RngState))))
            source = source_of(model, params=params, apply_kwargs=apply_kwargs)
        # Models run under the promotion of their users (Flax's average pooling needs it), the compiler under strict.
        source = dataclasses.replace(source, fun=jax.numpy_dtype_promotion("standard")(source.fun))
        stages = fuzz.compile_stages(source.fun, source.weights, inputs, recipe)
        fuzz.check(stages, inputs, thorough=False)
        assert census.float_avals(stages.lowered) == []
        float_model = jax.jit(source.fun, compiler_options=FAST_COMPILE)
        expected = jax.tree_util.tree_leaves_with_path(float_model(source.weights, *unseen))
        results = reference.evaluate(stages.folded, unseen)
        found = {tracing.path_name(k): sqnr_db([e], [r]) for (k, e), r in zip(expected, results, strict=True)}
        poor = {name: f"{db:.1f} dB" for name, db in found.items() if db < sqnr}
        assert not poor, poor
        return Compiled(stages, found)

    return run
