"""Layers that quantise on the way forward and let the gradient through on the way back.

Each is a pure function with a module beside it. All compute in float32, in float64 for float64 inputs, and never in a
lower precision: under autocast, bfloat16 or float16 inputs give float32 results. A NaN comes out as NaN, so that a
training that diverged is seen. Random numbers are always given by the caller.
"""

from pipelines.model.straight_through.binary import Binarizer, SignSTE, sign_ste, stochastic_sign
from pipelines.model.straight_through.bounds import LowerBound, lower_bound
from pipelines.model.straight_through.categorical import GumbelSoftmaxST, gumbel_softmax
from pipelines.model.straight_through.centres import SoftToHardQuantizer, nearest_centre, soft_assignment, soft_to_hard
from pipelines.model.straight_through.estimator import straight_through
from pipelines.model.straight_through.finite_scalar import FSQ, finite_scalar, finite_scalar_bound
from pipelines.model.straight_through.lookup_free import LFQ, LookupFree, binary_entropy_loss
from pipelines.model.straight_through.noise import UniformNoise, UniversalQuantizer, additive_noise, universal_quantise
from pipelines.model.straight_through.rounding import ClampedRound, Round, clamped_round, round_ste
from pipelines.model.straight_through.soft_rounding import soft_round, soft_round_inverse
from pipelines.model.straight_through.vector import (
    VectorQuantized,
    VectorQuantizer,
    nearest_code,
    rotation_trick,
)

__all__ = [
    "FSQ",
    "LFQ",
    "Binarizer",
    "ClampedRound",
    "GumbelSoftmaxST",
    "LookupFree",
    "LowerBound",
    "Round",
    "SignSTE",
    "SoftToHardQuantizer",
    "UniformNoise",
    "UniversalQuantizer",
    "VectorQuantized",
    "VectorQuantizer",
    "additive_noise",
    "binary_entropy_loss",
    "clamped_round",
    "finite_scalar",
    "finite_scalar_bound",
    "gumbel_softmax",
    "lower_bound",
    "nearest_centre",
    "nearest_code",
    "rotation_trick",
    "round_ste",
    "sign_ste",
    "soft_assignment",
    "soft_round",
    "soft_round_inverse",
    "soft_to_hard",
    "stochastic_sign",
    "straight_through",
    "universal_quantise",
]
