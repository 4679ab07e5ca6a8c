"""Which code and which packages made a result."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "codecmill",
    "torch",
    "torchvision",
    "torchmetrics",
    "numpy",
    "pillow",
    "deflate",
    "isal",
    "zlib-ng",
    "pyspng",
    "constriction",
    "webdataset",
    "safetensors",
    "prefect",
    "mlflow",
)


def package_versions() -> dict[str, str]:
    """The versions of Python and of every package that shapes a result."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of codecmill's own checkout, with '+changes' if it was edited since; None where it is no checkout.

    An environment may lie in the checkout of something else, whose commit says nothing about us: there `file`, which
    is one of ours, is not tracked.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return _git(file.parent, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
