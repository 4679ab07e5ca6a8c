"""A choice among categories, drawn or taken, with the gradient of a softmax."""

import torch
from torch import Tensor, nn

from pipelines.errors import CodecmillError
from pipelines.model.straight_through.estimator import straight_through
from pipelines.model.straight_through.width import wide


def gumbel_softmax(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """One-hot of the largest `logits + noise`; the gradient is that of `softmax((logits + noise) / temperature)`.

    Jang 2017 (arXiv:1611.01144), straight-through. With Gumbel noise, `-log(-log(u))` of uniform u, a category is drawn
    with the probability that the softmax of its logits gives it; without noise the likeliest is taken.

    Args:
        logits: (..., K).
        noise: the same shape, drawn by the caller, or None.
        temperature: above 0; lower is nearer to one-hot on the way back.

    Raises:
        CodecmillError: the temperature is not above 0, or the shapes differ.
    """
    if not temperature > 0:
        raise CodecmillError(f"The Gumbel softmax needs a temperature above 0, but got {temperature}.")
    if noise is not None and noise.shape != logits.shape:
        raise CodecmillError(f"The noise has shape {tuple(noise.shape)}, but the logits have {tuple(logits.shape)}.")
    with torch.autocast(logits.device.type, enabled=False):
        scores = wide(logits) if noise is None else wide(logits) + noise.to(wide(logits).dtype)
        soft = torch.softmax(scores / temperature, dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, scores.argmax(dim=-1, keepdim=True), 1.0)
    return straight_through(soft, torch.where(soft.isnan(), soft, hard).detach())


class GumbelSoftmaxST(nn.Module):
    """`gumbel_softmax` with noise in training and without it in evaluation (Jang 2017, arXiv:1611.01144)."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, uniform: Tensor | None = None) -> Tensor:
        """One-hot choices.

        Args:
            logits: (..., K).
            uniform: the same shape, uniform on (0, 1), needed in training and ignored in evaluation. 0 and 1, which a
                low precision rounds to, stand for the numbers next to them.

        Raises:
            CodecmillError: in training there are no uniform numbers.
        """
        if not self.training:
            return gumbel_softmax(logits, None, self.temperature)
        if uniform is None:
            raise CodecmillError(
                "The Gumbel softmax needs uniform numbers on (0, 1) in training, of the shape of its logits."
            )
        uniform = wide(uniform)  # in bfloat16 1 - 1e-7 is 1, of which the noise would be infinite
        noise = -torch.log(-torch.log(uniform.clamp(torch.finfo(uniform.dtype).tiny, 1 - 1e-7)))
        return gumbel_softmax(logits, noise, self.temperature)
