"""The machine: system and Python, packages, compiler, processors and GPUs, the loopback network."""

import os
import platform
import re
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from pipelines.doctor.findings import Finding, fault, good, note
from pipelines.processor_cores import usable_cores

OURS = "codecmill"
DRIVER = Path("/proc/driver/nvidia/version")
INSTALL = "Install what was tried together: pip install --constraint requirements.lock --editable ."


def examine_machine() -> Iterator[Finding]:
    yield _system()
    yield _packages()
    yield _loopback()
    yield _compiler()
    yield from _devices()


def _system() -> Finding:
    text = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    if platform.system() != "Linux":
        return fault("system", text, "Use Linux: locks, and children that die with their parent, rely on it.")
    return good("system", text)


def _packages() -> Finding:
    """Every package that we require, against the versions that we say work; extras are left out."""
    wrong, count = [], 0
    for requirement in map(Requirement, metadata.requires(OURS) or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return fault("packages", "; ".join(wrong), INSTALL)
    named = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "prefect", "mlflow"))
    return good("packages", f"{named} and {count - 3} more, all within what works")


def _loopback() -> Finding:
    """Ranks and embedded servers meet there."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError as error:
        remedy = "Allow processes of this machine to connect to each other on 127.0.0.1."
        return fault("ports", f"nothing can listen and be reached on 127.0.0.1: {error}", remedy)
    return good("ports", "processes reach each other on 127.0.0.1")


def _compiler() -> Finding:
    from pipelines.training.machine import missing_to_compile

    missing = missing_to_compile()
    if missing is None:
        return good("compiler", "torch.compile finds one, and Python's headers")
    return note(
        "compiler",
        f"there is no {missing}, so training.compile is not possible here",
        "Install it if you want to compile.",
    )


def _devices() -> Iterator[Finding]:
    import torch

    from pipelines.training.machine import bf16_pays

    kind = "bf16 in hardware" if bf16_pays("cpu") else "float32, which is faster here than bf16"
    yield good("processor", f"{usable_cores()} cores, {kind}")
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield good(f"GPU {number}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.cuda.device_count() > 1 and not torch.distributed.is_nccl_available():
        yield fault("NCCL", "this torch has none, so several GPUs cannot train together", INSTALL)


def _no_gpu(built_for: str | None) -> Finding:
    if not DRIVER.exists():
        return good("GPU", "none; training runs on the processor")
    if built_for is None:
        return note("GPU", "there is one, but this torch is built without CUDA", "See 'CPU only, or another CUDA'.")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not any(Path("/dev").glob("nvidia[0-9]*")):
        return note("GPU", "there is a driver, but no GPU is visible here", "Training runs on the processor.")
    newest = _driver_version()
    return fault(
        "GPU", f"there is one, but torch (for CUDA {built_for}) cannot use driver {newest}", "Update the driver."
    )


def _driver_version() -> str:
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", DRIVER.read_text("ascii", "replace"))
    return found.group() if found else "of unknown version"
