"""AIMET's encodings 2.0.0: one entry per tensor, in the words of `onnx::QuantizeLinear` (opset 23).

    {"version": "2.0.0", "encodings": [
      {"name": "conv.weight", "output_dtype": "int8", "y_scale": [0.01, 0.02], "axis": 0},
      {"name": "input", "output_dtype": "uint8", "y_scale": 0.02, "y_zero_point": 128}]}

Source: AIMET, "Encoding Format Specification", version 2.0.0. Affine codes are written as unsigned ones, symmetric
codes as signed ones. ONNX has integers of 2, 4, 8, 16 and 32 bits; codes of other widths are written in the next of
these with `bits`, and narrow ranges with `narrow_range`: keys of our own, without which a reader saturates later, and
no code differs that does not saturate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompiler import json_files
from qcompiler.errors import RecipeError
from qcompiler.interchange import layout, numbers
from qcompiler.interchange.collecting import Encodings
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType

VERSION = "2.0.0"
_WIDTHS = (2, 4, 8, 16, 32)
_TOP = ("version", "encodings", "producer", "quantizer_args", "excluded_layers")
_LPBQ = ("per_channel_float_scale", "per_block_int_scale")
_ENTRY = ("name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size", *_LPBQ, "bits", "narrow_range")


def document(encodings: Encodings) -> dict[str, Any]:
    """The file's data."""
    every = {**encodings.activations, **encodings.params, **encodings.biases}
    entries = [_entry(name, encoding, encodings.shapes.get(name, ())) for name, encoding in every.items()]
    return {"version": VERSION, "encodings": entries}


def _entry(name: str, encoding: Encoding, shape: tuple[int, ...]) -> dict[str, Any]:
    qtype = encoding.type
    scale, zero, axis, block = layout.to_onnx(encoding, shape)
    width = next(n for n in _WIDTHS if n >= qtype.bits)
    unsigned = 0 if qtype.symmetric else 1 << (qtype.bits - 1)
    entry: dict[str, Any] = {"name": name, "output_dtype": f"{'u' if unsigned else ''}int{width}"}
    entry |= {"y_scale": scale.astype(np.float64).tolist(), "y_zero_point": (zero.astype(np.int64) + unsigned).tolist()}
    entry |= {} if axis is None else {"axis": axis}
    entry |= {} if block is None else {"block_size": block}
    entry |= {} if width == qtype.bits else {"bits": qtype.bits}
    return entry | ({"narrow_range": True} if qtype.narrow_range else {})


def parse(data: Any, where: str) -> tuple[dict[str, Encoding], list[Any]]:
    """Name -> encoding, and no supergroups.

    Args:
      data: of the file.
      where: the file, for messages.

    Raises:
      RecipeError: another version, or an entry that cannot be.
    """
    if not isinstance(data, dict) or "encodings" not in data:
        raise RecipeError(f"{where} has no `encodings`")
    if data.get("version") != VERSION:
        raise RecipeError(
            f"{where} has encodings of version {data.get('version')!r}; read are {VERSION}, and older as qnn"
        )
    json_files.check_keys(data, _TOP, where)
    entries = data["encodings"]
    if isinstance(entries, dict):
        entries = [{"name": name, **entry} if isinstance(entry, dict) else entry for name, entry in entries.items()]
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in entries
    ):
        raise RecipeError(f"{where}: `encodings` is a list of objects that have a `name`")
    found: dict[str, Encoding] = {}
    for entry in entries:
        if entry["name"] in found:
            raise RecipeError(f"{where} has two encodings of {entry['name']!r}")
        found[entry["name"]] = _encoding(entry, f"{where}: {entry['name']}")
    return found, []


def _encoding(entry: Mapping[str, Any], where: str) -> Encoding:
    json_files.check_keys(entry, _ENTRY, where)
    bits, signed = _width(entry.get("output_dtype"), where)
    if "bits" in entry:
        bits = numbers.integer(entry["bits"], f"{where}: bits", 2, bits)
    if all(key in entry for key in _LPBQ):
        scale = _expanded(entry, where)
    elif "y_scale" in entry:
        scale = numbers.scales(entry["y_scale"], f"{where}: y_scale")
    else:
        raise RecipeError(f"{where} has no y_scale")
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    given = entry.get("y_zero_point")
    zero = numbers.whole(0 if given is None else given, f"{where}: y_zero_point", low, high)
    if zero.shape not in ((), scale.shape):
        raise RecipeError(f"{where}: y_zero_point has the shape {zero.shape}, y_scale {scale.shape}")
    zero = np.broadcast_to(zero, scale.shape) - (0 if signed else 1 << (bits - 1))
    narrow = numbers.flag(entry.get("narrow_range", False), f"{where}: narrow_range")
    qtype = QuantType(bits, symmetric=signed and not zero.any(), narrow_range=narrow)
    axis = entry.get("axis")
    axis = None if axis is None else numbers.integer(axis, f"{where}: axis", -16, 15)
    block = numbers.integer(entry.get("block_size") or 0, f"{where}: block_size", 0, 1 << 31)
    try:
        return layout.of_onnx(qtype, scale, zero, axis, block)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


def _width(name: Any, where: str) -> tuple[int, bool]:
    """Bits of an integer type, and whether it is signed."""
    found = re.fullmatch(r"(u?)int(\d+)", name) if isinstance(name, str) else None
    if found is not None and int(found[2]) in _WIDTHS:
        return int(found[2]), not found[1]
    hint = "; keep the layer in float by a qc.Rule" if "float" in str(name) else ""
    raise RecipeError(f"{where}: output_dtype is one of int and uint of {_WIDTHS} bits, got {name!r}{hint}")


def _expanded(entry: Mapping[str, Any], where: str) -> np.ndarray:
    """Scales of low-power blocks (LPBQ): a float per channel times an integer per block."""
    channel, block = (numbers.scales(entry[key], f"{where}: {key}") for key in _LPBQ)
    try:
        return channel * block
    except ValueError as error:
        raise RecipeError(f"{where}: {_LPBQ[0]} {channel.shape} and {_LPBQ[1]} {block.shape} do not fit") from error
