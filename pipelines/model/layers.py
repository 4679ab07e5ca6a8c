"""Building blocks that the models share."""

from torch import nn
from torch.nn.utils import skip_init


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width (over `stride`), its weights not yet filled.

    The usual constructor would draw from, and so advance, the global generator.
    """
    return skip_init(  # type: ignore[return-value]  # typed as a plain Module
        nn.Conv2d, inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups
    )
