"""qcompiler: a quantizing compiler for JAX. Any JAX function or Flax model in, an integer-only program out.

import qcompiler as qc
qmodel = qc.quantize(model, calibration_batches)
y = qmodel(x)
"""

from qcompiler import interchange as interchange
from qcompiler.api import JitFunction as JitFunction
from qcompiler.api import jit as jit
from qcompiler.api import quantize as quantize
from qcompiler.api import trace as trace
from qcompiler.calls import call as call
from qcompiler.candidates import Candidate as Candidate
from qcompiler.debug.report import Report as Report
from qcompiler.errors import CalibrationError as CalibrationError
from qcompiler.errors import IslandError as IslandError
from qcompiler.errors import OverflowProofError as OverflowProofError
from qcompiler.errors import QuantizationError as QuantizationError
from qcompiler.errors import RecipeError as RecipeError
from qcompiler.errors import SerializationError as SerializationError
from qcompiler.errors import SignatureError as SignatureError
from qcompiler.errors import TraceError as TraceError
from qcompiler.errors import VerificationError as VerificationError
from qcompiler.ir import Program as Program
from qcompiler.numerics.encoding import Encoding as Encoding
from qcompiler.numerics.fixed_range import FixedRange as FixedRange
from qcompiler.numerics.types import QuantType as QuantType
from qcompiler.precision import Precision as Precision
from qcompiler.quantized_model import QuantizedModel as QuantizedModel
from qcompiler.recipe import Granularity as Granularity
from qcompiler.recipe import Recipe as Recipe
from qcompiler.recipe import Rule as Rule
from qcompiler.recipe import Supergroup as Supergroup
from qcompiler.rounding import GPTQ as GPTQ
from qcompiler.rounding import AdaRound as AdaRound
from qcompiler.rounding import SequentialMSE as SequentialMSE
from qcompiler.sensitivity_table import Sensitivity as Sensitivity
from qcompiler.stages import Calibrated as Calibrated
from qcompiler.stages import Quantized as Quantized
from qcompiler.stages import Traced as Traced
from qcompiler.strategy import Recommendation as Recommendation
from qcompiler.strategy import recommend as recommend
from qcompiler.target import Target as Target
