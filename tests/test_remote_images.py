"""Images in a store: found as in a folder, fetched once, and again only where they have changed."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from object_store import BUCKET, Proxy, the_store
from PIL import Image
from processes import PROJECT, wait_for

from pipelines.data.shards import create_shards
from pipelines.data.sources import check_sources, find_images, find_sources
from pipelines.errors import InputError
from pipelines.locks import lock
from pipelines.progress import listen
from pipelines.run_directory import Root
from pipelines.storage import StoreRefused, StoreUnavailable, patience, s3


@pytest.fixture
def remote(photos: Path, proxy: Proxy) -> str:
    """The address of the generated pictures in the store, among other things."""
    store = the_store()
    for number, file in enumerate(sorted(photos.iterdir())):
        store.send(file, f"photos/{'deep/er' if number % 2 else 'flat'}/{file.name}")
    store.send(next(photos.iterdir()), "other/photo.png")
    return store.url


def test_a_shard_set_of_images_in_a_store_is_that_of_the_same_images_in_a_folder(
    tiny: dict[str, Any], remote: str, proxy: Proxy, tmp_path: Path
):
    expected = create_shards(make(tiny, root=str(tmp_path / "local")))
    config = make(tiny, data={"images": f"{remote}/photos/**/*.png"})
    check_sources(config)
    assert proxy.count("GET", "photo%20") + proxy.count("GET", "photo+") == 0
    found = create_shards(config)
    assert found.fingerprint == expected.fingerprint
    assert [(row.name, row.sha256) for row in found.manifest.shards] == [
        (row.name, row.sha256) for row in expected.manifest.shards
    ]
    proxy.requests.clear()
    assert create_shards(config).path == found.path
    assert [method for method, path in proxy.requests] == ["GET"]  # the listing


def test_masks_in_a_store_are_those_of_the_same_masks_in_a_folder(
    tiny: dict[str, Any], remote: str, photos: Path, proxy: Proxy, tmp_path: Path
):
    (folder := tmp_path / "masks").mkdir()
    for file in sorted(photos.iterdir())[::2]:
        with Image.open(file) as image:
            image.convert("L").save(folder / file.name)
        the_store().send(folder / file.name, f"photos/masks/{file.name}")
    expected = create_shards(make(tiny, root=str(tmp_path / "local"), data={"masks": str(folder)}))
    choice = {"images": f"{remote}/photos", "masks": f"{remote}/photos/masks"}
    check_sources(make(tiny, data=choice))
    found = create_shards(make(tiny, data=choice))
    assert [(row.name, row.sha256) for row in found.manifest.shards] == [
        (row.name, row.sha256) for row in expected.manifest.shards
    ]
    for choice, why in (
        ({"masks": f"{remote}/nowhere"}, r"data\.masks 's3://.*nowhere' matches no image"),
        ({"images": f"{remote}/photos", "masks": f"{remote}/photos"}, "names all that data.images names"),
        ({"masks": f"{remote}/other"}, r"None of the 1 masks in s3://.*/other has the name of"),
    ):
        with pytest.raises(InputError, match=why):
            find_sources(make(tiny, data=choice))
    proxy.break_("flip", "GET", "masks/photo%2002")
    with pytest.raises(InputError, match=r"1 of the masks cannot be used, such as s3://.*photo 02\.png: "):
        find_sources(make(tiny, root=str(tmp_path / "anew"), data=choice | {"masks": f"{remote}/photos/masks"}))


def test_globs_prefixes_and_single_images_mean_what_they_mean_on_disk(remote: str, tmp_path: Path):
    def names(what: str) -> list[str]:
        return [image.name for image in find_images(f"{remote}/{what}", "data.images", Root(tmp_path)).images]

    assert len(names("photos")) == len(names("photos/")) == 12
    assert len(names("")) == 13
    assert names("photos/*/*.png") == [f"flat/photo {number:02d}.png" for number in range(0, 12, 2)]
    assert names("photos/deep/**/photo 0[13].png") == ["er/photo 01.png", "er/photo 03.png"]
    assert names("other/photo.png") == ["photo.png"]
    for what, why in (("nothing/", "matches no image"), ("photos/**.png", "is no glob")):
        with pytest.raises(InputError, match=why):
            names(what)


def test_what_has_changed_is_fetched_again_and_what_is_gone_is_none(
    remote: str, photos: Path, proxy: Proxy, tmp_path: Path
):
    root = Root(tmp_path)
    before = find_images(f"{remote}/photos", "data.images", root).images
    content = (photos / "photo 00.png").read_bytes()
    (changed := tmp_path / "changed.png").write_bytes(content[:-1] + b"?")  # of the same size
    the_store().send(changed, "photos/flat/photo 00.png")
    the_store().remove("photos/flat/photo 02.png")
    proxy.requests.clear()
    after = find_images(f"{remote}/photos", "data.images", root).images
    assert len(after) == len(before) - 1
    assert proxy.count("GET", "photo") - proxy.count("GET", "list-type") == 1
    (found,) = [image.path for image in after if image.name == "flat/photo 00.png"]
    assert Path(found).read_bytes() == changed.read_bytes()


def test_keys_with_names_of_ours_are_no_images(remote: str, photos: Path, tmp_path: Path):
    for key in (".listing.json/x.png", "a/.tmp-b/x.png"):
        the_store().send(photos / "photo 00.png", f"odd/{key}")
    the_store().send(photos / "photo 00.png", "odd/x.png")
    for _ in range(2):
        found = find_images(f"{remote}/odd", "data.images", Root(tmp_path))
        assert [image.name for image in found.images] == ["x.png"]


def test_another_process_that_fetches_the_same_images_is_waited_for_and_it_is_said(remote: str, tmp_path: Path):
    root, said = Root(tmp_path), []
    root.images.mkdir()
    stop = listen(lambda progress: said.append(progress.message))
    try:
        with ThreadPoolExecutor(1) as pool:
            with lock(root.images / f".tmp-{BUCKET}.lock", "another process", wait=0):
                found = pool.submit(find_images, f"{remote}/photos", "data.images", root)
                wait_for(lambda: bool(said), 30)
                assert said == ["waiting for another process that fetches the same images"]
            assert len(found.result(60).images) == 12
    finally:
        stop()


def test_half_an_image_and_a_changed_byte_are_none_and_an_absent_store_is_named(
    remote: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.3)
    proxy.break_("half", "GET", "photo%2000", times=1)
    proxy.break_("flip", "GET", "photo%2001", times=1)
    found = find_images(f"{remote}/photos", "data.images", Root(tmp_path))
    assert len(found.images) == 12 and [fault.met for fault in proxy.faults] == [1, 1]
    proxy.break_("flip", "GET", "photo%2001")
    found = find_images(f"{remote}/photos", "data.images", Root(tmp_path / "anew"))
    assert len(found.images) == 11
    assert found.set_aside[0].path.endswith("photo 01.png") and "fetched" in found.set_aside[0].reason
    proxy.break_("503", "GET", "")
    with pytest.raises(StoreUnavailable, match=r"photos/ could not be listed, \d times in \d s: Service Unavailable"):
        find_images(f"{remote}/photos", "data.images", Root(tmp_path))


def test_what_cannot_be_kept_or_read_of_a_bucket_is_set_aside_and_the_rest_goes_on(
    photos: Path, proxy: Proxy, tmp_path: Path
):
    store, photo = the_store(), next(photos.iterdir())
    long, longer = "l" * 246 + ".png", "x" * 252 + ".png"
    for key in ("a.png", long, longer, "folder.png", "folder.png/b.png", "archived.png"):
        store.send(photo, f"odd/{key}")
    proxy.break_("403", "GET", "archived.png")
    found = find_images(f"{store.url}/odd", "data.images", Root(tmp_path))
    assert [image.name for image in found.images] == ["a.png", "folder.png", long]
    reasons = {row.path.removeprefix(f"{store.url}/odd/"): row.reason for row in found.set_aside}
    assert set(reasons) == {longer, "folder.png/b.png", "archived.png"}
    assert reasons[longer].endswith("File name too long")
    assert re.fullmatch(
        r"its key lies below that of another image, .*odd/folder\.png; rename one of them", reasons["folder.png/b.png"]
    )
    assert "archived.png could not be fetched: " in reasons["archived.png"]


def test_a_key_that_expires_meanwhile_is_no_fault_of_the_images_that_are_left(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As S3 says it, in the words of botocore and s3fs; other refusals may be of one image alone."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    fetch, code = s3.S3.fetch, "ExpiredToken"

    def refused(self: s3.S3, key: str, *rest: Any) -> None:
        if key.endswith(last):
            error = ClientError({"Error": {"Code": code, "Message": f"No ({code})."}}, "GetObject")
            raise translate_boto_error(error)
        fetch(self, key, *rest)

    last = sorted(each.key for each in the_store().list("photos/"))[-1]
    monkeypatch.setattr(s3.S3, "fetch", refused)
    with pytest.raises(StoreRefused, match=r"could not be fetched: .*AWS_ACCESS_KEY_ID"):
        find_images(f"{remote}/photos", "data.images", Root(tmp_path))
    code = "AccessDenied"
    found = find_images(f"{remote}/photos", "data.images", Root(tmp_path))
    assert [row.path for row in found.set_aside] == [the_store().address(last)]


def test_what_a_killed_process_has_fetched_is_not_fetched_again(remote: str, proxy: Proxy, tmp_path: Path):
    proxy.break_("stall", "GET", "flat/")  # one of them, at least, is asked for before the last
    script = (
        "import sys; from pathlib import Path; from pipelines.data import remote_images; "
        "from pipelines.run_directory import Root; remote_images.SAVE_SECONDS = 0.0; remote_images.AT_ONCE = 1; "
        "remote_images.fetch_images(sys.argv[2], 'data.images', Root(Path(sys.argv[1])))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), f"{remote}/photos"], cwd=PROJECT)
    listing = tmp_path / "images" / BUCKET / ".listing.json"
    try:
        wait_for(listing.is_file, 30)
        wait_for(lambda: proxy.count("GET", "flat/") > 0, 30)
    finally:
        process.kill()
        process.wait()
    proxy.faults.clear()
    proxy.requests.clear()
    assert find_images(f"{remote}/photos", "data.images", Root(tmp_path)).images
    assert proxy.count("GET", "deep/er/") == 0


def test_a_listing_of_many_pages_has_patience_for_each(
    remote: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(s3, "PAGE_KEYS", 3)
    everything = [each.key for each in the_store().list("")]
    assert len(everything) == 13 and everything == sorted(everything)
    listings = proxy.count("GET", "list-type=2")
    assert listings == 5
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.3)
    fault = proxy.break_("503", "GET", "continuation-token", times=2)
    assert [each.key for each in the_store().list("")] == everything
    assert fault.met == 2
    assert proxy.count("GET", "list-type=2") == 2 * listings + 2, (
        "a page that fails is asked for again, not all of them"
    )
