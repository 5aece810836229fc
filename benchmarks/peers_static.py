"""The peers' static quantization, every method of each, on a model that all of them are given.

    python -m benchmarks.peers_static PEER FOLDER

FOLDER holds `model.onnx` (float32, one example a call), `calibration.npz` and `test.npz`: `input0`, `input1`..., one
example per row, in the order of the model's inputs. Results go to `PEER.npz` there: `float`, the peer's own run of the
float model, and one array per method, or its error, as text, under `error:METHOD`.

A process of its own per peer, for the reasons in `worker.py`; imports neither jax nor qcompiler.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers_onnx import has_int8_dot, threads

#: Examples, one array per input with a leading axis of 1 -> the model's only result.
Run = Callable[[Sequence[np.ndarray]], np.ndarray]

#: What the products of a network are in ONNX; with these alone quantized, the rest stays float.
_PRODUCTS = ["Conv", "MatMul", "Gemm"]


def examples(path: Path) -> Iterator[list[np.ndarray]]:
    """The rows of a file of examples, each as a batch of one."""
    with np.load(path) as arrays:
        inputs = [arrays[f"input{i}"] for i in range(len(arrays.files))]
    for row in range(len(inputs[0])):
        yield [x[row : row + 1] for x in inputs]


def feeds(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The same by the names of the model's inputs."""
    for inputs in examples(path):
        yield {f"input{i}": x for i, x in enumerate(inputs)}


def _session_run(session: Any) -> Run:
    return lambda inputs: session.run(None, {f"input{i}": x for i, x in enumerate(inputs)})[0]


# onnxruntime


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    return _session_run(onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]))


def _onnxruntime_static(folder: Path, method: str, symmetric: bool, per_channel: bool, products: bool) -> Run:
    """`quantize_static` in QDQ form: s8 weights, u8 activations (s8 where symmetric).

    Weights take 7 bits where the CPU would saturate with 8.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, quantized = folder / "onnxruntime-prepared.onnx", folder / "onnxruntime-int8.onnx"
    if not prepared.exists():
        quant_pre_process(str(folder / "model.onnx"), str(prepared))

    class Examples(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left = feeds(folder / "calibration.npz")

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    quantization.quantize_static(
        str(prepared),
        str(quantized),
        Examples(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=_PRODUCTS if products else None,
        calibrate_method=quantization.CalibrationMethod[method],
        activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=per_channel,
        reduce_range=not has_int8_dot(),
        extra_options={"ActivationSymmetric": symmetric},
    )
    return _onnxruntime(quantized)


def _onnxruntime_methods() -> dict[str, Callable[[Path], Run]]:
    """Every calibration method, affine and symmetric activations, products alone and everything; weights per channel.

    Per tensor weights, which have fewer scales for the same bits, are tried with one of them.
    """
    found: dict[str, Callable[[Path], Run]] = {}
    for method, symmetric, products in itertools.product(
        ("MinMax", "Entropy", "Percentile"), (False, True), (True, False)
    ):
        name = f"{method}, {'symmetric' if symmetric else 'affine'}, {'products' if products else 'all ops'}"
        found[name] = lambda folder, m=method, s=symmetric, p=products: _onnxruntime_static(folder, m, s, True, p)
    found["MinMax, affine, products, per tensor"] = lambda f: _onnxruntime_static(f, "MinMax", False, False, True)
    return found


# OpenVINO


def _openvino(model: Any) -> Run:
    """In float32 where it is float: left alone, OpenVINO computes in bfloat16 on CPUs with AMX."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda inputs: np.array(request.infer(list(inputs))[0])


def _read(folder: Path) -> Any:
    import openvino

    return openvino.Core().read_model(folder / "model.onnx")


