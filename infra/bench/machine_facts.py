"""What a reader of the figures must know of the machine and of the versions."""

import os
import platform
import subprocess
import sys
from pathlib import Path

from infra.bench.contender import PROJECT
from infra.bench.peers_environment import PEERS, versions

OUR_PACKAGES = ("torch", "torchvision", "pillow", "numpy", "webdataset", "prefect", "mlflow")


def machine() -> dict[str, str]:
    """Processor, cores, memory and system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Its name and the instructions that make the difference for training."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name", platform.machine())
    flags = set(found.get("flags", "").split())
    known = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 bf16", "amx_bf16": "AMX bf16"}
    family = f"family {found['cpu family']} model {found['model']}" if "cpu family" in found else ""
    return ", ".join(
        [part for part in (name, family) if part] + [text for flag, text in known.items() if flag in flags]
    )


def all_versions(peers: Path) -> dict[str, dict[str, str]]:
    """Of codecmill's environment, its commit among them, and of the peers'."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    ours = {"codecmill": commit.stdout.strip() or "unknown commit"} | versions(Path(sys.executable), OUR_PACKAGES)
    return {"codecmill's": ours, "the peers'": versions(peers, (*PEERS, "numpy"))}
