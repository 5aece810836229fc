"""The quantization vocabulary as JAX primitives: quantize, dequantize, requantize, unpack, observe, region."""

from qcompiler.ir import serialize
from qcompiler.ops.observe import observe as observe
from qcompiler.ops.observe import observe_p as observe_p
from qcompiler.ops.quantize import dequantize as dequantize
from qcompiler.ops.quantize import dequantize_p as dequantize_p
from qcompiler.ops.quantize import fake_quantize as fake_quantize
from qcompiler.ops.quantize import fake_quantize_p as fake_quantize_p
from qcompiler.ops.quantize import quantize as quantize
from qcompiler.ops.quantize import quantize_p as quantize_p
from qcompiler.ops.quantize import requantize as requantize
from qcompiler.ops.quantize import requantize_p as requantize_p
from qcompiler.ops.region import region as region
from qcompiler.ops.region import region_p as region_p
from qcompiler.ops.unpack import unpack as unpack
from qcompiler.ops.unpack import unpack_in_lax as unpack_in_lax
from qcompiler.ops.unpack import unpack_p as unpack_p
from qcompiler.ops.unpack import weights_of as weights_of

#: Our primitives by name, for serialization.
PRIMITIVES = {
    p.name: p for p in (quantize_p, dequantize_p, fake_quantize_p, requantize_p, unpack_p, observe_p, region_p)
}
serialize.register_primitives(PRIMITIVES.values())
