"""Whose integers are closest to float: logits' SQNR of ours and of peers, from one model, one calibration set, 8 bits.

    python -m benchmarks.peers_accuracy --models resnet minilm --test 512 --json peers.json

Needs `pip install -e '.[peers,aimet]'`, and for MiniLM `'.[minilm]'`; peers that are absent are said and left out. All
start from the same trained float model, exported from our traced program with its norms folded; an export that does not
compute the same is no peer. A peer stands in the table with the best of its methods (`--all` prints each), chosen by
the very results that are compared: more than anyone who calibrates could know. Convolutions and dots have operands of 8
bits everywhere; `default` and `accurate` may also take 16 for some, `w8a8` may not.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qcompiler as qc
from benchmarks import peers_static
from benchmarks.contenders import EXPORT_DB
from benchmarks.variants import VARIANTS
from qcompiler import pipeline
from qcompiler.debug import dumps
from qcompiler.debug.progress import ProgressBar
from qcompiler.debug.report import sqnr_db
from qcompiler.models import huggingface, mobilenet, procedural, text, trained

_BATCH = 16
_SENTENCE_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is quantized.

    Attributes:
      model: an nnx module in evaluation mode, or a linen one.
      calibration, test: one array per input of the model, examples along axis 0.
      variables: of a linen module, else None.
    """

    model: Any
    calibration: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    variables: Any = None

    @property
    def options(self) -> dict[str, Any]:
        """What `qc.quantize` and `qc.trace` need besides the model."""
        return {} if self.variables is None else {"variables": self.variables}

    def folded(self) -> qc.Program:
        """The float program of one example, norms folded."""
        program = qc.trace(self.model, *(x[:1] for x in self.test), **self.options).program
        for name in ("simplify", "fold_norms"):
            program = pipeline.PASSES[name](program, None)
        return program


def _convnet(name: str, calibration: int, test: int) -> Subject:
    settings = trained.settings_of(name)
    model, _ = trained.trained(settings)
    draw = lambda stream, count: (procedural.examples(stream, 0, count, size=settings.size)[0],)
    return Subject(model, draw("calibration", calibration), draw("test", test))


def _minilm(name: str, calibration: int, test: int) -> Subject:
    folder = huggingface.minilm_folder()
    model, variables = huggingface.sentence_encoder(folder)
    tokenize = huggingface.tokenizer(folder, _SENTENCE_LENGTH)
    found = text.functions()[: calibration + test]
    tokens = tokenize([f.description if k % 2 else f.source for k, f in enumerate(found)])
    return Subject(
        model, tuple(x[:calibration] for x in tokens), tuple(x[calibration:] for x in tokens), variables=variables
    )


#: Row of the table -> its subject, from numbers of calibration and of test examples.
SUBJECTS: dict[str, Callable[[str, int, int], Subject]] = {**dict.fromkeys(trained.MODELS, _convnet), "minilm": _minilm}


def outputs_of(model: Callable[..., Any], inputs: Sequence[np.ndarray], label: str) -> np.ndarray:
    """`float32[n, ...]`, in batches of one shape; the last is filled up with copies of its first example."""
    bar, found = ProgressBar(label, len(inputs[0])), []
    try:
        for first in range(0, len(inputs[0]), _BATCH):
            parts = [x[first : first + _BATCH] for x in inputs]
            kept = len(parts[0])
            parts = [np.concatenate([x, np.repeat(x[:1], _BATCH - kept, axis=0)]) for x in parts]
            found.append(np.asarray(model(*parts), np.float32)[:kept])
            bar.update(first + kept)
    finally:
        bar.close()
    return np.concatenate(found)


def _float(subject: Subject) -> Callable[..., Any]:
    if subject.variables is not None:
        return jax.jit(lambda *x: subject.model.apply(subject.variables, *x))
    graphdef, state = nnx.split(subject.model)
    return jax.jit(lambda *x: nnx.merge(graphdef, state)(*x))


