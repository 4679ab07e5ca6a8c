"""Which mask belongs to which image: by the path below the searched folder first, by the bare name else."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from pipelines.data.image_files import ImageFile, as_text, files_below, is_image_name
from pipelines.errors import InputError


def masks_below(folder: Path) -> list[ImageFile]:
    """The masks in a folder, named by an absolute path, each with its path below it as its name.

    Raises:
        InputError: the folder is missing, or one of them is no file: its image would be trained on as if it had none.
    """
    if not folder.is_dir():
        raise InputError(f"data.masks '{folder}' is no folder. Name the folder that holds the masks.")
    found = [name for name in files_below(folder) if is_image_name(name)]
    lost = [name for name in found if not (folder / name).is_file()]
    if lost:
        raise InputError(
            f"{len(lost)} of the masks in {folder} cannot be used, such as {as_text(lost[0])}: it is a link to "
            "nothing, or no regular file. Put them right."
        )
    return [ImageFile(str(folder / name), name) for name in found]


def pair_masks(images: Sequence[ImageFile], masks: Sequence[ImageFile], place: str) -> list[ImageFile]:
    """The images, each with the mask that has its name, whatever the suffix; some may have none.

    `dogs/rex.jpg` finds `dogs/rex.png`, or else a `rex.*` anywhere that no other image has by its path.

    Args:
        place: where the masks are, for the messages.

    Raises:
        InputError: there is no mask of any image, a choice is left, or a mask's path is no text.
    """
    own = {image.path for image in images}
    masks = [mask for mask in masks if mask.path not in own]
    by_path, by_stem = defaultdict(list), defaultdict(list)
    for mask in masks:
        by_path[_bare(mask)].append(mask.path)
    names = {_bare(image) for image in images}
    for mask in masks:
        if _bare(mask) not in names:
            by_stem[_bare(mask).name].append(mask.path)
    paired = [_pair(image, by_path, by_stem) for image in images]
    _refuse_shared(paired, by_stem)
    if not any(image.mask for image in paired):
        raise InputError(
            f"None of the {len(masks)} masks in {place} has the name of any of the {len(images)} images, such as "
            f"'{_bare(images[0]).name}'. Name each mask like its image."
        )
    return paired


def _bare(image: ImageFile) -> PurePath:
    return PurePath(image.name).with_suffix("")


def _pair(image: ImageFile, by_path: dict[PurePath, list[str]], by_stem: dict[str, list[str]]) -> ImageFile:
    found = by_path.get(_bare(image)) or by_stem.get(_bare(image).name) or []
    if len(found) > 1:
        several = ", ".join(found[:3])
        raise InputError(f"{image.path} has several masks: {several}. Leave one of them, or give it the image's path.")
    if found and (shown := as_text(found[0])) != found[0]:
        raise InputError(f"The path of {image.path}'s mask is not valid UTF-8: {shown}. Rename it.")
    return replace(image, mask=found[0]) if found else image


def _refuse_shared(images: Sequence[ImageFile], by_stem: dict[str, list[str]]) -> None:
    """A mask found by the bare name must have one taker: two images of that name are not the same picture."""
    takers: dict[str, ImageFile] = {}
    loose = {mask for masks in by_stem.values() for mask in masks}
    for image in images:
        if image.mask in loose:
            other = takers.setdefault(image.mask, image)
            if other is not image:
                raise InputError(
                    f"{image.mask} fits both {other.path} and {image.path}. Give the masks the images' sub-folders."
                )
