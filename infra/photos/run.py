"""Fetches photographs to train and to measure codecs on, from Debian packages, and prepares them: `make photos`.

Some go to `codecmill-data/photos/`, the others, held out, to `codecmill-data/photos-heldout/`. All are reduced by at
least 2, so that nothing remains of the blocks of their JPEG files, and to 960 pixels at most.
Needs a Debian machine (`apt-get`, `dpkg-deb`); nothing is installed.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pipelines.data.images import open_image
from pipelines.durable_files import write_bytes
from pipelines.errors import CodecmillError, InputError
from pipelines.file_digests import file_sha256

LIST = Path(__file__).with_name("list.txt")
FOLDERS = {"train": "photos", "heldout": "photos-heldout"}
LONGEST = 960
"""Pixels of a prepared photograph's longer side, at most. Larger ones to train on are too smooth: measured."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("codecmill-data"), help="folder [codecmill-data]")
    root = parser.parse_args().root
    rows = [line.split(maxsplit=3) for line in LIST.read_text().splitlines() if not line.startswith("#")]
    missing = [row for row in rows if not _prepared(root, row).is_file()]
    if missing:
        try:
            _fetch(root, missing)
        except (CodecmillError, subprocess.CalledProcessError) as error:
            print(f"codecmill photos: {error}", file=sys.stderr)
            return 2 if isinstance(error, InputError) else 1
    for part, folder in FOLDERS.items():
        print(f"{sum(row[1] == part for row in rows)} photographs in {root / folder}")
    return 0


def _prepared(root: Path, row: list[str]) -> Path:
    return root / FOLDERS[row[1]] / f"{Path(row[3]).stem}.png"


def _fetch(root: Path, rows: list[list[str]]) -> None:
    """Fetch the packages of some rows into a temporary folder, and prepare their photographs."""
    if missing := [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]:
        raise InputError(
            f"There is no {' and no '.join(missing)} here, and the photographs come in Debian packages. Fetch them on "
            f"a Debian machine, and copy its {' and '.join(FOLDERS.values())} to {root}."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packages = sorted({row[2] for row in rows})
        print(f"Fetching {', '.join(packages)}", flush=True)
        quietly = ("-qq", "-o", "APT::Sandbox::User=root")  # else it remarks that its own user cannot write here
        subprocess.run(["apt-get", "download", *quietly, *packages], cwd=folder, check=True)
        for package in packages:
            (file,) = folder.glob(f"{package}_*.deb")
            subprocess.run(["dpkg-deb", "-x", file, folder / package], check=True)
        for row in rows:
            sha256, _, package, path = row
            source = folder / package / path
            if not source.is_file() or file_sha256(source) != sha256:
                raise InputError(f"{package} has no longer the {path} that {LIST.name} names: another Debian release?")
            target = _prepared(root, row)
            target.parent.mkdir(parents=True, exist_ok=True)
            _reduce(open_image(source), LONGEST, target)


def _reduce(image: Image.Image, longest: int, target: Path) -> None:
    factor = max(2.0, max(image.size) / longest)
    size = round(image.width / factor), round(image.height / factor)
    content = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(content, format="PNG")
    write_bytes(target, content.getvalue())


if __name__ == "__main__":
    sys.exit(main())