def ours(subject: Subject, recipe: qc.Recipe) -> np.ndarray:
    """The integers' results on the test examples."""
    count = len(subject.calibration[0])
    batches = [tuple(x[i : i + _BATCH] for x in subject.calibration) for i in range(0, count, _BATCH)]
    batches = [qc.call(*batch) for batch in batches]
    return outputs_of(qc.quantize(subject.model, batches, recipe=recipe, **subject.options), subject.test, "ours")


def qwix_static(subject: Subject, method: str, attention: bool = True) -> np.ndarray:
    """qwix post-training quantization with static activation scales, from one batch of all calibration examples.

    Args:
      subject: what is quantized.
      method: of the activations' calibration, `absmax` or `minmax`.
      attention: also products of activations, which qwix knows as einsums; it fails on those inside `vmap`.
    """
    import qwix

    rule = dict(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8, act_static_scale=True)
    if not attention:
        rule["op_names"] = ("conv_general_dilated", "dot_general")
    rules = [qwix.QuantizationRule(**rule, act_calibration_method=method)]
    calibration = tuple(map(jnp.asarray, subject.calibration))
    if subject.variables is None:
        model = qwix.quantize_model(subject.model, qwix.PtqProvider(rules), *calibration)
        return outputs_of(_float(dataclasses.replace(subject, model=model)), subject.test, "qwix")
    observing = qwix.quantize_model(subject.model, qwix.QtProvider(rules))
    _, state = observing.apply(subject.variables, *calibration, mutable=["quant_stats"])
    model = qwix.quantize_model(subject.model, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(model.init, jax.random.key(0), *calibration)["params"]
    params = qwix.quantize_params(subject.variables["params"], abstract, state["quant_stats"])
    return outputs_of(_float(dataclasses.replace(subject, model=model, variables={"params": params})), subject.test,
                      "qwix")  # fmt: skip


def _absent(needs: Sequence[str]) -> str | None:
    """A message that names the packages that are not installed, or None."""
    absent = [n for n in needs if importlib.util.find_spec(n) is None]
    return f"needs {', '.join(absent)}: pip install -e '.[peers,aimet]'" if absent else None


def _qwix_results(subject: Subject) -> dict[str, np.ndarray | str]:
    if message := _absent(["qwix"]):
        return {"": message}
    results: dict[str, np.ndarray | str] = {}
    for method, attention in itertools.product(("absmax", "minmax"), (True, False)):
        name = method if attention else f"{method}, attention in float"
        try:
            with jax.numpy_dtype_promotion("standard"):  # JAX's default, which qwix relies on.
                results[name] = qwix_static(subject, method, attention)
        except Exception as error:  # A peer's own failure is a result.
            results[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return results


def peer_results(peer: str, folder: Path, expected: np.ndarray) -> dict[str, np.ndarray | str]:
    """Method -> results on the test examples, or why there are none; of a peer in a process of its own.

    Args:
      peer: a key of `peers_static.PEERS`.
      folder: as `peers_static` wants it.
      expected: results of float JAX, that the peer's float model must give too.
    """
    if message := _absent(peers_static.PEERS[peer][0]):
        return {"": message}
    log = folder / f"{peer}.log"
    with log.open("w") as out:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.peers_static", peer, str(folder)],
            cwd=Path(__file__).resolve().parent.parent,
            # A benchmark reports to nobody: NNCF and OpenVINO send usage data otherwise.
            env={**os.environ, "NNCF_CI": "1", "CI": "true"},
            stdout=out,
            stderr=out,
            check=False,
        )
    if not (folder / f"{peer}.npz").exists():
        last = [t for t in log.read_text().splitlines() if t.strip()][-1:]
        return {"": f"its worker died: {' '.join(last)[:200]}"}
    with np.load(folder / f"{peer}.npz") as arrays:
        results = {n.removeprefix("error:"): str(arrays[n]) if n.startswith("error:") else arrays[n] for n in arrays}
    reference = results.pop("float")
    if isinstance(reference, str):
        return {"": reference}
    agreement = sqnr_db([expected], [reference])
    if not agreement >= EXPORT_DB:
        return {"": f"its float model is another one: {agreement:.1f} dB from float JAX after the export"}
    return results


def measure(subject: Subject, variants: Sequence[str], peers: Sequence[str]) -> list[dict[str, Any]]:
    """One row per contender and method: `sqnr_db`, `cosine` (mean, of result rows), or `error`."""
    expected = outputs_of(_float(subject), subject.test, "float")
    found: dict[str, dict[str, np.ndarray | str]] = {name: {"": ours(subject, VARIANTS[name])} for name in variants}
    if "qwix" in peers:
        found["qwix"] = _qwix_results(subject)
    exported = [p for p in peers if p in peers_static.PEERS]
    with tempfile.TemporaryDirectory(prefix="qcompiler-peers-") as name:
        folder = Path(name)
        if exported and (message := _export(subject, folder)):
            found.update({peer: {"": message} for peer in exported})
            exported = []
        for peer in exported:
            found[peer] = peer_results(peer, folder, expected)
    rows = []
    for contender, results in found.items():
        for method, result in results.items():
            row = {"contender": contender, "method": method, "ours": contender in variants}
            rows.append(row | ({"error": result} if isinstance(result, str) else _figures(expected, result)))
    return rows


def _export(subject: Subject, folder: Path) -> str | None:
    """Leaves what `peers_static` reads; a message if that cannot be done."""
    if message := _absent(["onnx"]):
        return message
    import onnx

    from benchmarks import onnx_export

    try:
        onnx.save(onnx_export.export(subject.folded(), fixed=True), folder / "model.onnx")
    except onnx_export.NoOnnxRule as error:
        return str(error)
    for part in ("calibration", "test"):
        np.savez(folder / f"{part}.npz", **{f"input{i}": x for i, x in enumerate(getattr(subject, part))})
    return None


def _figures(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:
    lengths = np.linalg.norm(expected, axis=-1) * np.linalg.norm(got, axis=-1)
    cosines = np.sum(expected * got, axis=-1) / np.maximum(lengths, 1e-30)
    return {"sqnr_db": float(sqnr_db([expected], [got])), "cosine": float(np.mean(cosines))}


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row with the highest SQNR of each contender, or its first error."""
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        before = kept.get(row["contender"])
        if before is None or row.get("sqnr_db", -math.inf) > before.get("sqnr_db", -math.inf):
            kept[row["contender"]] = row
    return list(kept.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers_accuracy", description=__doc__.partition("\n")[0])
    peers = ["qwix", *peers_static.PEERS]
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument(
        "--variants", nargs="*", default=["default", "w8a8", "accurate"], choices=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--peers", nargs="*", default=peers, choices=peers)
    parser.add_argument("--test", type=int, default=512, help="held-out images or sentences")
    parser.add_argument("--calibration", type=int, default=64, help="images or sentences, in batches of 16")
    parser.add_argument("--all", action="store_true", help="print every method of the peers, not the best alone")
    parser.add_argument("--json", type=Path, help="write the figures here, after every model")
    options = parser.parse_args(arguments)
    if options.calibration < 1 or options.calibration % _BATCH or options.test < 2:
        parser.error(f"calibration examples come in batches of {_BATCH}, and at least 2 are tested")

    print(f"jax {jax.__version__}, Python {sys.version.split()[0]}, {jax.default_backend()}; {options.calibration} "
          f"calibration and {options.test} test examples")  # fmt: skip
    print(f"{'model':<13} {'contender':<12} {'SQNR dB':>8} {'cosine':>8}  method")
    figures: dict[str, Any] = {}
    for name in options.models:
        subject = SUBJECTS[name](name, options.calibration, options.test)
        if name in trained.MODELS:
            mobilenet.use_depthwise(subject.model, "conv")
        figures[name] = rows = measure(subject, options.variants, options.peers)
        for row in rows if options.all else best(rows):
            if "error" in row:
                print(f"{name:<13} {row['contender']:<12} {'-':>8} {'-':>8}  {row['method']} {row['error']}")
            else:
                print(f"{name:<13} {row['contender']:<12} {row['sqnr_db']:>8.2f} {row['cosine']:>8.5f}  "
                      f"{row['method']}")  # fmt: skip
        sys.stdout.flush()
        if options.json:
            dumps.write_text(options.json, json.dumps({"jax": jax.__version__, "models": figures}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