def _nncf(folder: Path, preset: str, fast: bool, ranges: str, transformer: bool) -> Run:
    """`nncf.quantize`: weights symmetric per channel, activations by the preset, bias correction fast or exact.

    `ranges` is NNCF's estimator for activations, its own default where it is empty: the ends of the range are then the
    means over examples. Weights have 8 bits everywhere where the CPU does not saturate with them.
    """
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    calibration = list(examples(folder / "calibration.npz"))
    chosen = {"activations_range_estimator_params": getattr(RangeEstimatorParametersSet, ranges)} if ranges else {}
    overflow = OverflowFix.DISABLE if has_int8_dot() else OverflowFix.ENABLE
    quantized = nncf.quantize(
        _read(folder),
        nncf.Dataset(calibration),
        preset=nncf.QuantizationPreset[preset.upper()],
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(calibration),
        fast_bias_correction=fast,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        advanced_parameters=AdvancedQuantizationParameters(overflow_fix=overflow, **chosen),
    )
    return _openvino(quantized)


def _nncf_methods() -> dict[str, Callable[[Path], Run]]:
    found: dict[str, Callable[[Path], Run]] = {}
    for preset, fast, ranges, transformer in itertools.product(
        ("mixed", "performance"), (True, False), ("", "MINMAX", "HISTOGRAM"), (False, True)
    ):
        words = [preset, f"{'fast' if fast else 'exact'} bias correction", *filter(None, [ranges])]
        options = dict(preset=preset, fast=fast, ranges=ranges, transformer=transformer)
        name = ", ".join([*words, *["transformer"] * transformer])
        found[name] = lambda folder, options=options: _nncf(folder, **options)
    return found


# AIMET


def _aimet(folder: Path, scheme: str, config: str, equalized: bool) -> Run:
    """`QuantizationSimModel`: 8-bit weights and activations, simulated in float by AIMET's own operator."""
    import onnx
    from aimet_onnx import quantsim
    from aimet_onnx.cross_layer_equalization import equalize_model

    model = onnx.load(str(folder / "model.onnx"))
    if equalized:
        equalize_model(model)
    simulated = quantsim.QuantizationSimModel(
        model, param_type="int8", activation_type="int8", quant_scheme=scheme, config_file=config
    )
    simulated.compute_encodings(feeds(folder / "calibration.npz"))
    # Its session reads what the simulation owns, in C++, and so may not outlive it.
    return lambda inputs: _session_run(simulated.session)(inputs)


def _aimet_methods() -> dict[str, Callable[[Path], Run]]:
    found: dict[str, Callable[[Path], Run]] = {}
    for scheme, config in itertools.product(("min_max", "tf_enhanced"), ("default", "htp_v81")):
        found[f"{scheme}, {config}"] = lambda folder, s=scheme, c=config: _aimet(folder, s, c, False)
    found["tf_enhanced, htp_v81, equalized"] = lambda folder: _aimet(folder, "tf_enhanced", "htp_v81", True)
    return found


#: Peer -> the packages it needs by the names they are imported under, its float model, its methods.
PEERS: dict[str, tuple[tuple[str, ...], Callable[[Path], Run], dict[str, Callable[[Path], Run]]]] = {
    "onnxruntime": (
        ("onnx", "onnxruntime"),
        lambda folder: _onnxruntime(folder / "model.onnx"),
        _onnxruntime_methods(),
    ),
    "nncf": (("onnx", "openvino", "nncf"), lambda folder: _openvino(_read(folder)), _nncf_methods()),
    "aimet": (
        ("onnx", "onnxruntime", "aimet_onnx"),
        lambda folder: _onnxruntime(folder / "model.onnx"),
        _aimet_methods(),
    ),
}


def main(peer: str, folder: Path) -> None:
    """The worker's end. A method that fails is told as such; the others go on."""
    _, make_float, methods = PEERS[peer]
    results: dict[str, np.ndarray] = {}
    for name, make in {"float": make_float, **methods}.items():
        print(f"{peer}: {name}", file=sys.stderr, flush=True)
        try:
            run = make(folder)
            results[name] = np.concatenate([run(inputs) for inputs in examples(folder / "test.npz")])
        except Exception as error:
            results[f"error:{name}"] = np.array(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    part = folder / f"{peer}.part.npz"
    np.savez(part, **results)
    os.replace(part, folder / f"{peer}.npz")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
