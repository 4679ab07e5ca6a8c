"""Building blocks that the models share."""

from torch import nn


class Unfilled(nn.Conv2d):
    """A convolution that is made without first weights; whoever builds the model fills them in.

    The usual constructor would draw them from, and so advance, the global generator. torch's own `skip_init` makes the
    same by way of the meta device, for which torch loads its decompositions: half a second of each process.
    """

    def reset_parameters(self) -> None:
        pass


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width (over `stride`), its weights not yet filled."""
    return Unfilled(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups)
