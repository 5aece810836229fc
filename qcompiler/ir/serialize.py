"""Programs in files: primitive names and parameters as JSON, arrays beside it, one zip; nothing in it is executed.

    save(program, "after_partition.zip");  program = load("after_partition.zip")

`program.json` holds the equations in order, with operands as positions (weights, inputs, then results), types, scopes
and the user's source lines; `arrays/<n>.npy` hold the weights and the statistics. `load` binds each equation again
inside `jax.make_jaxpr`, and then checks that what came out is what the file says. Only primitives and parameter classes
in tables of this process can come out of a file; none is imported by a name in it.

What does not survive: gradient rules of `custom_jvp`/`custom_vjp` calls inside `scan`/`while`/`cond` bodies (the calls
come back inlined), shardings, and which calls led to a user's line (only that line is kept).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import io
import json
import math
import os
import threading
import types
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler.errors import QuantizationError, SerializationError
from qcompiler.ir import _compat, classes, identity
from qcompiler.ir.program import Program, Signature
from qcompiler.numerics.histogram import RangeStats
from qcompiler.numerics.types import QuantType

#: Raised whenever older readers could misread what newer writers write.
FORMAT = 1
_DOCUMENT = "program.json"
#: The same bytes for the same program, whenever it is written.
_TIME = (1980, 1, 1, 0, 0, 0)

_PRIMITIVES: dict[str, _compat.Primitive] = {}
_CLASSES: dict[str, type] = {}
#: Public in `jax.lax`, but not (in every version) among `jax.extend.core.primitives`.
_LAX_ONLY = ("split_p", "mulhi_p", "tile_p", "optimization_barrier_p", "clz_p", "log2_p")
_DTYPES = {
    np.dtype(getattr(jnp, name)).name: np.dtype(getattr(jnp, name))
    for name in (
        "bool_ int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float16 float32 float64 bfloat16"
        " float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2"
        " float8_e5m2fnuz float8_e8m0fnu complex64 complex128"
    ).split()
    if hasattr(jnp, name)
}


def register_primitives(primitives: Iterable[_compat.Primitive]) -> None:
    """Makes primitives known to `save` and `load` by their names."""
    _PRIMITIVES.update((p.name, p) for p in primitives)


def register_classes(*classes: type) -> None:
    """Makes enums, dataclasses and named tuples known, by their names, as parameters and notes.

    Raises:
      TypeError: a class is none of these.
    """
    for cls in classes:
        if not (issubclass(cls, enum.Enum) or dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")):
            raise TypeError(f"{cls.__name__} is no enum, dataclass or named tuple")
        _CLASSES[cls.__name__] = cls


for _name in (
    "AccuracyMode ConvDimensionNumbers DotAlgorithm DotAlgorithmPreset FftType GatherDimensionNumbers GatherScatterMode"
    " Precision RaggedDotDimensionNumbers RandomAlgorithm RoundingMethod ScatterDimensionNumbers Tolerance"
).split():
    with contextlib.suppress(AttributeError, TypeError):  # some are plain classes, or missing, in some versions
        register_classes(getattr(lax, _name))
register_classes(QuantType)


@functools.cache
def _library_primitives() -> dict[str, _compat.Primitive]:
    extra = (getattr(lax, name) for name in _LAX_ONLY if hasattr(lax, name))
    return _compat.primitives_by_name() | {p.name: p for p in extra}


def _primitive(name: str) -> _compat.Primitive | None:
    return _PRIMITIVES.get(name) or _library_primitives().get(name)


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Writes `program` to one file; `path` holds the old file or the whole new one at any time.

    The same program gives the same bytes.

    Raises:
      SerializationError: the program holds something that a file cannot: a primitive or parameter of an unknown kind, a
        PRNG key, a pytree node other than dict, list, tuple and None. Nothing is written then.
      OSError: the file cannot be written.
    """
    writer = _Writer()
    document = writer.program(program)
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                info = zipfile.ZipInfo(_DOCUMENT, _TIME)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, text)
                for k, array in enumerate(writer.arrays):
                    with archive.open(zipfile.ZipInfo(f"arrays/{k}.npy", _TIME), "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, array, version=(1, 0), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> Program:
    """Reads a program that `save` wrote.

    Ids, module paths, source lines, weights, statistics and notes are those of the saved program.

    Raises:
      SerializationError: the file is no program, is damaged, is of another format, or holds primitives or parameters
        that this version of JAX does not have.
      OSError: the file cannot be read.
    """
    document: Any = None
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            document = json.loads(archive.read(_DOCUMENT))
            if document["format"] != FORMAT:
                raise SerializationError(f"it has format {document['format']}; this version reads {FORMAT}")
            return _Reader(document, archive).program()
    except OSError:
        raise
    except QuantizationError as error:
        raise SerializationError(f"cannot load {os.fspath(path)}: {error}{_versions(document)}") from error
    except Exception as error:  # whatever a damaged file makes zipfile, json, numpy or jax say
        detail = f"{type(error).__name__}: {error}"
        raise SerializationError(
            f"{os.fspath(path)} is damaged or no program: {detail}{_versions(document)}"
        ) from error


def _versions(document: Any) -> str:
    written = document.get("jax") if isinstance(document, dict) else None
    return f" (written by jax {written}, this is jax {jax.__version__})" if written else ""


class _Writer:
    """Turns a program into JSON-like data; arrays and sources go into tables beside it."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.sources: dict[tuple[str, int, str], int] = {}

    def program(self, program: Program) -> dict[str, Any]:
        if _compat.consts_of(program.jaxpr):
            raise SerializationError("the program closes over arrays; name them as weights")
        body = self.jaxpr(program.jaxpr, nested=False)
        return {
            "format": FORMAT,
            "jax": jax.__version__,
            "stage": program.stage,
            "weights": [[n, self.value(w, f"weight {n}")] for n, w in program.weights.items()],
            "signature": {
                "inputs": self.tree(program.signature.in_tree, "the inputs"),
                "results": self.tree(program.signature.out_tree, "the results"),
                "input_names": list(program.signature.input_names),
            },
            "body": body,
            "stats": {key: self.stats(stats) for key, stats in program.stats.items()},
            "notes": self.value(dict(program.notes), "notes"),
            "sources": [list(source) for source in self.sources],
        }

    # Equations

    def jaxpr(self, jaxpr: Any, *, nested: bool = True) -> dict[str, Any]:
        """Constants and arguments are the first values, results of equations follow in order."""
        position: dict[Any, int] = {}
        consts = [self.value(np.asarray(c), "a constant of a body") for c in _compat.consts_of(jaxpr)]
        bound = [*_compat.constvars_of(jaxpr), *_compat.invars_of(jaxpr)]
        if len(bound) != len(consts) + len(_compat.invars_of(jaxpr)):
            raise SerializationError("a body has constants without values")
        position.update((v, k) for k, v in enumerate(bound))
        equations: list[dict[str, Any]] = []
        size = len(bound)

        def read(atom: Any, env: Mapping[Any, Any]) -> Any:
            return self.literal(atom) if isinstance(atom, _compat.Literal) else env[atom]

        def walk(inner: Any, env: dict[Any, Any], scopes: list[str]) -> list[Any]:
            nonlocal size
            for eqn in _compat.open_jaxpr(inner).eqns:
                operands = [read(v, env) for v in eqn.invars]
                local = [*scopes, *_compat.scope_names(eqn.source_info.name_stack)]
                name = eqn.primitive.name
                if nested and eqn.primitive in _compat.CALL_JAXPR_PARAM and name != "jit":
                    # Their rules cannot be rebuilt, so they are written as what they compute.
                    called = eqn.params[_compat.CALL_JAXPR_PARAM[eqn.primitive]]
                    if _compat.consts_of(called):
                        raise SerializationError(f"{identity.describe(eqn)} closes over arrays")
                    tag = identity.TAG + str(eqn.params.get("name") or name)
                    args = dict(zip(_compat.invars_of(called), operands, strict=True))
                    env.update(zip(eqn.outvars, walk(called, args, [*local, tag]), strict=True))
                    continue
                equations.append(self.equation(eqn, operands, local))
                for var in eqn.outvars:
                    env[var] = size
                    size += 1
            return [read(v, env) for v in _compat.open_jaxpr(inner).outvars]

        results = walk(jaxpr, position, [])
        types = [_type(v.aval, "an argument") for v in _compat.invars_of(jaxpr)]
        return {"consts": consts, "args": types, "equations": equations, "results": results}

    def equation(self, eqn: _compat.JaxprEqn, operands: list[Any], scopes: list[str]) -> dict[str, Any]:
        where = identity.describe(eqn)
        if _primitive(eqn.primitive.name) is not eqn.primitive:
            raise SerializationError(f"{where}: a file cannot name this primitive")
        if getattr(eqn.ctx, "compute_type", None) or getattr(eqn.ctx, "xla_metadata", None):
            raise SerializationError(f"{where}: a compute type or XLA metadata cannot be written to a file")
        frame = identity.user_frame(eqn.source_info.traceback)
        types = [_type(v.aval, where) for v in eqn.outvars]
        return {
            "primitive": eqn.primitive.name,
            "operands": operands,
            "params": self.params(eqn, where),
            "types": types,
            "scopes": scopes,
            "source": None if frame is None else self.sources.setdefault(frame, len(self.sources)),
        }

    def params(self, eqn: _compat.JaxprEqn, where: str) -> dict[str, Any]:
        name, params = eqn.primitive.name, dict(eqn.params)
        if name == "scan":
            params = _plain_scan(params)
        elif name == "jit":
            specified = [*params["in_shardings"], *params["out_shardings"]]
            if any(type(s).__name__ != "UnspecifiedValue" for s in specified) or any(params["donated_invars"]):
                raise SerializationError(f"{where}: shardings and donations cannot be written to a file")
            params = {"name": params["name"], "jaxpr": params["jaxpr"]}
        elif name == "reduce":
            # The function that was traced; its jaxpr says the same.
            params.pop("computation", None)
        return {k: self.value(v, f"{where}: parameter {k}") for k, v in params.items()}

    def literal(self, atom: Any) -> dict[str, Any]:
        array = np.asarray(atom.val, atom.aval.dtype)
        if array.ndim:
            return {"array": self.value(array, "a literal")}
        found: dict[str, Any] = {"literal": self.number(array, "a literal"), "dtype": array.dtype.name}
        if atom.aval.weak_type and jnp.result_type(type(array.item())) == array.dtype:
            found["weak"] = True
        return found

    # Values

    def value(self, value: Any, where: str) -> Any:
        """A parameter or note; tuples are JSON arrays, everything that JSON lacks an object with one `$` key."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if isinstance(value, enum.Enum):
            self.known(kind, where)
            return {"$enum": [kind.__name__, value.name]}
        if isinstance(value, np.generic):
            return {"$scalar": [value.dtype.name, self.number(np.asarray(value), where)]}
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if kind is tuple:
            return [self.value(v, where) for v in value]
        if kind is list:
            return {"$list": [self.value(v, where) for v in value]}
        if isinstance(value, dict | types.MappingProxyType):
            if all(type(k) is str and not k.startswith("$") for k in value):
                return {k: self.value(v, f"{where}[{k!r}]") for k, v in value.items()}
            return {"$dict": [[self.value(k, where), self.value(v, f"{where}[{k!r}]")] for k, v in value.items()]}
        if isinstance(value, np.dtype) and _DTYPES.get(value.name) == value:
            return {"$dtype": value.name}
        if isinstance(value, np.ndarray | jax.Array):
            return self.array(value, where)
        if isinstance(value, _compat.Jaxpr | _compat.ClosedJaxpr):
            return {"$jaxpr": self.jaxpr(value)}
        if dataclasses.is_dataclass(value) or hasattr(kind, "_fields"):
            self.known(kind, where)
            return {"$class": kind.__name__, "fields": {n: self.value(getattr(value, n), where) for n in _fields(kind)}}
        raise SerializationError(f"{where} is a {kind.__name__}, which cannot be written to a file")

    def known(self, kind: type, where: str) -> None:
        if _CLASSES.get(kind.__name__) is not kind:
            raise SerializationError(f"{where} is a {kind.__name__}, which is not registered for files")

    def number(self, value: np.ndarray, where: str) -> Any:
        """A 0-d array as a JSON number where that is exact, else its bytes."""
        if _DTYPES.get(value.dtype.name) != value.dtype:
            raise SerializationError(f"{where} has dtype {value.dtype}, which cannot be written to a file")
        if value.dtype == np.bool_:
            return bool(value)
        if jnp.issubdtype(value.dtype, np.integer):
            return int(value)
        if jnp.issubdtype(value.dtype, np.floating) and math.isfinite(float(value)):
            return float(value)
        return value.tobytes().hex()

    def array(self, value: Any, where: str) -> dict[str, Any]:
        """An entry of the archive; dtypes that NumPy does not know are stored as integers of their size."""
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            raise SerializationError(f"{where} holds PRNG keys; pass them as inputs, or as jax.random.key_data")
        if _compat.is_abstract(value):
            raise SerializationError(f"{where} is a tracer; save programs outside of jit")
        array = np.asarray(value)
        name = array.dtype.name
        if name not in _DTYPES:
            raise SerializationError(f"{where} has dtype {array.dtype}, which cannot be written to a file")
        array = np.asarray(array, dtype=_DTYPES[name], order="C")
        if _DTYPES[name].kind not in "biufc" or array.dtype.isbuiltin != 1:
            array = array.view(np.dtype(f"uint{8 * array.dtype.itemsize}"))
        self.arrays.append(array)
        return {"$array": len(self.arrays) - 1, "dtype": name}

    def stats(self, stats: RangeStats) -> Any:
        arrays = stats.to_arrays().items()
        return {n: self.value(a if a.ndim else a.item(), f"statistics ({n})") for n, a in arrays}

    def tree(self, tree: Any, where: str) -> Any:
        """A pytree structure as nested data; leaves are `{"leaf": k}`, lists and dicts are told from tuples."""

        def node(value: Any) -> Any:
            if type(value) is _Leaf:
                return {"leaf": value.index}
            if value is None:
                return None
            if type(value) in (tuple, list):
                return {type(value).__name__: [node(v) for v in value]}
            if type(value) is dict:
                return {"dict": [[self.value(k, where), node(v)] for k, v in value.items()]}
            raise SerializationError(
                f"{where} hold a {type(value).__name__}; only dict, list, tuple and None can be written to a file"
            )

        return node(jax.tree_util.tree_unflatten(tree, [_Leaf(k) for k in range(tree.num_leaves)]))


class _Reader:
    """The inverse of `_Writer`."""

    def __init__(self, document: dict[str, Any], archive: zipfile.ZipFile) -> None:
        self.document, self.archive = document, archive
        self.tracebacks = _tracebacks(document["sources"])

    def program(self) -> Program:
        doc = self.document
        weights = {name: self.value(w) for name, w in doc["weights"]}
        if len(weights) != len(doc["weights"]) or len(weights) > len(doc["body"]["args"]):
            raise SerializationError("the weights are not the arguments of the program")
        for weight, (dtype, shape, *_) in zip(weights.values(), doc["body"]["args"], strict=False):
            if list(weight.shape) != shape or dtype not in _DTYPES:
                raise SerializationError("the weights are not the arguments of the program")
        sign = doc["signature"]
        signature = Signature(_tree(self, sign["inputs"]), _tree(self, sign["results"]), tuple(sign["input_names"]))
        program = Program(
            jaxpr=self.jaxpr(doc["body"]),
            weights=weights,
            signature=signature,
            stats={
                key: RangeStats.from_arrays({n: self.value(v) for n, v in s.items()}) for key, s in doc["stats"].items()
            },
            notes=self.value(doc["notes"]),
            stage=doc["stage"],
        )
        if len(signature.input_names) != len(program.input_vars) or signature.in_tree.num_leaves != len(
            program.input_vars
        ):
            raise SerializationError("the signature is not that of the program")
        if signature.out_tree.num_leaves != len(program.outvars):
            raise SerializationError("the signature is not that of the program")
        self.check(program)
        return program

    def check(self, program: Program) -> None:
        """What was bound must be what was written, for no newer default or rule may change a program in silence."""
        again = _Writer()
        document = json.loads(json.dumps(again.jaxpr(program.jaxpr, nested=False)))
        wanted = self.document["body"]
        for found, written in zip(document["equations"], wanted["equations"], strict=True):
            for key in ("primitive", "operands", "types", "params", "scopes"):
                if _without_references(found[key]) != _without_references(written[key]):
                    raise SerializationError(
                        f"{written['primitive']} came back with other {key}: {_short(found[key])} for"
                        f" {_short(written[key])}"
                    )
        if any(_without_references(document[key]) != _without_references(wanted[key]) for key in ("args", "results")):
            raise SerializationError("arguments or results came back with other types")

    # Equations

    def jaxpr(self, doc: dict[str, Any]) -> Any:
        """Traces the equations of a (nested) program; a closed jaxpr."""
        consts = [jnp.asarray(self.value(c)) for c in doc["consts"]]
        avals = [_struct(self, *t) for t in doc["args"]]
        return jax.make_jaxpr(lambda *args: self.run(doc, [*consts, *args]))(*avals)

    def run(self, doc: dict[str, Any], values: list[Any]) -> list[Any]:
        for equation in doc["equations"]:
            values.extend(self.bind(equation, [self.atom(a, values) for a in equation["operands"]]))
        return [self.atom(a, values) for a in doc["results"]]

    def bind(self, doc: dict[str, Any], operands: list[Any]) -> Sequence[Any]:
        name = doc["primitive"]
        primitive = _primitive(name)
        if primitive is None:
            raise SerializationError(f"the primitive {name!r} is unknown here")
        params = {k: self.value(v, name, k) for k, v in doc["params"].items()}
        source = doc["source"]
        traceback = self.tracebacks[-1 if source is None else source]
        allowed = _known_parameters(name, tuple(jax.typeof(v).dtype for v in operands))
        if allowed is not None and not allowed.issuperset(params):
            raise SerializationError(f"the primitive {name!r} has no parameters {sorted(set(params) - allowed)} here")
        with _compat.source_context(traceback, _compat.name_stack_of(doc["scopes"])):
            try:
                results = self.bind_library(primitive, operands, params)
            except (TypeError, KeyError, AttributeError, AssertionError) as error:
                raise SerializationError(
                    f"the primitive {name!r} rejects its parameters {sorted(params)}: {error}"
                ) from error
        if len(results) != len(doc["types"]):
            raise SerializationError(
                f"the primitive {name!r} has {len(results)} results instead of {len(doc['types'])}"
            )
        return results

    def bind_library(self, primitive: Any, operands: list[Any], params: dict[str, Any]) -> Sequence[Any]:
        if primitive.name == "jit":
            run = functools.partial(jax.core.eval_jaxpr, _compat.open_jaxpr(params["jaxpr"]))
            consts = _compat.consts_of(params["jaxpr"])

            def called(*args: Any) -> list[Any]:
                return run(consts, *args)

            called.__name__ = called.__qualname__ = params["name"]
            return jax.jit(called)(*operands)
        if primitive.name == "scan":
            params = _scan_params(params)
        elif primitive.name == "reduce":
            params["computation"] = functools.partial(_call_flat, params["jaxpr"])
        results = primitive.bind(*operands, **params)
        return results if primitive.multiple_results else [results]

    def atom(self, atom: Any, values: list[Any]) -> Any:
        if isinstance(atom, int):
            if atom < 0:
                raise SerializationError("an operand is no value")
            return values[atom]
        if "array" in atom:
            return self.value(atom["array"])
        number = self.number(atom["dtype"], atom["literal"])
        return number.item() if atom.get("weak") else number

    # Values

    def value(self, value: Any, primitive: str = "", key: str = "") -> Any:
        if isinstance(value, list):
            return tuple(self.value(v, primitive, key) for v in value)
        if not isinstance(value, dict):
            return value
        if not any(k.startswith("$") for k in value):
            return {k: self.value(v, primitive, key) for k, v in value.items()}
        kind, held = next(iter(value.items()))
        if kind == "$list":
            return [self.value(v, primitive, key) for v in held]
        if kind == "$dict":
            return {self.value(k): self.value(v, primitive, key) for k, v in held}
        if kind == "$float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[held]
        if kind == "$scalar":
            return self.number(*held)
        if kind == "$dtype":
            return self.dtype(held)
        if kind == "$array":
            return self.array(held, self.dtype(value["dtype"]))
        if kind == "$jaxpr":
            closed = self.jaxpr(held)
            # Scatter's update is an open jaxpr where there are two kinds.
            return _compat.open_jaxpr(closed) if key == "update_jaxpr" else closed
        if kind == "$enum":
            return self.known(held[0])[held[1]]
        if kind == "$class":
            cls = self.known(held)
            fields = {k: self.value(v, primitive, key) for k, v in value["fields"].items()}
            if set(fields) != set(_fields(cls)):
                raise SerializationError(f"{held} has the fields {sorted(fields)} instead of {sorted(_fields(cls))}")
            return cls(**fields)
        raise SerializationError(f"{kind} is no kind of value")

    def known(self, name: str) -> Any:
        if name not in _CLASSES:
            raise SerializationError(f"the class {name!r} is unknown here")
        return _CLASSES[name]

    def dtype(self, name: str) -> np.dtype:
        if name not in _DTYPES:
            raise SerializationError(f"the dtype {name!r} is unknown here")
        return _DTYPES[name]

    def number(self, name: str, value: Any) -> Any:
        dtype = self.dtype(name)
        if isinstance(value, str):
            return np.frombuffer(bytes.fromhex(value), dtype)[0]
        return np.asarray(value).astype(dtype)[()]

    def array(self, index: int, dtype: np.dtype) -> np.ndarray:
        data = io.BytesIO(self.archive.read(f"arrays/{index}.npy"))
        array = np.lib.format.read_array(data, allow_pickle=False)
        if array.dtype != dtype:
            if array.dtype != np.dtype(f"uint{8 * dtype.itemsize}"):
                raise SerializationError(f"array {index} is {array.dtype} instead of {dtype}")
            array = array.view(dtype)
        return array


@dataclasses.dataclass(frozen=True)
class _Leaf:
    index: int


def _tree(reader: _Reader, doc: Any) -> Any:
    """The pytree structure behind `_Writer.tree`."""

    def node(held: Any) -> Any:
        if held is None:
            return None
        ((kind, inner),) = held.items()
        if kind == "dict":
            return {reader.value(k): node(v) for k, v in inner}
        return inner if kind == "leaf" else {"tuple": tuple, "list": list}[kind](node(v) for v in inner)

    return jax.tree_util.tree_structure(node(doc))


def _fields(cls: Any) -> list[str]:
    """Names that the constructor takes."""
    if hasattr(cls, "_fields"):
        return list(cls._fields)
    return [f.name for f in dataclasses.fields(cls) if f.init]


def _type(aval: Any, where: str) -> list[Any]:
    """dtype, shape, and a mark for weak types, for JSON."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        raise SerializationError(f"{where} is or makes a PRNG key, which cannot be written to a file")
    return [np.dtype(aval.dtype).name, list(aval.shape), *(["weak"] if aval.weak_type else [])]


def _struct(reader: _Reader, dtype: str, shape: list[int], weak: str = "") -> jax.ShapeDtypeStruct:
    found = reader.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise SerializationError(f"the program computes in {dtype}; enable jax_enable_x64 to load it")
    return jax.ShapeDtypeStruct(tuple(shape), found, weak_type=bool(weak))


@functools.cache
def _known_parameters(name: str, operands: tuple[Any, ...]) -> frozenset[str] | None:
    """The parameters of an elementwise primitive: JAX takes and forgets any other. None if they are not to be found."""
    fun = getattr(lax, name, None)
    if name not in classes.ELEMENTWISE or fun is None:
        return None
    try:
        jaxpr = jax.make_jaxpr(fun)(*(jax.ShapeDtypeStruct((), d) for d in operands))
    except (TypeError, ValueError):  # takes more than operands
        return None
    found = [e for e in _compat.open_jaxpr(jaxpr).eqns if e.primitive.name == name]
    return frozenset(found[0].params) if len(found) == 1 else None


def _call_flat(jaxpr: Any, *args: Any) -> Any:
    return jax.core.eval_jaxpr(_compat.open_jaxpr(jaxpr), _compat.consts_of(jaxpr), *args)


def _plain_scan(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a scan as every version understands them."""
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:
        consts, carry, _ = (len(part) for part in params["ft_in"].unpack())
    if any(params.get("linear", ())) or params.get("_split_transpose"):
        raise SerializationError("a transposed scan cannot be written to a file")
    counts = {"num_consts": consts, "num_carry": carry}
    return {k: params[k] for k in ("reverse", "length", "jaxpr")} | counts | {"unroll": params["unroll"]}


def _scan_params(plain: dict[str, Any]) -> dict[str, Any]:
    """What this version's scan wants to be bound with: `plain`, and the rest from a scan with the same counts."""
    consts, carry = plain["num_consts"], plain["num_carry"]
    total, results = len(_compat.invars_of(plain["jaxpr"])), len(_compat.open_jaxpr(plain["jaxpr"]).outvars)

    def example(held: list[Any], init: list[Any], xs: list[Any]) -> Any:
        def step(state: list[Any], _: Any) -> Any:
            start = sum(held, np.float32(0))
            return [lax.neg(s) for s in state], [lax.sin(start) for _ in range(results - carry)]

        return lax.scan(step, init, xs, length=1)

    one, row = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((1,), np.float32)
    jaxpr = jax.make_jaxpr(example)([one] * consts, [one] * carry, [row] * (total - consts - carry))
    (eqn,) = (e for e in _compat.open_jaxpr(jaxpr).eqns if e.primitive.name == "scan")
    return {k: plain.get(k, v) for k, v in eqn.params.items()}


def _tracebacks(sources: list[Any]) -> list[Any]:
    """A traceback for each (file, line, function) whose only frame outside of the compiler is that; the last has none.

    JAX has no public way to make a traceback, so a fixed function of ours is called under the user's names, in a thread
    of its own, below which there is no caller who could be taken for the author of the model.
    """
    import _thread

    from jax.extend import source_info_util

    found: list[Any] = []
    done = threading.Lock()
    done.acquire()

    def capture() -> Any:
        return source_info_util.current().traceback

    def work() -> None:
        try:
            for file, line, function in sources:
                code = _frame.__code__.replace(
                    co_filename=str(file), co_firstlineno=int(line), co_name=str(function), co_qualname=str(function)
                )
                found.append(types.FunctionType(code, {})(capture))
            found.append(capture())
        except (TypeError, ValueError, OverflowError):
            pass  # the count tells
        finally:
            done.release()

    _thread.start_new_thread(work, ())
    done.acquire()
    if len(found) != len(sources) + 1:
        raise SerializationError("the table of source lines is damaged")
    return found


# One line, so that its only line is the first.
_frame = lambda call: call()


def _without_references(doc: Any) -> Any:
    """`doc` without positions of arrays, which another order of writing changes."""
    if isinstance(doc, dict):
        return {k: _without_references(v) for k, v in doc.items() if k not in ("$array", "source")}
    return [_without_references(v) for v in doc] if isinstance(doc, list) else doc


def _short(doc: Any) -> str:
    text = json.dumps(doc)
    return text if len(text) < 120 else text[:117] + "..."
