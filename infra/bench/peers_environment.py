"""The peers' own environment: made once from `peers.txt`, since what they need does not go with codecmill's lock."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from pipelines.errors import CodecmillError

PINNED = Path(__file__).with_name("peers.txt")
PEERS = ("webdataset", "mosaicml-streaming", "litdata", "torch", "torchvision", "pillow")


def peers_python(folder: Path, torch_index: str | None) -> Path:
    """The interpreter of the peers' environment in `folder`, which is set up where it is missing or another one.

    Args:
        torch_index: where torch and torchvision come from, if not from pip's usual index.

    Raises:
        CodecmillError: it cannot be installed.
    """
    python = folder / "bin" / "python"
    mark = folder / "installed"
    wanted = hashlib.sha256(PINNED.read_bytes()).hexdigest()
    if mark.is_file() and mark.read_text() == wanted:
        return python
    print(f"Setting up the peers' environment in {folder} (as large as codecmill's; minutes, once)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _call([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--constraint", str(PINNED)]
    if torch_index:
        # What torch needs comes from PyPI with the rest, in the versions of peers.txt, which that index need not have.
        _call([*pip, "--index-url", torch_index, "--no-deps", "torch", "torchvision"])
    _call([*pip, *PEERS])
    mark.write_text(wanted)
    return python


def _call(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[-8:])
        raise CodecmillError(
            f"The peers' environment cannot be set up: {' '.join(command[1:4])} ... ended with {done.returncode}.\n"
            f"{said}\nIt needs pip's index once; after that `make bench` runs without a network."
        )


def versions(python: Path, packages: tuple[str, ...] = PEERS) -> dict[str, str]:
    """The versions of packages in an environment, those that are not there left out."""
    script = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n    try:\n        print(name, version(name))\n"
        "    except PackageNotFoundError:\n        pass\n"
    )
    done = subprocess.run([str(python), "-c", script, *packages], capture_output=True, text=True, check=True)
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
