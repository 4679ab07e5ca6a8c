"""Lookup-free quantisation: each channel is a bit, and an entropy keeps all codes in use."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.model.straight_through.binary import sign_ste
from pipelines.model.straight_through.estimator import straight_through
from pipelines.model.straight_through.width import wide


class LookupFree(NamedTuple):
    """Bits as +1 and -1.

    Attributes:
        values: of the shape of the input (N, D, ...).
        indices: of the codes, int64, without the axis of channels: the first channel is the lowest bit.
        loss: the entropy loss, one number a sample, (N,).
    """

    values: Tensor
    indices: Tensor
    loss: Tensor


def binary_entropy_loss(x: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean entropy of each bit less the entropy of its mean, in nats, summed over channels (Yu 2023, arXiv:2310.05737).

    Low where every vector is sure of its code and all codes are used alike. With p = sigmoid(4 x / temperature), the
    soft assignment to +1 and -1 by squared distance; bits are taken as independent, where the paper's sum over all
    2^D codes is the sum over its bits. Means are over the places of a sample, not over a batch: what a sample costs
    depends on no other, so that it is the same on any number of ranks.

    Args:
        x: (N, D, ...) with at least one place.

    Returns:
        One number a sample, (N,).
    """
    logits = wide(x)[..., None].flatten(2) * (4 / temperature)
    each = F.softplus(logits) - logits * torch.sigmoid(logits)
    # Not quite 0 or 1, where x log x has no gradient: one flat picture is enough for a bit that is the same everywhere.
    smallest = torch.finfo(logits.dtype).eps
    mean = torch.sigmoid(logits).mean(dim=2).clamp(smallest, 1 - smallest)
    of_mean = -torch.xlogy(mean, mean) - torch.xlogy(1 - mean, 1 - mean)
    return (each.mean(dim=2) - of_mean).sum(dim=1)


class LFQ(nn.Module):
    """sign, with the gradient of the identity, and `binary_entropy_loss` (Yu 2023, MAGVIT-v2, arXiv:2310.05737).

    Where `sign_ste` stops the gradient of values beyond 1, here it always passes: what a decoder wants of a bit reaches
    the encoder however sure it was of the bit.
    """

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor) -> LookupFree:
        """(N, D, ...) to bits."""
        soft = wide(x)
        values = straight_through(soft, sign_ste(soft.detach()))
        bits = (values.detach() > 0).movedim(1, -1).long()
        weights = 2 ** torch.arange(x.shape[1], device=x.device)
        loss = binary_entropy_loss(x, self.temperature) if x.numel() else soft.flatten(1).sum(dim=1)
        return LookupFree(values, (bits * weights).sum(dim=-1), loss)
