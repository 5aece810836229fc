"""Who is compared: every contender is made from the same weights and calibrated on the same images.

A contender's `make(subject)` gives a function from a batch to a `Call`, which is timed and whose result is compared
with float JAX. Those that need a package that is absent, or that cannot do the model, raise `Unavailable`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qcompiler as qc
from benchmarks.worker import Worker, WorkerFailed
from qcompiler import pipeline
from qcompiler.debug.report import sqnr_db

#: A float model that agrees less with float JAX than this after export is another model, and no peer.
EXPORT_DB = 60.0


class Unavailable(Exception):
    """A contender that cannot take part; the message says why, and what to do."""


@dataclasses.dataclass(eq=False)
class Subject:
    """What contenders are made from.

    Attributes:
      model: nnx, in evaluation mode; `float32[n, h, w, c]` images to `float32[n, classes]`.
      shifted: the same with shifted depthwise convolutions, or None.
      calibration: `float32[n, h, w, c]`.
      qmodel: ours, made from the model and these images.
      resources: closes the workers and removes their folder.
    """

    model: nnx.Module
    shifted: nnx.Module | None
    calibration: np.ndarray
    qmodel: qc.QuantizedModel
    resources: contextlib.ExitStack

    @functools.cached_property
    def reference(self) -> Callable[[Any], jax.Array]:
        """Float JAX with its weights as constants: what every time and every result is compared with."""
        return _constant(self.model)

    @functools.cached_property
    def folder(self) -> Path:
        """Where workers find the model and the images."""
        return Path(self.resources.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-speed-")))

    def folded(self, x: Any) -> qc.Program:
        """The float program at a batch, with its norms folded into its convolutions."""
        program = qc.trace(self.model, x).program
        for name in ("simplify", "fold_norms"):
            program = pipeline.PASSES[name](program, None)
        return program

    @functools.cached_property
    def onnx(self) -> Path:
        """The folder, with what `peers_onnx` reads in it."""
        import onnx

        from benchmarks import onnx_export

        first = self.calibration[:1]
        try:
            exported = onnx_export.export(self.folded(first))
        except onnx_export.NoOnnxRule as error:
            raise Unavailable(str(error)) from error
        onnx.save(exported, self.folder / "model.onnx")
        np.save(self.folder / "calibration.npy", self.calibration)
        return self.folder


class Call(Protocol):
    """A contender at one batch, ready to run."""

    def result(self) -> np.ndarray:
        """`float32[n, classes]`."""

    def seconds(self) -> float:
        """Runs once and says how long it took."""


@dataclasses.dataclass(frozen=True)
class JaxCall:
    """A compiled function of this process and its batch, which is on the device already."""

    function: Callable[[Any], Any]
    x: jax.Array

    def result(self) -> np.ndarray:
        return np.asarray(self.function(self.x))

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.function(self.x))
        return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class WorkerCall:
    """A batch that a worker has been given."""

    worker: Worker
    batch: int

    def result(self) -> np.ndarray:
        return self.worker.result(self.batch)

    def seconds(self) -> float:
        return self.worker.seconds(self.batch)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
      does: what it is, in a few words.
      make: from a subject to a function from a batch to a `Call`.
      needs: packages, by the name they are imported under.
    """

    does: str
    make: Callable[[Subject], Callable[[np.ndarray], Call]]
    needs: tuple[str, ...] = ()

    def prepare(self, subject: Subject) -> Callable[[np.ndarray], Call]:
        """`make`, after a look at the packages.

        Raises:
          Unavailable: a package is absent, or the contender cannot do this model.
        """
        absent = [n for n in self.needs if importlib.util.find_spec(n) is None]
        if absent:
            raise Unavailable(f"needs {', '.join(absent)}: pip install -e '.[peers]'")
        return self.make(subject)


def _constant(model: nnx.Module) -> Callable[[Any], jax.Array]:
    graphdef, state = nnx.split(model)
    return jax.jit(lambda x: nnx.merge(graphdef, state)(x))


def _jax(function: Callable[[Any], Any]) -> Callable[[np.ndarray], Call]:
    return lambda x: JaxCall(function, jnp.asarray(x))


def _float(subject: Subject) -> Callable[[np.ndarray], Call]:
    return _jax(subject.reference)


def _float_arguments(subject: Subject) -> Callable[[np.ndarray], Call]:
    graphdef, state = nnx.split(subject.model)
    function = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    return _jax(lambda x: function(state, x))


def _float_folded(subject: Subject) -> Callable[[np.ndarray], Call]:
    def at(x: np.ndarray) -> Call:
        program = subject.folded(x)
        return JaxCall(jax.jit(lambda x: program(x)[0]), jnp.asarray(x))

    return at


def _float_shifted(subject: Subject) -> Callable[[np.ndarray], Call]:
    if subject.shifted is None:
        raise Unavailable("the model has no variant with shifted depthwise convolutions")
    return _jax(_constant(subject.shifted))


def _int8(subject: Subject) -> Callable[[np.ndarray], Call]:
    return _jax(subject.qmodel)


def _qwix(subject: Subject) -> Callable[[np.ndarray], Call]:
    import qwix

    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
    return _jax(_constant(qwix.quantize_model(subject.model, qwix.PtqProvider([rule]), subject.calibration[:1])))


def _onnx(name: str) -> Callable[[Subject], Callable[[np.ndarray], Call]]:
    """A peer that runs ONNX, in a process of its own."""

    def make(subject: Subject) -> Callable[[np.ndarray], Call]:
        try:
            worker = Worker(name, subject.onnx)
        except WorkerFailed as error:
            raise Unavailable(str(error)) from error
        subject.resources.callback(worker.close)
        agreement = sqnr_db([np.asarray(subject.reference(subject.calibration[:1]))], [worker.float_result()])
        if not agreement >= EXPORT_DB:
            raise Unavailable(f"its float model is another one: {agreement:.1f} dB from float JAX after the export")

        def at(x: np.ndarray) -> Call:
            worker.give(x)
            return WorkerCall(worker, len(x))

        return at

    return make


#: By name, in the order of the table. `float` comes first: the others are compared with it.
CONTENDERS: dict[str, Contender] = {
    "float": Contender("float32, jax.jit, weights as constants", _float),
    "float-arguments": Contender("float32, jax.jit, weights as arguments", _float_arguments),
    "float-folded": Contender("float32, jax.jit, norms folded by us", _float_folded),
    "float-shifted": Contender("float32, jax.jit, depthwise convs as shifted multiply-adds", _float_shifted),
    "int8": Contender("qcompiler, integers only", _int8),
    "qwix": Contender("qwix PTQ, int8 weights, dynamic int8 activations", _qwix, ("qwix",)),
    "onnxruntime-float": Contender("float32", _onnx("onnxruntime-float"), ("onnx", "onnxruntime")),
    "onnxruntime-int8": Contender("static QDQ, per channel", _onnx("onnxruntime-int8"), ("onnx", "onnxruntime")),
    "openvino-float": Contender("float32", _onnx("openvino-float"), ("onnx", "openvino")),
    "openvino-int8": Contender("NNCF PTQ, mixed preset", _onnx("openvino-int8"), ("onnx", "openvino", "nncf")),
}
