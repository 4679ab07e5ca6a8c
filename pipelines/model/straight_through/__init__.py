"""Layers that quantise on the way forward and let the gradient through on the way back.

Each is a pure function with a module beside it. All compute in float32, in float64 for float64 inputs, and never in a
lower precision: under autocast, bfloat16 or float16 inputs give float32 results. A NaN comes out as NaN, so that a
training that diverged is seen. Random numbers are always given by the caller.
"""

from pipelines.model.straight_through.binary import Sign, sign_ste
from pipelines.model.straight_through.centres import SoftToHardQuantizer, nearest_centre, soft_assignment, soft_to_hard
from pipelines.model.straight_through.estimator import straight_through
from pipelines.model.straight_through.noise import UniformNoise, additive_noise
from pipelines.model.straight_through.rounding import ClampedRound, Round, clamped_round, round_ste

__all__ = [
    "ClampedRound",
    "Round",
    "Sign",
    "SoftToHardQuantizer",
    "UniformNoise",
    "additive_noise",
    "clamped_round",
    "nearest_centre",
    "round_ste",
    "sign_ste",
    "soft_assignment",
    "soft_to_hard",
    "straight_through",
]
