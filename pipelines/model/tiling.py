"""A picture of any size through a network that wants multiples of its stride, in tiles that fit the memory."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Span(NamedTuple):
    """A tile along one axis: it covers [start, stop), of which [keep_from, keep_to) enters the result."""

    start: int
    stop: int
    keep_from: int
    keep_to: int

    @property
    def result(self) -> slice:
        """Where in the result its share lies."""
        return slice(self.keep_from, self.keep_to)

    @property
    def share(self) -> slice:
        """Where in the tile that lies."""
        return slice(self.keep_from - self.start, self.keep_to - self.start)

    def times(self, factor: int) -> "Span":
        """The same tile where there are `factor` places for each."""
        return Span(*(factor * place for place in self))


def reconstruct_tiled(model_fn: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, stride: int) -> Tensor:
    """`model_fn` over a picture of any size.

    The picture is padded at the bottom and right to multiples of the stride by repeating its last row and column, and
    the result is cropped back. Up to `tile` in both directions it is one call. Above that it is cut into tiles that
    share `overlap` pixels with their neighbours, and the results are cut in the middle of what is shared. With an
    overlap of twice `receptive_radius` no kept pixel sees a tile's edge, so that nothing but rounding tells the result
    from an untiled one.

    Args:
        model_fn: takes and returns (1, 3, h, w) with h and w multiples of `stride`; any type, any device.
        x: (1, 3, H, W) of any type.
        tile: largest side of a tile, in pixels; rounded up to a multiple of the stride.
        overlap: pixels shared by neighbours, rounded up likewise; at most what leaves a tile one stride further on.
        stride: pixels.

    Returns:
        (1, 3, H, W) of the type and on the device of what `model_fn` returns.
    """
    rows, columns = (spans(length, tile, overlap, stride) for length in x.shape[2:])
    return tiled(model_fn, x, rows, columns)


def tiled(
    fn: Callable[[Tensor], Tensor], x: Tensor, rows: list[Span], columns: list[Span], read: int = 1, written: int = 1
) -> Tensor:
    """`fn` over tiles, put together.

    Args:
        fn: takes tiles (1, C, h, w), and returns (1, D, h * written / read, w * written / read).
        x: (1, C, H, W); its edge is repeated where tiles reach beyond it.
        rows, columns: of the tiles, see `spans`.
        read, written: rows and columns of x, and of the result, for each of those that the tiles count.

    Returns:
        Of the type and on the device of what `fn` returns.
    """
    result = torch.empty(0)
    for down, across in product(rows, columns):
        part = fn(_cut(x, down.times(read), across.times(read)))
        if not result.numel():
            result = part.new_empty((*part.shape[:2], rows[-1].keep_to * written, columns[-1].keep_to * written))
        to_rows, to_columns = down.times(written), across.times(written)
        result[..., to_rows.result, to_columns.result] = part[..., to_rows.share, to_columns.share]
    return result


def receptive_radius(model: nn.Module, x: Tensor) -> int:
    """How far, at most, an output pixel of a convolutional model looks in each direction, in pixels.

    The reaches of all convolutions (undilated) are added up, which is exact for a chain and too much for parallel
    branches; to that comes a block of the coarsest resolution, for a pixel sees what its whole block sees.

    Args:
        x: what to call the model with to see its resolutions, (1, 3, H, W).
    """
    reach, block = 0.0, 1.0

    def add(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal reach, block
        pixels = x.shape[2] / inputs[0].shape[2]
        reach += module.weight.shape[2] // 2 * pixels
        block = max(block, pixels)

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        with torch.inference_mode():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return round(reach + block - 1)


def spans(length: int, tile: int, overlap: int, stride: int) -> list[Span]:
    """The tiles along an axis: as few as do, all of one size and no larger than needed; the last ends with the axis.

    Args:
        tile, overlap: as of `reconstruct_tiled`.
    """
    tile, overlap, padded = (-(-value // stride) * stride for value in (tile, overlap, length))
    if padded <= tile:
        return [Span(0, padded, 0, length)]
    overlap = min(overlap, tile - stride)
    count = -(-(padded - overlap) // (tile - overlap))
    tile = -(-(padded + (count - 1) * overlap) // (count * stride)) * stride
    starts = [*range(0, (count - 1) * (tile - overlap), tile - overlap), padded - tile]
    cuts = [0, *((start + former + tile) // 2 for former, start in pairwise(starts)), length]
    return [Span(start, start + tile, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


def _cut(x: Tensor, rows: Span, columns: Span) -> Tensor:
    """One tile of (N, C, H, W), the edge repeated where it reaches beyond the picture."""
    height, width = x.shape[2:]
    y = torch.arange(rows.start, rows.stop, device=x.device).clamp(max=height - 1)
    part = x[:, :, y, columns.start : min(columns.stop, width)]
    return part[..., torch.arange(columns.stop - columns.start, device=x.device).clamp(max=part.shape[3] - 1)]


def regions(size: Sequence[int], most: int, multiple: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the parts of h x w places, row by row: as few as do, nearly equal, and without overlap.

    Args:
        size: h and w.
        most: places in each direction of a part; a multiple of `multiple`.
        multiple: what parts begin at multiples of.
    """
    rows, columns = (_parts(length, most, multiple) for length in size)
    yield from product(rows, columns)


def _parts(length: int, most: int, multiple: int) -> list[slice]:
    count = -(-length // most)
    units = -(-length // multiple)
    cuts = [min(length, units * i // count * multiple) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
