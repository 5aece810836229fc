"""QNN's `quantization_overrides.json`, which is also AIMET's encodings before 2.0.0.

    {"activation_encodings": {"input": [{"bitwidth": 8, "min": -1.0, "max": 1.0, "scale": 0.0078, "offset": -128,
                                         "is_symmetric": "False", "dtype": "int"}]},
     "param_encodings": {"layers.*.weight": [{"bitwidth": 4, "is_symmetric": "True"}]},
     "supergroups": [{"op_list": ["Conv", "Relu"], "fuse": true}]}

real = (q + offset) * scale with q from 0 to 2**bitwidth - 1, so the offset is minus the zero point of unsigned codes. A
list of several entries is of output channels. Without numbers an entry says the type alone; `"dtype": "int4"` says the
bits, too. Names may be globs, or start with `.*` and be regular expressions. Entries of version 1.0.0, lists with
`name`, `bw`, `is_sym`, `scale` and `offset`, are read as well. Source: QAIRT, "Quantization Specification"; AIMET,
"Encoding Format Specification", versions 0.6.1 and 1.0.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import json_files
from qcompiler.errors import QuantizationError, RecipeError
from qcompiler.interchange import numbers
from qcompiler.interchange.collecting import Encodings
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType

VERSION = "0.6.1"
_SECTIONS = ("activation_encodings", "param_encodings")
_TOP = (*_SECTIONS, "supergroups", "version", "producer", "quantizer_args", "excluded_layers")
_ENTRY = ("bitwidth", "dtype", "is_symmetric", "min", "max", "scale", "offset")
_NEWER = {"bw": "bitwidth", "is_sym": "is_symmetric"}


def document(encodings: Encodings) -> dict[str, Any]:
    """The file's data."""
    written = lambda section: {name: _entries(encoding) for name, encoding in section.items()}
    params = {**encodings.params, **encodings.biases}
    return {
        "version": VERSION,
        "activation_encodings": written(encodings.activations),
        "param_encodings": written(params),
    }


def _entries(encoding: Encoding) -> list[dict[str, Any]]:
    """An entry per scale, the channels of several dimensions in row-major order."""
    qtype, scale = encoding.type, np.asarray(encoding.scale)
    zero = np.broadcast_to(np.asarray(encoding.zero_point), scale.shape)
    return [
        {
            "bitwidth": qtype.bits,
            "dtype": "int",
            "is_symmetric": str(qtype.symmetric),
            "min": (qtype.qmin - z) * s,
            "max": (qtype.qmax - z) * s,
            "scale": s,
            "offset": -z - (1 << (qtype.bits - 1)),
        }
        for s, z in zip(scale.astype(np.float64).ravel().tolist(), zero.ravel().tolist(), strict=True)
    ]


def parse(data: Any, where: str) -> tuple[dict[str, Encoding | QuantType], list[tuple[list[str], bool]]]:
    """Name -> encoding or type alone, and (ops, whether they are one) of supergroups.

    Args:
      data: of the file.
      where: the file, for messages.

    Raises:
      RecipeError: an entry that cannot be.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where} is no object with {' and '.join(_SECTIONS)}")
    json_files.check_keys(data, _TOP, where)
    found: dict[str, Encoding | QuantType] = {}
    for section in _SECTIONS:
        for name, entries in _tensors(data.get(section, {}), f"{where}: {section}"):
            if name in found:
                raise RecipeError(f"{where} has two encodings of {name!r}")
            found[name] = _given(entries, f"{where}: {name}")
    groups = data.get("supergroups", [])
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise RecipeError(f"{where}: supergroups is a list of objects with op_list")
    return found, [_supergroup(g, f"{where}: supergroups") for g in groups]


def _supergroup(group: Mapping[str, Any], where: str) -> tuple[list[str], bool]:
    json_files.check_keys(group, ("op_list", "fuse"), where)
    if not isinstance(group.get("op_list"), list):
        raise RecipeError(f"{where}: op_list is a list of names of ops, got {group.get('op_list')!r}")
    return group["op_list"], numbers.flag(group.get("fuse", True), f"{where}: fuse")


def _tensors(section: Any, where: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Name and entries of each tensor of a section."""
    if isinstance(section, list):
        if not all(isinstance(e, dict) and isinstance(e.get("name"), str) for e in section):
            raise RecipeError(f"{where}: in a list each entry has a name")
        return [(e["name"], _channels(e, f"{where}: {e['name']}")) for e in section]
    if not isinstance(section, dict):
        raise RecipeError(f"{where} maps names to entries, got {section!r}")
    found = [(name, [entry] if isinstance(entry, dict) else entry) for name, entry in section.items()]
    for name, entries in found:
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
            raise RecipeError(f"{where}: {name} has a list of objects, got {entries!r}")
    return found


