"""Which files are found by a glob, a folder and a list, and which mask belongs to which image."""

import codecs
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from PIL import Image

from pipelines.config import RunConfig
from pipelines.data.sources import find_sources
from pipelines.errors import InputError

NAMES = ["b.JPG", "a.png", "deep/er/c.webp", "deep/a.tiff", "deep/notes.txt", ".hidden.png", "d [1].png"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that look like images; nothing here is decoded."""
    for name in NAMES:
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "photos"


def config(tiny: dict[str, Any], images: Path | str, **data: Any) -> RunConfig:
    return make(tiny, data={"images": str(images), **data})


def found(chosen: RunConfig, folder: Path) -> list[str]:
    return sorted(str(Path(image.path).relative_to(folder)) for image in find_sources(chosen).images)


def test_a_folder_is_searched_through(folder: Path, tiny: dict[str, Any]):
    assert found(config(tiny, folder), folder) == sorted(set(NAMES) - {"deep/notes.txt"})


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.png", [".hidden.png", "a.png", "d [1].png"]),
        ("**/*", [name for name in NAMES if name != "deep/notes.txt"]),
        ("**/*.webp", ["deep/er/c.webp"]),
        ("deep/*", ["deep/a.tiff"]),
        ("?.png", ["a.png"]),
        ("[ab].*", ["a.png", "b.JPG"]),
        ("d [1].png", ["d [1].png"]),
    ],
)
def test_globs(folder: Path, tiny: dict[str, Any], glob: str, names: list[str], monkeypatch: pytest.MonkeyPatch):
    assert found(config(tiny, folder / glob), folder) == sorted(names)
    monkeypatch.chdir(folder)
    assert found(config(tiny, glob), folder) == sorted(names)


def test_a_list_names_its_files_relative_to_itself(folder: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    file = folder / "deep" / "list.txt"
    file.write_text(f"# chosen\n\n../a.png\r\n  er/c.webp\n{folder / 'b.JPG'}\n../a.png\nabsent.png\n")
    monkeypatch.chdir("/")
    sources = find_sources(config(tiny, file))
    assert {Path(image.path).resolve() for image in sources.images} == {
        folder / n for n in ("a.png", "b.JPG", "deep/er/c.webp")
    }
    assert [(Path(row.path).name, row.reason) for row in sources.set_aside] == [
        ("absent.png", "No such file or directory")
    ]


def test_a_list_that_was_written_on_windows_is_read_whole(tiny: dict[str, Any], folder: Path):
    file = folder / "list.txt"
    file.write_bytes(codecs.BOM_UTF8 + b"a.png\r\nb.JPG\r\n")
    assert found(config(tiny, file), folder) == ["a.png", "b.JPG"]


def test_nothing_found_names_the_pattern_and_the_way_out(folder: Path, tiny: dict[str, Any]):
    with pytest.raises(InputError, match=r"data\.images '.*/\*\.xyz' matches no image .*quote a glob") as caught:
        find_sources(config(tiny, folder / "*.xyz"))
    assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="matches no image"):
        find_sources(config(tiny, folder / "absent"))
    with pytest.raises(InputError, match=r"data.images is empty: name your images with --data.images"):
        find_sources(config(tiny, ""))
    with pytest.raises(InputError, match=r"list\.txt' is a list that cannot be read: No such file"):
        find_sources(config(tiny, folder / "list.txt"))
    with pytest.raises(InputError, match="is no glob"):
        find_sources(config(tiny, folder / "a**b.png"))
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "only.png")
    with pytest.raises(InputError, match=r"only\.png: it is no regular file"):
        find_sources(config(tiny, folder / "pipe"))


def test_links_do_not_lead_in_circles(folder: Path, tiny: dict[str, Any]):
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "deep" / "again").symlink_to(folder)
    (folder / "z link.png").symlink_to(folder / "a.png")
    expected = sorted(set(NAMES) - {"deep/notes.txt"})
    assert found(config(tiny, folder), folder) == expected
    assert found(config(tiny, folder / "**/*"), folder) == expected


def test_codecmills_own_pictures_and_the_masks_are_no_sources(folder: Path, tiny: dict[str, Any]):
    for place in ("state/runs/x/pictures", "masks"):
        (folder / place).mkdir(parents=True)
        (folder / place / "a.png").write_text(place)
    chosen = make(tiny | {"root": str(folder / "state")}, data={"images": str(folder), "masks": str(folder / "masks")})
    assert found(chosen, folder) == sorted(set(NAMES) - {"deep/notes.txt"})


def test_images_may_lie_beside_the_state_and_masks_beside_their_images(folder: Path, tiny: dict[str, Any]):
    assert "a.png" in found(make(tiny | {"root": str(folder)}, data={"images": str(folder)}), folder)
    (folder / "a.bmp").write_text("the mask")
    beside = find_sources(config(tiny, folder / "*.bmp", masks=str(folder)))
    assert [(image.path, image.mask) for image in beside.images] == [(f"{folder}/a.bmp", f"{folder}/a.png")]
    inside = folder / "runs" / "one"
    inside.mkdir(parents=True)
    (inside / "x.png").write_text("a picture of a run, named on purpose")
    assert found(make(tiny | {"root": str(folder)}, data={"images": str(inside)}), inside) == ["x.png"]


FIND = """
import sys
from pipelines.config import RunConfig
from pipelines.data.sources import find_sources
find_sources(RunConfig.model_validate_json(sys.argv[1]))
"""


def refused(chosen: RunConfig, closed: Path) -> str:
    """What finding the sources of a config ends with while a folder is closed."""
    closed.chmod(0)
    # Root may read every folder, but for the capabilities that let it.
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*powerless, sys.executable, "-c", FIND, chosen.model_dump_json()],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    closed.chmod(0o700)
    return done.stderr


def test_a_folder_that_cannot_be_searched_is_named(folder: Path, tiny: dict[str, Any]):
    said = refused(config(tiny, folder), closed=folder / "deep")
    assert re.search(r"InputError: .*deep cannot be searched for images: Permission denied", said), said


@pytest.mark.parametrize("glob", ["**/*.tiff", "*/*.tiff", "deep/*.tiff", "*/er/*.webp"])
def test_a_folder_that_a_glob_cannot_look_into_is_named(folder: Path, tiny: dict[str, Any], glob: str):
    """pathlib would say nothing, and the rest would be trained on."""
    said = refused(config(tiny, folder / glob), closed=folder / "deep")
    assert re.search(r"InputError: .*deep.* cannot be searched( for images)?: Permission denied", said), said
    assert "InputError" not in refused(config(tiny, folder / "*.png"), closed=folder / "deep"), "it does not look there"


@pytest.mark.parametrize("field", ["images", "masks"])
def test_a_path_that_cannot_be_followed_is_one_sentence(field: str, folder: Path, tiny: dict[str, Any]):
    def chosen(path: str) -> RunConfig:
        return config(tiny, **{"images": str(folder), field: path})

    with pytest.raises(InputError, match=rf"data\.{field} '~nobody-here/x' is in the home of a user unknown here\. Wr"):
        find_sources(chosen("~nobody-here/x"))
    for below in ("", "/*.png"):
        with pytest.raises(InputError, match=rf"data\.{field} '.*' cannot be searched: File name too long\. Check the"):
            find_sources(chosen(f"{folder}/{'y' * 300}{below}"))
    for name in ("er", "*.png"):
        said = refused(chosen(f"{folder}/deep/{name}"), closed=folder / "deep")
        assert f"InputError: data.{field} '{folder}/deep/{name}' cannot be searched: Permission denied." in said, said


def test_entries_that_no_file_can_have_are_set_aside(folder: Path, tiny: dict[str, Any]):
    listed = folder / "list.txt"
    listed.write_text(f"a.png\n{'x' * 300}.png\n{'y' * 300}/a.png\nq\0x/b.png\nb\0.png\n")
    sources = find_sources(config(tiny, listed))
    assert [image.path for image in sources.images] == [f"{folder}/a.png"]
    assert len(sources.set_aside) == 4
    assert all(row.status == "broken" and row.reason for row in sources.set_aside)


def test_a_name_that_is_no_text_is_set_aside(folder: Path, tiny: dict[str, Any]):
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")).write_text("odd")
    (row,) = find_sources(config(tiny, folder)).set_aside
    assert row.path.endswith(r"\xff.png")
    assert row.reason == "its name is not valid UTF-8; rename it"


def masked(folder: Path, tiny: dict[str, Any], *masks: str) -> dict[str, str | None]:
    place = folder.parent / "masks"
    for name in masks:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(place / name)
    sources = find_sources(config(tiny, folder, masks=str(place)))
    return {
        str(Path(image.path).relative_to(folder)): image.mask and str(Path(image.mask).relative_to(place))
        for image in sources.images
    }


def test_masks_are_paired_by_path_first(folder: Path, tiny: dict[str, Any]):
    pairs = masked(folder, tiny, "a.png", "deep/a.png", "c.png")
    assert pairs["a.png"] == "a.png"
    assert pairs["deep/a.tiff"] == "deep/a.png"
    assert pairs["deep/er/c.webp"] == "c.png", "by the bare name, for there is none by the path"
    assert pairs["b.JPG"] is None


def test_a_mask_by_path_is_no_other_images_by_name(folder: Path, tiny: dict[str, Any]):
    pairs = masked(folder, tiny, "deep/a.png")
    assert pairs["deep/a.tiff"] == "deep/a.png"
    assert pairs["a.png"] is None


def test_masks_that_leave_a_choice_are_refused(folder: Path, tiny: dict[str, Any]):
    with pytest.raises(InputError, match=r"a\.png has several masks: .*a\.bmp, .*a\.png"):
        masked(folder, tiny, "a.png", "a.bmp")


def test_a_mask_for_two_images_of_one_name_is_refused(folder: Path, tiny: dict[str, Any]):
    with pytest.raises(InputError, match=r"other/a\.png fits both .*a\.png and .*deep/a\.tiff"):
        masked(folder, tiny, "other/a.png")


def test_a_mask_whose_path_is_no_text_is_refused(folder: Path, tiny: dict[str, Any]):
    with pytest.raises(
        InputError, match=r"The path of .*b\.JPG's mask is not valid UTF-8: .*/caf\\xe9/b\.png\. Rename"
    ):
        masked(folder, tiny, os.fsdecode(b"caf\xe9/b.png"))


def test_a_mask_that_is_no_file_is_no_absent_one(folder: Path, tiny: dict[str, Any]):
    """Its image would be trained on as if it had none, without a word."""
    (folder.parent / "masks").mkdir()
    (folder.parent / "masks" / "b.png").symlink_to(folder / "gone.png")
    with pytest.raises(
        InputError, match=r"1 of the masks in .*masks cannot be used, such as b\.png: it is a link to no"
    ):
        masked(folder, tiny, "a.png")


def test_masks_of_nothing_are_refused(folder: Path, tiny: dict[str, Any]):
    with pytest.raises(InputError, match=r"None of the 1 masks in .* has the name of any of the 6 images"):
        masked(folder, tiny, "zebra.png")
    with pytest.raises(InputError, match=r"data\.masks '.*absent' is no folder"):
        find_sources(config(tiny, folder, masks=str(folder / "absent")))
