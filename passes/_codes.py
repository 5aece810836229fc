"""What stands for a real value while `fuse` runs: codes with their encoding, or a sum of exact accumulators."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from qcompiler import ops
from qcompiler.ir.program import Builder
from qcompiler.numerics.encoding import Encoding
from qcompiler.numerics.types import QuantType


@dataclasses.dataclass
class Codes:
    """Integers that stand for a real value: (q - zero_point) * scale."""

    q: Any
    scale: Any
    zero_point: Any
    type: QuantType

    def real(self, dtype: Any = np.float32) -> Any:
        """The value as float."""
        value = ops.dequantize(self.q, self.scale, self.zero_point, self.type)
        return value if value.dtype == dtype else value.astype(dtype)

    def shifted(self) -> Any:
        """q - zero_point, int32."""
        q = self.q.astype(jnp.int32)
        return q if self.type.symmetric else q - self.zero_point

    def factors(self) -> list[tuple[int, Any]]:
        """(n, x) pairs with q - zero_point = sum of n * x; every x is an int8 code less a zero point, int32.

        Of b > 8 bits there are two, q = 2**n high + low + 2**(n-1) with n = b - 8 and high = q >> n; the zero point is
        taken apart alike.
        """
        n = self.type.bits - 8
        if not 0 < n <= 8:
            return [(1, self.shifted())]
        z = self.zero_point
        zeros = (None, np.int32(-1 << (n - 1))) if self.type.symmetric else (high_part(z, n), low_part(z, n))
        codes = [q.astype(jnp.int8).astype(jnp.int32) for q in (high_part(self.q, n), low_part(self.q, n))]
        high, low = (q if z is None else lax.sub_p.bind(q, z) for q, z in zip(codes, zeros, strict=True))
        return [(1 << n, high), (1, low)]


def high_part(x: Any, n: int) -> Any:
    return lax.shift_right_arithmetic_p.bind(x, x.dtype.type(n))


def low_part(x: Any, n: int) -> Any:
    """x - 2**n high_part(x, n) - 2**(n-1)"""
    return lax.sub_p.bind(lax.and_p.bind(x, x.dtype.type((1 << n) - 1)), x.dtype.type(1 << (n - 1)))


@dataclasses.dataclass
class Sum:
    """A real value as a sum of exact int32 accumulators, the one of the finest scale last."""

    parts: list[Codes]

    def real(self, dtype: Any = np.float32) -> Any:
        """The value as float."""
        value = functools.reduce(lax.add, [part.real() for part in self.parts])
        return value if value.dtype == dtype else value.astype(dtype)

    def plus(self, bias: Any) -> Sum:
        """With an int32 bias of the finest scale."""
        last = self.parts[-1]
        return Sum([*self.parts[:-1], dataclasses.replace(last, q=lax.add_p.bind(last.q, bias))])


def encoding_weights(builder: Builder, name: str, encoding: Encoding) -> tuple[Any, Any]:
    """Scale and zero point as weights."""
    scale = builder.weight(f"{name}/scale", encoding.scale)
    return scale, builder.weight(f"{name}/zero_point", encoding.zero_point)
