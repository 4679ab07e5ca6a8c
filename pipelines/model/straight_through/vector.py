"""Vectors to the nearest of a codebook's, with the gradient led straight through or along a rotation."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipelines.errors import CodecmillError
from pipelines.model.straight_through.estimator import straight_through
from pipelines.model.straight_through.width import wide

SMALLEST_NORM = 1e-12
"""Shorter vectors, and pairs that point away from each other, have no rotation: their gradient goes through."""

SMOOTHING = 1e-5
"""Added to each code's count, so that one that nobody chose has a place (Laplace's rule)."""

MOST_DISTANCES = 2**24
"""That are there at a time, 64 MiB in float32: a step of usual size has them all at once, whose sums stay as they are;
a large picture, with many codes, would have gigabytes of them."""

USAGE_DECAY = 0.99
"""Of the count of each code's vectors, where codes are learned by the loss."""

APART = 0.01
"""How far from its parent a new code is put, over the codes' size."""

ASIDE_SEED = 2**62
"""Of the directions of new codes: one for all codebooks, so that they need not travel with the state. No first codes
are likely to have it, which these would then be."""


class VectorQuantized(NamedTuple):
    """Codes in the place of vectors.

    Attributes:
        values: of the shape of the input.
        indices: of the codes, int64, of that shape without its axis of channels.
        loss: what draws codes to vectors and vectors to codes, one number a sample, (N,).
        statistics: zero for each sample, (N,), to be added to its loss, whatever weight the loss above has there: its
            gradient is what `absorb` wants. None in evaluation.
    """

    values: Tensor
    indices: Tensor
    loss: Tensor
    statistics: Tensor | None = None


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Indices (M,), int64, of the rows of a codebook (K, D) that are nearest to vectors (M, D); the first of equals."""
    norms = codebook.square().sum(dim=1)
    # |v - c|^2 less |v|^2, which is the same for all codes.
    blocks = vectors.split(max(1, MOST_DISTANCES // len(codebook)))
    nearest = [(-2 * block @ codebook.T).add_(norms).argmin(dim=1) for block in blocks]
    return nearest[0] if len(nearest) == 1 else torch.cat(nearest)


class _Rotated(Function):
    @staticmethod
    def forward(soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        soft, hard = ctx.saved_tensors
        soft_norm, hard_norm = (x.norm(dim=-1, keepdim=True) for x in (soft, hard))
        e, q = soft / soft_norm.clamp_min(SMALLEST_NORM), hard / hard_norm.clamp_min(SMALLEST_NORM)
        middle_norm = (e + q).norm(dim=-1, keepdim=True)
        r = (e + q) / middle_norm.clamp_min(SMALLEST_NORM)
        # The transpose of R = 1 - 2 r r^T + 2 q e^T, which turns e into q.
        turned = gradient - 2 * r * _dot(r, gradient) + 2 * e * _dot(q, gradient)
        turned = turned * (hard_norm / soft_norm.clamp_min(SMALLEST_NORM))
        has_rotation = (soft_norm > SMALLEST_NORM) & (hard_norm > SMALLEST_NORM) & (middle_norm > SMALLEST_NORM)
        return torch.where(has_rotation, turned, gradient), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)


def rotation_trick(soft: Tensor, hard: Tensor) -> Tensor:
    """The value of `hard`, and the gradient of `|hard| / |soft| * R soft`, R the rotation of `soft` onto `hard`.

    R and the quotient count as constants (Fifty 2024, arXiv:2410.06424): the angle between a vector's gradient and its
    code is that between the gradient at the code and the code.

    Args:
        soft, hard: (..., D) of one shape.

    Raises:
        CodecmillError: the shapes differ.
    """
    if soft.shape != hard.shape:
        raise CodecmillError(
            f"rotation_trick takes two tensors of one shape, but got {tuple(soft.shape)} and {tuple(hard.shape)}."
        )
    return _Rotated.apply(soft, hard)


def normal_vectors(count: int, channels: int, seed: int) -> Tensor:
    """Normal vectors of length 1 on average, (count, channels); the global generator is neither read nor advanced."""
    if torch.get_default_device().type == "meta":
        return torch.empty(count, channels)  # only the shapes of a model are wanted
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(count, channels, generator=generator, device="cpu", dtype=torch.float32) / channels**0.5


class VectorQuantizer(nn.Module):
    """The nearest of learned codes (van den Oord 2017, arXiv:1711.00937), for each vector of channels.

    Codes are learned by the loss, or as moving averages of the vectors that chose them (Razavi 2019, arXiv:1906.00446).
    A code that is hardly chosen is put beside one that often is, and the two share what comes (Linde, Buzo and Gray
    1980: splitting). What a batch says of the codes is led out as the gradient of a parameter, `statistics`, which is
    and stays zero: it takes the road of all gradients, so that codes are the same bits on all ranks. After each
    backward pass `absorb` takes it in.

    Args:
        codes: K, a count.
        channels: D.
        commitment: beta, what drawing vectors to codes counts beside drawing codes to vectors.
        rotation: lead the gradient along `rotation_trick` in the place of straight through.
        decay: of the moving averages, a step; None to learn the codes by the loss.
        restart: a code that is chosen less than this share of the mean is given up; 0 gives none up.
        seed: of the first codes, normal vectors of length 1 on average.
    """

    count: Tensor
    total: Tensor
    aside: Tensor

    def __init__(
        self,
        codes: int,
        channels: int,
        commitment: float = 0.25,
        rotation: bool = False,
        decay: float | None = None,
        restart: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        first, aside = (normal_vectors(codes, channels, each) for each in (seed, ASIDE_SEED))
        self.codebook = nn.Parameter(first, requires_grad=decay is None)
        self.statistics = nn.Parameter(torch.zeros(codes, 1 if decay is None else 1 + channels))
        self.register_buffer("count", torch.ones(codes))
        self.register_buffer("total", first.clone())
        self.register_buffer("aside", aside, persistent=False)
        self.commitment = commitment
        self.rotation = rotation
        self.decay = decay
        self.restart = restart

    def forward(self, x: Tensor) -> VectorQuantized:
        """(N, D, ...) to codes of the same shape, computed in float32 or wider.

        Raises:
            CodecmillError: x has another number of channels.
        """
        x = wide(x)
        if x.dim() < 2 or x.shape[1] != self.codebook.shape[1]:
            raise CodecmillError(
                f"The codebook has vectors of {self.codebook.shape[1]} channels, but got {tuple(x.shape)}: "
                "channels are the second axis."
            )
        codebook = self.codebook.to(x.dtype)
        vectors = x.movedim(1, -1)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # in bf16 another code would be nearer
            indices = nearest_code(vectors.reshape(-1, vectors.shape[-1]), codebook).view(vectors.shape[:-1])
        hard = torch.where(vectors.isnan(), vectors.detach(), codebook[indices])
        distance = self.commitment * (hard.detach() - vectors).square()
        if self.decay is None:
            distance = distance + (hard - vectors.detach()).square()
        loss = distance.flatten(1).mean(dim=1) if distance.numel() else distance.new_zeros(len(x))
        statistics = self._led_out(vectors.detach(), indices) if self.training else None
        values = (rotation_trick if self.rotation else straight_through)(vectors, hard.detach())
        return VectorQuantized(values.movedim(-1, 1), indices, loss, statistics)

    def _led_out(self, vectors: Tensor, indices: Tensor) -> Tensor:
        """Zero a sample, (N,), whose gradient by `statistics` is how many vectors chose each code, and their sum."""
        chosen = self.statistics.to(vectors.dtype)[indices]
        of_codes = (
            chosen[..., 0] + (chosen[..., 1:] * vectors).sum(dim=-1) if self.decay is not None else chosen[..., 0]
        )
        return of_codes.flatten(1).sum(dim=1)

    @torch.no_grad()
    def absorb(self, gradient: Tensor) -> None:
        """Take in what a batch said of the codes, once a step.

        Args:
            gradient: of `statistics`, of any weighted mean over the samples, the same on all ranks.
        """
        decay = USAGE_DECAY if self.decay is None else self.decay
        self.count.lerp_(gradient[:, 0], 1 - decay)
        if self.decay is not None:
            self.total.lerp_(gradient[:, 1:], 1 - decay)
            everything = self.count.sum()
            smooth = (self.count + SMOOTHING) / (everything + SMOOTHING * len(self.count)) * everything
            self.codebook.copy_(self.total / smooth[:, None])
        if self.restart:
            self._give_up_idle_codes()

    def _give_up_idle_codes(self) -> None:
        idle = self.count < self.restart * self.count.mean()
        busiest = self.count.argsort(descending=True, stable=True)
        pairs = list(zip(idle.nonzero().flatten().tolist(), busiest[~idle[busiest]].tolist(), strict=False))
        if not pairs:
            return
        gone, parents = (torch.tensor(each, device=self.count.device) for each in zip(*pairs, strict=True))
        size = self.codebook.square().mean().sqrt()
        self.codebook[gone] = self.codebook[parents] + APART * size * self.aside[gone]
        self.count[gone] = self.count[parents] = self.count[parents] / 2
        for codes in (gone, parents):
            self.total[codes] = self.codebook[codes] * self.count[codes, None]
