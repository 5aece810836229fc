"""Seconds of every pass for a BERT of random weights, twelve layers unless asked otherwise.

    python -m benchmarks.passes --depth 12 --tokens 128 --verify types

Calibration is listed but is no pass; nor is the compilation by XLA, which comes with the first call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import qcompiler as qc
from qcompiler.debug import dumps
from qcompiler.models.bert import Bert, BertConfig


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.passes", description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=12, help="layers")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--verify", default="types", choices=("probe", "types", "off"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    heads = max(1, options.width // 64)
    model = Bert(BertConfig(width=options.width, depth=options.depth, heads=heads, hidden=4 * options.width))
    tokens = np.random.default_rng(0).integers(0, 30522, (1, options.tokens)).astype(np.int32)
    mask = np.ones_like(tokens)
    variables = jax.jit(model.init)(jax.random.key(0), tokens, mask)
    start = time.perf_counter()
    report = qc.quantize(model, [(tokens, mask)], variables=variables, verify=options.verify).report
    seconds = {record.name: record.seconds for record in report.passes}
    for name, spent in seconds.items():
        print(f"{name:<18} {spent:7.2f} s")
    passes = sum(spent for name, spent in seconds.items() if name != "calibrate")
    total = time.perf_counter() - start
    print(f"passes {passes:.1f} s, all with verification {total:.1f} s, {len(report.islands)} islands")
    if options.json:
        figures = {"passes": seconds, "seconds": passes, "islands": len(report.islands), "jax": jax.__version__}
        dumps.write_text(options.json, json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
