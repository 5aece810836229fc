"""The peers that run ONNX, each as its own documentation says to run it on a CPU.

A builder takes a folder that holds `model.onnx` (float32, norms folded) and `calibration.npy`, and returns a function
from `float32[n, h, w, c]` images to logits. Every builder uses as many threads as JAX: the cores this process may use.
Runs in a worker process (`worker.py`), and so imports neither jax nor qcompiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


def threads() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_int8_dot() -> bool:
    """Whether the CPU multiplies u8 by s8 without saturating in 16 bits (x86: VNNI; Arm always does)."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "vnni" in flags or "asimddp" in flags


def onnxruntime_session(path: Path) -> Run:
    """A model in onnxruntime, at its highest level of graph optimization (the default)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def onnxruntime_float(folder: Path) -> Run:
    """The float model."""
    return onnxruntime_session(folder / "model.onnx")


def onnxruntime_int8(folder: Path) -> Run:
    """Static quantization: QDQ, u8 activations, s8 weights per channel, minimum and maximum of the calibration images.

    Weights take 7 bits where the CPU would saturate with 8.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    images = np.load(folder / "calibration.npy")
    prepared, quantized = folder / "onnxruntime-prepared.onnx", folder / "onnxruntime-int8.onnx"
    quant_pre_process(str(folder / "model.onnx"), str(prepared), skip_symbolic_shape=True)
    name = onnxruntime_input(prepared)

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._left, None)
            return None if image is None else {name: image[None]}

    quantization.quantize_static(
        str(prepared),
        str(quantized),
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        reduce_range=not has_int8_dot(),
    )
    return onnxruntime_session(quantized)


def onnxruntime_input(path: Path) -> str:
    """The name of a model's input."""
    import onnx

    return onnx.load(str(path), load_external_data=False).graph.input[0].name


def openvino_compiled(model: Any, settings: dict[str, Any] | None = None) -> Run:
    """A model in OpenVINO for one request at a time; compiled anew for every batch size, as jax.jit is."""
    import openvino

    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads(), **(settings or {})}
    compiled: dict[tuple[int, ...], Any] = {}

    def run(x: np.ndarray) -> np.ndarray:
        if x.shape not in compiled:
            static = model.clone()
            static.reshape(list(x.shape))
            compiled[x.shape] = core.compile_model(static, "CPU", settings).create_infer_request()
        return compiled[x.shape].infer([x], share_inputs=True)[0]

    return run


def openvino_float(folder: Path) -> Run:
    """The float model in float32: left alone, OpenVINO computes in bfloat16 on CPUs with AMX."""
    import openvino

    model = openvino.Core().read_model(folder / "model.onnx")
    return openvino_compiled(model, {"INFERENCE_PRECISION_HINT": "f32"})


def openvino_int8(folder: Path) -> Run:
    """NNCF post-training quantization: symmetric weights per channel, affine activations, fast bias correction."""
    import nncf
    import openvino

    model = openvino.Core().read_model(folder / "model.onnx")
    images = np.load(folder / "calibration.npy")
    quantized = nncf.quantize(
        model,
        nncf.Dataset([image[None] for image in images]),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(images),
    )
    return openvino_compiled(quantized)


#: Contender -> the builder of the float model it starts from, and its own.
BUILDERS: dict[str, tuple[Callable[[Path], Run], Callable[[Path], Run]]] = {
    "onnxruntime-float": (onnxruntime_float, onnxruntime_float),
    "onnxruntime-int8": (onnxruntime_float, onnxruntime_int8),
    "openvino-float": (openvino_float, openvino_float),
    "openvino-int8": (openvino_float, openvino_int8),
}
