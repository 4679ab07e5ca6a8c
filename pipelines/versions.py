"""Which code and which packages made a result."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("codecmill", "torch", "torchvision", "numpy", "pillow", "webdataset", "safetensors", "prefect", "mlflow")


def package_versions() -> dict[str, str]:
    """The versions of Python and of every package that shapes a result."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def git_commit() -> str | None:
    """The commit of codecmill's own checkout, with '+changes' if it was edited since; None where it is no checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
