"""How well weights survive each granularity, symmetry and number of bits, and the bytes that they take so.

    python -m benchmarks.granularity --models resnet mobilenet_v2 llama --json granularity.json

Rows are weights of trained networks (of every dot and conv, batch norms folded in) and drawn ones: normal, and
heavy-tailed (Student's t with 3 degrees of freedom), both with ranges of their own per channel as trained layers have;
and what a ReLU leaves of normal numbers, which shows what zero points are for. SQNR is of the weights themselves, the
mean over layers in dB; the share of noise is that left of per-tensor scales (the table of granularities that the
project starts from has 0.72 per channel, 0.41 in groups of 128, 0.26 in groups of 32 for a model it does not name).
Bytes are those that the program holds per weight, with scales, steps and zero points.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qcompiler as qc
from qcompiler import pipeline
from qcompiler.debug import dumps
from qcompiler.debug.progress import ProgressBar
from qcompiler.ir.constants import Constants
from qcompiler.ir.program import Program
from qcompiler.models import trained
from qcompiler.numerics import fixed_point, groups, packing
from qcompiler.numerics.types import QuantType
from qcompiler.passes.insert_qdq import channel_scale, weight_scale

GRANULARITIES = ("tensor", "channel", "group128", "group64", "group32")
BITS = (8, 4, 3, 2)


@dataclasses.dataclass(frozen=True)
class Layer:
    """How one weight is quantized: its noise as a share of its power, and the bytes it is stored in."""

    signal: float
    noise: float
    bytes: int
    weights: int


def drawn(size: int) -> dict[str, np.ndarray]:
    """Kind -> float32 matrix, [size, size], contracted along its rows."""
    generator = np.random.default_rng(0)
    channels = np.exp(0.5 * generator.normal(size=size))
    return {
        "normal": (generator.normal(size=(size, size)) * channels).astype(np.float32),
        "heavy-tailed": (generator.standard_t(3, size=(size, size)) * channels).astype(np.float32),
        "relu of normal": np.maximum(generator.normal(size=(size, size)), 0).astype(np.float32),
    }


def partitioned(model: Any, example: Any, **how: Any) -> Program:
    """A model's products as the compiler quantizes them."""
    program = qc.trace(model, example, **how).program
    for name in ("simplify", "fold_norms", "partition"):
        program = pipeline.PASSES[name](program, qc.Recipe())
    return program


def programs(names: Sequence[str], size: int) -> Iterator[tuple[str, Program]]:
    """Name -> program, of trained networks and of a product with each drawn matrix."""
    for name in names:
        settings = trained.settings_of(name)
        tokens = name in trained.LANGUAGE_MODELS
        shape = (1, settings.size) if tokens else (1, settings.size, settings.size, 3)
        example = jax.ShapeDtypeStruct(shape, jnp.int32 if tokens else jnp.float32)
        yield name, partitioned(trained.trained(settings)[0], example)
    for kind, matrix in drawn(size).items():
        x = jax.ShapeDtypeStruct((1, size), jnp.float32)
        yield kind, partitioned(lambda w, x: x @ w, x, params=matrix)


def weights_of(program: Program, recipe: qc.Recipe) -> Iterator[tuple[np.ndarray, QuantType]]:
    """The weight of every product, and the type that a recipe gives it."""
    typed = pipeline.PASSES["assign_precision"](program, recipe)
    constants = Constants(typed)
    for eqn in typed.eqns:
        types = typed.notes["types"].get(eqn.params.get("id"), ())
        for var, role, qtype in zip(eqn.invars, eqn.params.get("roles", ()), types, strict=False):
            if role == "weight":
                yield np.asarray(constants.value(var)), qtype


def quantized(array: np.ndarray, qtype: QuantType) -> Layer:
    """What a type makes of a weight."""
    scale, zero = weight_scale(array, qtype)
    codes = fixed_point.quantize_number(array, scale, zero, qtype)
    noise = float(np.sum((array.astype(np.float64) - (codes - zero) * scale.astype(np.float64)) ** 2))
    packed = packing.packed_size(codes.size, qtype.bits) if qtype.bits <= 4 else codes.size
    # A channel's scale is a multiplier of 4 bytes and a shift, its zero point an int32; a group's are a byte each.
    held = 5 * channel_scale(array, qtype).size
    if qtype.contracted:
        held += groups.choose(array, qtype).steps.size * (1 if qtype.symmetric else 2)
    elif not qtype.symmetric:
        held += 4 * zero.size
    return Layer(float(np.sum(array.astype(np.float64) ** 2)), noise, packed + held, codes.size)


def table_of(program: Program, bits: Sequence[int]) -> dict[str, dict[str, Any]]:
    """(bits, symmetry) -> granularity -> SQNR, noise beside that of per-tensor scales, bytes per weight."""
    found: dict[str, dict[str, Any]] = {}
    cases = [(b, symmetric) for b in bits for symmetric in (True, False)]
    progress = ProgressBar("weights", len(cases) * len(GRANULARITIES))
    for number, (b, symmetric) in enumerate(cases):
        row = found[f"{b} bits, {'symmetric' if symmetric else 'affine'}"] = {}
        for k, name in enumerate(GRANULARITIES):
            weight = qc.QuantType(b, symmetric=symmetric, narrow_range=symmetric)
            layers = [quantized(*w) for w in weights_of(program, qc.Recipe(weight=weight, granularity=name))]
            shares = [layer.noise / layer.signal for layer in layers if layer.signal > 0]
            row[name] = {
                "sqnr_db": float(np.mean([-10 * np.log10(share) for share in shares])),
                "relative_noise": float(np.mean(shares)),
                "bytes_per_weight": sum(x.bytes for x in layers) / sum(x.weights for x in layers),
            }
            progress.update(number * len(GRANULARITIES) + k + 1)
        for cell in row.values():
            cell["noise_left"] = cell["relative_noise"] / row["tensor"]["relative_noise"]
    progress.close()
    return found


def text_of(table: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per bits and symmetry; in its cells SQNR in dB, the share of noise left, bytes per weight."""
    lines = [f"{'':<20}" + "".join(f"{name:>22}" for name in GRANULARITIES)]
    for label, row in table.items():
        cells = [f"{c['sqnr_db']:8.1f} {c['noise_left']:6.2f} {c['bytes_per_weight']:6.3f}" for c in row.values()]
        lines.append(f"{label:<20}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.granularity", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=["resnet", "mobilenet_v2", "llama"], metavar="NAME")
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), choices=range(2, 9), metavar="BITS")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of drawn matrices")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(trained.names()):
        parser.error(f"no network is named {', '.join(sorted(unknown))}; there are {', '.join(trained.names())}")
    print("each cell: SQNR in dB, noise as a share of that of per-tensor scales, bytes per weight")
    figures = {}
    for name, program in programs(options.models, options.size):
        figures[name] = table_of(program, options.bits)
        print(f"\n{name}\n{text_of(figures[name])}", flush=True)
    if options.json:
        dumps.write_text(options.json, json.dumps({"jax": jax.__version__, "weights": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
