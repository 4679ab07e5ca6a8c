"""One training step's forward pass as a module, so that DDP wraps and torch.compile sees all of it."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.config import LossConfig, TrainingConfig
from pipelines.data.images import Normalization, to_unit
from pipelines.model.autoencoder import Reconstruction
from pipelines.model.build import Model
from pipelines.model.codec import Coded
from pipelines.model.losses import distortion, rate_distortion

SMALLEST_MSE = 1e-10
"""100 dB: far above what an 8-bit picture can tell from its original."""

QUANTIZER_WEIGHTS = {"vq": 0.1, "lfq": 0.001}
"""Of a quantiser's own loss beside the distortion: about what each is worth on photographs."""


class StepOutput(NamedTuple):
    """Per sample: the loss (N,), and the mean squared error (N,) of the clamped output on the scale 0 to 1.

    The error is at least `SMALLEST_MSE`, so that a perfect picture has a PSNR that a chart can show. A codec's rates
    are bits per pixel of each part, (N, P); others have no part.
    """

    loss: Tensor
    mse: Tensor
    rates: Tensor


class TrainingStep(nn.Module):
    """Pixels to per-sample losses: normalise, encode, quantise, decode, de-normalise, compare.

    Its forward takes images uint8 (N, 3, H, W), masks uint8 (N, 1, H, W) or None, and the model's noise or None.
    """

    def __init__(
        self, model: Model, normalization: Normalization, loss: LossConfig, training: TrainingConfig, device: str
    ):
        super().__init__()
        self.model = model
        self.normalization = normalization
        self.loss = loss
        weight = QUANTIZER_WEIGHTS.get(model.config.quantizer, 0.0)
        self.quantizer_weight = weight if loss.quantizer_weight is None else loss.quantizer_weight
        self.precision = training.precision
        self.channels_last = training.channels_last
        self.device_type = device

    def forward(self, images: Tensor, masks: Tensor | None, noise: Tensor | None) -> StepOutput:
        return self.compare(images, masks, noise)[0]

    def compare(self, images: Tensor, masks: Tensor | None, noise: Tensor | None) -> tuple[StepOutput, Tensor]:
        """As forward, never compiled, and with the pictures: (N, 3, H, W) on the scale 0 to 1, not clamped."""
        target = to_unit(images, torch.float64 if self.precision == "float64" else torch.float32)
        if self.channels_last:
            target = target.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            output = self.model(self.normalization.normalize(target), noise)
        picture = self.normalization.denormalize(output.image.to(target.dtype))
        loss = distortion(self.loss, picture, target, masks)
        mse = (picture.detach().clamp(0, 1) - target).square().mean(dim=(1, 2, 3))
        rates = loss.new_zeros(len(images), 0)
        if isinstance(output, Reconstruction) and output.loss is not None:
            loss = loss + self.quantizer_weight * output.loss.to(loss.dtype)
        if isinstance(output, Reconstruction) and output.statistics is not None:
            loss = loss + output.statistics.to(loss.dtype)  # without the weight: moving averages know of none
        if isinstance(output, Coded):
            rates = output.bits / (images.shape[2] * images.shape[3])
            loss = rate_distortion(self.loss, rates.sum(dim=1), loss, output.step)
        return StepOutput(loss, mse.clamp_min(SMALLEST_MSE), rates.detach()), picture

    def _autocast(self) -> torch.autocast:
        """Mixed precision for bf16 and fp16; float32 and float64 compute as they are."""
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device_type, dtype=low or torch.bfloat16, enabled=low is not None)
