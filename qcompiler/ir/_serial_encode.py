"""Programs to JSON-like data: equations, parameters, values and pytree structures; arrays go into a list beside it."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcompiler.errors import SerializationError
from qcompiler.ir import _compat, _serial_names, identity
from qcompiler.ir.program import Program
from qcompiler.numerics.histogram import RangeStats


class Writer:
    """Turns a program into JSON-like data; arrays and sources go into tables beside it."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.sources: dict[tuple[str, int, str], int] = {}

    def program(self, program: Program) -> dict[str, Any]:
        if _compat.consts_of(program.jaxpr):
            raise SerializationError("the program closes over arrays; name them as weights")
        body = self.jaxpr(program.jaxpr, nested=False)
        return {
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
        if _serial_names.primitive(eqn.primitive.name) is not eqn.primitive:
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
            params = _plain_scan(eqn)
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
        if isinstance(value, np.dtype) and _serial_names.DTYPES.get(value.name) == value:
            return {"$dtype": value.name}
        if isinstance(value, np.ndarray | jax.Array):
            return self.array(value, where)
        if isinstance(value, _compat.Jaxpr | _compat.ClosedJaxpr):
            return {"$jaxpr": self.jaxpr(value)}
        if dataclasses.is_dataclass(value) or hasattr(kind, "_fields"):
            self.known(kind, where)
            return {
                "$class": kind.__name__,
                "fields": {n: self.value(getattr(value, n), where) for n in _serial_names.fields(kind)},
            }
        raise SerializationError(f"{where} is a {kind.__name__}, which cannot be written to a file")

    def known(self, kind: type, where: str) -> None:
        if _serial_names.CLASSES.get(kind.__name__) is not kind:
            raise SerializationError(f"{where} is a {kind.__name__}, which is not registered for files")

    def number(self, value: np.ndarray, where: str) -> Any:
        """A 0-d array as a JSON number where that is exact, else its bytes."""
        if _serial_names.DTYPES.get(value.dtype.name) != value.dtype:
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
        if name not in _serial_names.DTYPES:
            raise SerializationError(f"{where} has dtype {array.dtype}, which cannot be written to a file")
        array = np.asarray(array, dtype=_serial_names.DTYPES[name], order="C")
        if _serial_names.DTYPES[name].kind not in "biufc" or array.dtype.isbuiltin != 1:
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


@dataclasses.dataclass(frozen=True)
class _Leaf:
    index: int


def _type(aval: Any, where: str) -> list[Any]:
    """dtype, shape, and a mark for weak types, for JSON."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        raise SerializationError(f"{where} is or makes a PRNG key, which cannot be written to a file")
    return [np.dtype(aval.dtype).name, list(aval.shape), *(["weak"] if aval.weak_type else [])]


def _plain_scan(eqn: _compat.JaxprEqn) -> dict[str, Any]:
    """The parameters of a scan as every version understands them."""
    params = eqn.params
    consts, carry = _compat.scan_counts(eqn)
    if any(params.get("linear", ())) or params.get("_split_transpose"):
        raise SerializationError("a transposed scan cannot be written to a file")
    counts = {"num_consts": consts, "num_carry": carry}
    return {k: params[k] for k in ("reverse", "length", "jaxpr")} | counts | {"unroll": params["unroll"]}
