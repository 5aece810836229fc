"""RMSNorm with SiLU, LayerNorm and softmax, int8 to int8, against float32 and bfloat16 under `jax.jit`, interleaved.

    python -m benchmarks.norms --rows 4096 --channels 4096 --json norms.json

The integer functions are what the compiler makes of the float ones, codes in and codes out. The cosine is that of all
results with those of float32 on the same codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qcompiler as qc
from qcompiler.debug import dumps, timing

CODES = qc.QuantType(8)
RECIPE = qc.Recipe(activation=CODES, stream=CODES, output=CODES, stream_range="minmax")


def functions(channels: int) -> dict[str, Callable[[Any], Any]]:
    """Name -> a function of `[rows, channels]` in any float dtype, with weights of its own."""
    generator = np.random.default_rng(0)
    gamma = (1 + 0.1 * generator.normal(size=channels)).astype(np.float32)
    beta = (0.1 * generator.normal(size=channels)).astype(np.float32)

    def rms_norm_silu(x: Any) -> Any:
        mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        y = x * jax.lax.rsqrt(mean + np.asarray(1e-6, x.dtype))
        return jax.nn.silu(y * gamma.astype(x.dtype) + beta.astype(x.dtype))

    def layer_norm(x: Any) -> Any:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + np.asarray(1e-6, x.dtype))
        return y * gamma.astype(x.dtype) + beta.astype(x.dtype)

    return {"rms_norm_silu": rms_norm_silu, "layer_norm": layer_norm, "softmax": lambda x: jax.nn.softmax(x, axis=-1)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norms", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    found = {}
    print("function        int8 ms  float32 ms  bfloat16 ms  times as fast as float32, bfloat16   cosine")
    for name, fun in functions(options.channels).items():
        row = found[name] = measure(fun, options.rows, options.channels, options.rounds)
        print(
            f"{name:14} {row['int8_ms']:8.1f}  {row['float32_ms']:10.1f}  {row['bfloat16_ms']:11.1f}  "
            f"{row['times_float32']:24.2f}, {row['times_bfloat16']:8.2f}   {row['cosine']:.6f}"
        )
    if options.json:
        dumps.write_text(Path(options.json), json.dumps(found, indent=2) + "\n")
    return 0


def measure(fun: Callable[[Any], Any], rows: int, channels: int, rounds: int) -> dict[str, float]:
    """Median milliseconds, ratios and the cosine of one function on N(0, 1)."""
    generator = np.random.default_rng(1)
    sample = generator.normal(size=(min(rows, 256), channels)).astype(np.float32)
    qmodel = qc.quantize(fun, [sample], recipe=RECIPE, io="int", verify="types")
    x = generator.normal(size=(rows, channels)).astype(np.float32)
    (entry,), (end,) = qmodel.input_encodings.values(), qmodel.output_encodings
    codes = entry.quantize(x)
    stored = entry.dequantize(codes)
    half = jnp.asarray(stored, jnp.bfloat16)
    whole = jnp.asarray(stored)
    float_jit, int_jit = jax.jit(fun), jax.jit(qmodel)
    contenders = {
        "int8": lambda: int_jit(codes),
        "float32": lambda: float_jit(whole),
        "bfloat16": lambda: float_jit(half),
    }
    times = timing.interleaved(contenders, rounds)
    expected = np.asarray(float_jit(whole), np.float64).ravel()
    got = np.asarray(end.dequantize(int_jit(codes)), np.float64).ravel()
    cosine = float(expected @ got / np.linalg.norm(expected) / np.linalg.norm(got))
    return {
        **{f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()},
        **{f"times_{name}": timing.speedup(times[name], times["int8"]) for name in ("float32", "bfloat16")},
        "cosine": cosine,
    }


if __name__ == "__main__":
    sys.exit(main())
