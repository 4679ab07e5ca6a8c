"""Which code, which packages and what kind of processor made a result."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "codecmill",
    "torch",
    "torchvision",
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


PROCESSOR = "processor"
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""By which libraries choose among their kernels."""


def package_versions(device: str = "cpu") -> dict[str, str]:
    """The versions of Python and of every package that shapes a result, and the processor, which does so, too.

    Args:
        device: that computes, as in `training.device`.
    """
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), PROCESSOR: _gpu() if device == "cuda" else _processor(), **versions}


def installed(package: str) -> str | None:
    """The version of any package, such as one that counted in former times; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


@cache
def _processor() -> str:
    """The kind of processor: on another one, kernels may add in another order.

    Its maker counts too, for Intel's library goes by that.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (about.get("flags") or about.get("Features") or "").split()
    return " ".join([about.get("vendor_id", platform.machine()), *(each for each in _INSTRUCTIONS if each in flags)])


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
