"""Picture files, previews and grids: sizes, pixels and names."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from pipelines.data.images import open_image
from pipelines.evaluation.pictures import (
    ERROR_FACTOR,
    GAP,
    PREVIEW_BYTES,
    PREVIEW_SIDE,
    absolute_error,
    folder_name,
    grid,
    write_pictures,
)


@pytest.mark.parametrize("size", [(1, 1), (17, 33), (70, 40)])
def test_pictures_hold_every_pixel(tmp_path: Path, size: tuple[int, int]) -> None:
    original, reconstruction = picture(1, *size), picture(2, *size)
    write_pictures(tmp_path / "a", original, reconstruction)
    width, height = size
    read = {file.stem: np.asarray(open_image(file)) for file in (tmp_path / "a").iterdir()}
    assert sorted(read) == ["error", "original", "reconstruction", "side_by_side"]
    assert np.array_equal(read["original"], np.asarray(original))
    assert np.array_equal(read["reconstruction"], np.asarray(reconstruction))
    assert read["side_by_side"].shape == (height, 3 * width + 2 * GAP, 3)
    for i, kind in enumerate(("original", "reconstruction", "error")):
        start = i * (width + GAP)
        assert np.array_equal(read["side_by_side"][:, start : start + width], read[kind])


def test_the_error_is_absolute_and_amplified() -> None:
    original = Image.fromarray(np.array([[[10, 10, 0], [255, 0, 128]]], np.uint8))
    reconstruction = Image.fromarray(np.array([[[7, 13, 0], [0, 255, 96]]], np.uint8))
    expected = [[[3 * ERROR_FACTOR, 3 * ERROR_FACTOR, 0], [255, 255, 255]]]
    assert np.array_equal(np.asarray(absolute_error(original, reconstruction)), expected)


def test_previews_are_small_even_of_noise(tmp_path: Path) -> None:
    noise = np.random.Generator(np.random.Philox(1)).integers(0, 256, (700, 1100, 3), np.uint8)
    previews = write_pictures(tmp_path / "noise", Image.fromarray(noise), picture(1, 1100, 700))
    for content in (previews.original, previews.reconstruction, previews.error, previews.thumbnail):
        assert len(content) <= PREVIEW_BYTES
        assert open_image(content).width <= PREVIEW_SIDE
    preview = open_image(previews.reconstruction)
    assert preview.size == (640, 407)
    shrunk = picture(1, 1100, 700).resize(preview.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(preview).astype(int) - np.asarray(shrunk)).mean() < 4


def test_a_small_picture_keeps_its_size_in_the_preview(tmp_path: Path) -> None:
    previews = write_pictures(tmp_path / "small", picture(1, 17, 33), picture(2, 17, 33))
    assert Image.open(BytesIO(previews.original)).size == (17, 33)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a\nb\x00.png",
        "\udcff\udcfe.png",
        "x" * 255,
        ".tmp-x",
        "<script>",
        "日本.png",
        "",
    ],
)
def test_a_folder_name_is_one_portable_part_of_a_path(name: str) -> None:
    found = folder_name(7, name)
    assert found.startswith("00007")
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
    assert len(found) < 80


def test_a_folder_name_is_readable_and_unique_by_number() -> None:
    assert folder_name(12, "Été à la mer.jpeg") == "00012-Ete-a-la-mer"
    assert folder_name(1, "a.png") != folder_name(2, "a.png")


def test_the_grid_has_originals_over_reconstructions() -> None:
    originals = torch.randint(0, 256, (3, 3, 5, 8), dtype=torch.uint8)
    reconstructions = torch.randint(0, 256, (3, 3, 5, 8), dtype=torch.uint8)
    sheet = np.asarray(grid(originals, reconstructions))
    assert sheet.shape == (2 * 5 + GAP, 3 * 8 + 2 * GAP, 3)
    for i in range(3):
        columns = slice(i * (8 + GAP), i * (8 + GAP) + 8)
        assert np.array_equal(sheet[:5, columns], originals[i].permute(1, 2, 0))
        assert np.array_equal(sheet[5 + GAP :, columns], reconstructions[i].permute(1, 2, 0))
