"""A picture to bytes and back: the model, its tables and its normalisation as one value."""

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from pipelines.codec.container import LIMITS, CodedPicture, is_allowed, most_bytes
from pipelines.codec.entropy_coder import SymbolReader, SymbolWriter, Tables
from pipelines.data.images import Normalization, to_image, to_levels, to_tensor, to_unit
from pipelines.errors import CodecmillError, InputError
from pipelines.model.codec import STEP_FRACTION, TransformCodec
from pipelines.model.tiling import Span, spans, tiled

WINDOW = 128
"""Latents, in each direction, that the networks go through at a time, so that large pictures fit the memory."""

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

    @property
    def has_one_quality(self) -> bool:
        """Whether it was trained for one step alone."""
        coarsest, finest = self.coarsest_and_finest
        return coarsest == finest

    @torch.inference_mode()
    def encode(self, image: Image.Image, step: int) -> bytes:
        """The file of a picture (mode RGB).

        Args:
            step: 256 log2 of the quantiser's step in grey levels.

        Raises:
            InputError: the picture is so large that its file would be refused when it is read.
            CodecmillError: its file would be, or the model's training has diverged.
        """
        if not is_allowed(*image.size):
            raise InputError(f"A picture of {image.width} x {image.height} pixels cannot be coded: {LIMITS}. Cut it.")

        def analyse(levels: Tensor) -> Tensor:
            x = self.normalization.normalize_(to_unit(levels.to(self.model.gain.device), torch.float32))
            return self.model.analyse(x, step).cpu()

        windows = _windows(self.latents_of(image.height, image.width), self.model.encoder.network.reach)
        latents = tiled(analyse, to_tensor(image)[None], *windows, read=self.model.stride)
        writer = SymbolWriter(self.tables)
        self.model.write(latents, step, writer)
        payload = writer.content()
        if len(payload) > (most := most_bytes(*image.size)):
            raise CodecmillError(
                f"A picture of {image.width} x {image.height} pixels takes {len(payload):,} bytes by this model, more "
                f"than the {most:,} that a file may have: use another model, or a lower quality."
            )
        return CodedPicture(image.width, image.height, step, self.sha256, payload).to_bytes()

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

        def synthesise(latents: Tensor) -> Tensor:
            y = self.normalization.denormalize(self.model.synthesise(latents, coded.step))
            if not y.isfinite().all():
                raise CodecmillError(
                    "The model's output is not finite: its training has diverged. Use an earlier checkpoint."
                )
            return to_levels(y)

        size = self.latents_of(coded.height, coded.width)
        reader = SymbolReader(self.tables, coded.payload, symbols=len(self.model.gain) * size[0] * size[1])
        latents = self.model.read(size, coded.step, reader)
        reader.finish()
        windows = _windows(size, self.model.decoder.network.reach)
        levels = tiled(synthesise, latents, *windows, written=self.model.stride)
        return to_image(levels[0, :, : coded.height, : coded.width])

    def latents_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of a picture."""
        return -(-height // self.model.stride), -(-width // self.model.stride)


def _windows(size: tuple[int, int], reach: int) -> tuple[list[Span], list[Span]]:
    """Rows and columns of latents that a network goes through at a time, and sees the same as of all at once."""
    height, width = (spans(length, WINDOW + 2 * reach, 2 * reach, 1) for length in size)
    return height, width
