"""Which mask belongs to which image: by the path below the searched folder first, by the bare name else."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipelines.data.image_files import ImageFile, files_below, is_image_name
from pipelines.errors import InputError


def pair_masks(images: Sequence[ImageFile], folder: Path) -> list[ImageFile]:
    """The images, each with the mask from `folder` that has its name, whatever the suffix; some may have none.

    `dogs/rex.jpg` finds `dogs/rex.png`, or else a `rex.*` anywhere in `folder` that no other image has by its path.

    Raises:
        InputError: the folder is missing, holds no mask of any image, or leaves a choice.
    """
    if not folder.is_dir():
        raise InputError(f"data.masks '{folder}' is no folder. Name the folder that holds the masks.")
    own = {image.path for image in images}
    masks = [
        path for path in files_below(folder) if is_image_name(path) and path.is_file() and path.absolute() not in own
    ]
    by_path, by_stem = defaultdict(list), defaultdict(list)
    for mask in masks:
        by_path[mask.relative_to(folder).with_suffix("")].append(mask)
    names = {image.name.with_suffix("") for image in images}
    for mask in masks:
        if mask.relative_to(folder).with_suffix("") not in names:
            by_stem[mask.stem].append(mask)
    paired = [_pair(image, by_path, by_stem) for image in images]
    _refuse_shared(paired, by_stem)
    if not any(image.mask for image in paired):
        raise InputError(
            f"None of the {len(masks)} masks in {folder} has the name of any of the {len(images)} images, such as "
            f"'{images[0].name.stem}'. Name each mask like its image."
        )
    return paired


def _pair(image: ImageFile, by_path: dict[Path, list[Path]], by_stem: dict[str, list[Path]]) -> ImageFile:
    found = by_path.get(image.name.with_suffix("")) or by_stem.get(image.name.stem) or []
    if len(found) > 1:
        several = ", ".join(map(str, found[:3]))
        raise InputError(f"{image.path} has several masks: {several}. Leave one of them, or give it the image's path.")
    return replace(image, mask=found[0].absolute()) if found else image


def _refuse_shared(images: Sequence[ImageFile], by_stem: dict[str, list[Path]]) -> None:
    """A mask found by the bare name must have one taker: two images of that name are not the same picture."""
    takers: dict[Path, ImageFile] = {}
    loose = {mask.absolute() for masks in by_stem.values() for mask in masks}
    for image in images:
        if image.mask in loose:
            other = takers.setdefault(image.mask, image)
            if other is not image:
                raise InputError(
                    f"{image.mask} fits both {other.path} and {image.path}. Give the masks the images' sub-folders."
                )