def _channels(entry: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """An entry of version 1.0.0 as one entry per channel."""
    if (kind := entry.get("enc_type", "PER_TENSOR")) not in ("PER_TENSOR", "PER_CHANNEL"):
        raise RecipeError(f"{where}: {kind} has no axis here; write it as AIMET's encodings 2.0.0, which say it")
    rest = {_NEWER.get(k, k): v for k, v in entry.items() if k not in ("name", "enc_type", "scale", "offset")}
    rest["dtype"] = str(rest.get("dtype", "int")).lower()
    lists = {k: v if isinstance(v, list) else [v] for k in ("scale", "offset") if (v := entry.get(k)) is not None}
    if len({len(v) for v in lists.values()}) > 1:
        raise RecipeError(f"{where}: scale and offset have different lengths")
    count = len(next(iter(lists.values()), [None]))
    return [{**rest, **{k: v[n] for k, v in lists.items()}} for n in range(count)]


def _given(entries: Sequence[Mapping[str, Any]], where: str) -> Encoding | QuantType:
    parsed = [_one(entry, where) for entry in entries]
    qtypes = {qtype for qtype, _ in parsed}
    if len(qtypes) > 1:
        raise RecipeError(f"{where}: its channels have several types: {', '.join(sorted(t.name for t in qtypes))}")
    (qtype,) = qtypes
    known = [code for _, code in parsed if code is not None]
    if not known and len(parsed) == 1:
        return qtype
    if len(known) < len(parsed):
        raise RecipeError(f"{where}: some of its channels have no numbers")
    shape = (len(parsed),) if len(parsed) > 1 else ()
    scale, zero = (np.asarray([code[k] for code in known]).reshape(shape) for k in (0, 1))
    return Encoding(qtype, scale.astype(np.float32), zero.astype(np.int32))


def _one(entry: Mapping[str, Any], where: str) -> tuple[QuantType, tuple[float, int] | None]:
    """Type, and (scale, zero point) of an entry where it has numbers."""
    if "group_size" in entry:
        raise RecipeError(f"{where}: group_size has no axis here; give the layers a granularity by a qc.Rule")
    json_files.check_keys(entry, _ENTRY, where)
    symmetric = numbers.flag(entry.get("is_symmetric", False), f"{where}: is_symmetric")
    bits = _bits(entry, where)
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    ends = None
    if "min" in entry or "max" in entry:
        if not ("min" in entry and "max" in entry):
            raise RecipeError(f"{where} has one of min and max")
        ends = numbers.real(entry["min"], f"{where}: min"), numbers.real(entry["max"], f"{where}: max")
        if not ends[0] <= 0 <= ends[1] > ends[0]:
            raise RecipeError(f"{where}: a range goes from min <= 0 to max >= 0, min < max; got {ends}")
    if "scale" in entry:
        scale = float(numbers.scales(entry["scale"], f"{where}: scale").reshape(()))
        usual = least if symmetric else None
        offset = numbers.integer(entry.get("offset", usual), f"{where}: offset", -((1 << bits) - 1), 0)
    elif "offset" in entry:
        raise RecipeError(f"{where} has an offset and no scale")
    elif ends is None:
        return _type(bits, symmetric, False, where), None
    elif symmetric:
        scale, offset = max(-ends[0], ends[1]) / most, least
    else:
        scale = (ends[1] - ends[0]) / ((1 << bits) - 1)
        offset = round(ends[0] / scale)
    zero = -offset + least
    if ends is not None and "scale" in entry:
        off = max(abs(ends[0] / scale - (least - zero)), abs(ends[1] / scale - (most - zero)))
        if off > 1.5:
            raise RecipeError(
                f"{where} contradicts itself: scale {scale:g} and offset {offset} are the range "
                f"[{(least - zero) * scale:g}, {(most - zero) * scale:g}], min and max {ends}"
            )
    symmetric = symmetric and zero == 0
    narrow = symmetric and ends is not None and abs(ends[0] / scale - least - 1) < 0.5
    return _type(bits, symmetric, narrow, where), (scale, zero)


def _bits(entry: Mapping[str, Any], where: str) -> int:
    dtype = str(entry.get("dtype", "int")).lower()
    found = re.fullmatch(r"u?int(\d*)", dtype)
    if found is None:
        raise RecipeError(f"{where}: dtype {dtype!r} has no integers; keep the layer in float by a qc.Rule")
    bits = entry.get("bitwidth", int(found[1]) if found[1] else None)
    bits = numbers.integer(bits, f"{where}: bitwidth", 2, 32)
    if found[1] and int(found[1]) != bits:
        raise RecipeError(f"{where}: bitwidth {bits} and dtype {dtype!r} contradict each other")
    return bits


def _type(bits: int, symmetric: bool, narrow: bool, where: str) -> QuantType:
    try:
        return QuantType(bits, symmetric=symmetric, narrow_range=narrow)
    except QuantizationError as error:
        raise RecipeError(f"{where}: {error}") from error
