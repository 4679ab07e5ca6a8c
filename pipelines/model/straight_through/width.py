"""The precision that all quantisers compute in."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """float64 as it is, anything else as float32: quantised in bfloat16, values miss their levels."""
    return x if x.dtype == torch.float64 else x.float()
