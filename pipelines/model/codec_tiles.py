"""A picture of any size through a codec as through its file, in floating point, in parts that fit the memory."""

from collections.abc import Callable

from torch import Tensor

from pipelines.model.codec import TransformCodec
from pipelines.model.tiling import Span, spans, tiled
from pipelines.model.transforms import Network


def code_in_tiles(
    codec: TransformCodec, into: Callable[[Tensor], Tensor], out_of: Callable[[Tensor], Tensor], x: Tensor, tile: int
) -> Tensor:
    """What becomes of a picture at the middle step.

    Not the whole codec goes through tiles: each pass of an entropy model looks farther than the one before, together
    hundreds of pixels, and from a grid that would begin anew in each tile. Only its networks do, which look a few
    latents far; the latents between them are quantised as in a file.

    Args:
        into, out_of: a tile of x to a normalised image (1, 3, h, w) on the codec's device, and back.
        x: (1, 3, H, W) of any type.
        tile: side of what a tile adds to the result, in pixels.

    Returns:
        (1, 3, H, W) of the type and on the device of what `out_of` returns.
    """
    height, width = x.shape[-2:]
    levels, log2_step = codec.levels(codec.middle_step(codec.gain[:1]))

    def windows(network: Network) -> tuple[list[Span], list[Span]]:
        sizes, reach = (-(-height // codec.stride), -(-width // codec.stride)), network.reach
        rows, columns = (spans(size, max(1, tile // codec.stride) + 2 * reach, 2 * reach, 1) for size in sizes)
        return rows, columns

    def analyse(part: Tensor) -> Tensor:
        return codec.encoder(into(part), levels, log2_step).cpu()

    def synthesise(part: Tensor) -> Tensor:
        return out_of(codec.decoder(part.to(levels.device), levels, log2_step))

    y = tiled(analyse, x, *windows(codec.encoder.network), read=codec.stride)
    codec.quantise(y, log2_step)
    return tiled(synthesise, y, *windows(codec.decoder.network), written=codec.stride)[..., :height, :width]
