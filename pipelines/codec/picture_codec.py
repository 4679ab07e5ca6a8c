"""A picture to bytes and back: the model, its tables and its normalisation as one value."""

import math
from dataclasses import dataclass
from itertools import product

import torch
from PIL import Image

from pipelines.codec.container import CodedPicture
from pipelines.codec.entropy_coder import SymbolReader, SymbolWriter, Tables
from pipelines.data.images import Normalization, to_image, to_levels, to_tensor, to_unit
from pipelines.errors import CodecmillError, InputError
from pipelines.model.codec import STEP_FRACTION, TransformCodec
from pipelines.model.tiling import Span, cut, spans

WINDOW = 128
"""Latents, in each direction, that the networks see at a time, so that large pictures fit the memory."""

LOWEST_QUALITY, HIGHEST_QUALITY = 1.0, 100.0


@dataclass(frozen=True)
class PictureCodec:
    """A trained codec, ready to write and to read.

    Attributes:
        model: in evaluation mode, float32.
        normalization: that it was trained with.
        sha256: of its weights, hexadecimal: a file says which model reads it.
        tables: the probabilities that the model holds.
    """

    model: TransformCodec
    normalization: Normalization
    sha256: str
    tables: Tables

    def step_of(self, quality: float) -> int:
        """256 log2 of the quantiser's step of a quality from 1 to 100.

        Raises:
            InputError: the quality is outside.
        """
        if not LOWEST_QUALITY <= quality <= HIGHEST_QUALITY:
            raise InputError(f"The quality {quality:g} is not between {LOWEST_QUALITY:g} and {HIGHEST_QUALITY:g}.")
        coarsest, finest = self.coarsest_and_finest
        share = (quality - LOWEST_QUALITY) / (HIGHEST_QUALITY - LOWEST_QUALITY)
        return round(coarsest + share * (finest - coarsest))

    @property
    def coarsest_and_finest(self) -> tuple[int, int]:
        """256 log2 of the steps at the ends of the range: of the lowest quality and of the highest."""
        finest, coarsest = (round(2**STEP_FRACTION * math.log2(step)) for step in self.model.config.step_range)
        return coarsest, finest

    @torch.inference_mode()
    def encode(self, image: Image.Image, step: int) -> bytes:
        """The file of a picture (mode RGB) of any size.

        Args:
            step: 256 log2 of the quantiser's step in grey levels.
        """
        levels = to_tensor(image)[None]
        device, stride = self.model.gain.device, self.model.stride
        height, width = self.latents_of(image.height, image.width)
        latents = torch.empty(1, len(self.model.gain), height, width)
        for rows, columns in product(*self._windows(height, width, self.model.encoder.network.reach)):
            window = cut(levels, _in_pixels(rows, stride), _in_pixels(columns, stride)).to(device)
            y = self.model.analyse(self.normalization.normalize(to_unit(window, torch.float32)), step)
            latents[..., rows.result, columns.result] = y[..., rows.share, columns.share].cpu()
        writer = SymbolWriter(self.tables)
        self.model.write(latents, step, writer)
        return CodedPicture(image.width, image.height, step, self.sha256, writer.content()).to_bytes()

    @torch.inference_mode()
    def decode(self, coded: CodedPicture) -> Image.Image:
        """The picture (mode RGB) of a file that this model wrote: the same pixels on every machine.

        Raises:
            InputError: another model wrote it.
            CodecmillError: its content is none of this model.
        """
        if coded.model != self.sha256:
            raise InputError(
                f"The file was written by the model with sha256 {coded.model[:16]}, and cannot be read by "
                f"{self.sha256[:16]}: name the other model."
            )
        size = self.latents_of(coded.height, coded.width)
        latents = self.model.read(size, coded.step, SymbolReader(self.tables, coded.payload))
        stride = self.model.stride
        levels = torch.empty(3, size[0] * stride, size[1] * stride, dtype=torch.uint8)
        for rows, columns in product(*self._windows(*size, self.model.decoder.network.reach)):
            window = latents[..., rows.start : rows.stop, columns.start : columns.stop]
            y = self.normalization.denormalize(self.model.synthesise(window, coded.step))
            if not y.isfinite().all():
                raise CodecmillError(
                    "The model's output is not finite: its training has diverged. Use an earlier checkpoint."
                )
            rows, columns = _in_pixels(rows, stride), _in_pixels(columns, stride)
            levels[:, rows.result, columns.result] = to_levels(y[0, :, rows.share, columns.share]).cpu()
        return to_image(levels[:, : coded.height, : coded.width])

    def latents_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of a picture."""
        return -(-height // self.model.stride), -(-width // self.model.stride)

    def _windows(self, height: int, width: int, reach: int) -> tuple[list[Span], list[Span]]:
        """Rows and columns of latents that a network goes through at a time, and sees the same as of all at once."""
        return spans(height, WINDOW, 2 * reach, 1), spans(width, WINDOW, 2 * reach, 1)


def _in_pixels(latents: Span, stride: int) -> Span:
    return Span(*(stride * place for place in latents))
