"""How busy the machine is, read from /proc: figures that the journal holds under `system/`."""

import shutil
from pathlib import Path


class SystemMetrics:
    """Samples the whole machine, other people's processes included.

    Args:
        folder: whose file system's free space is reported.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._busy, self._total = _cpu_ticks()

    def sample(self) -> dict[str, float]:
        """CPU use in percent of all cores since the last sample, used memory in MiB, free disk space in GiB."""
        busy, total = _cpu_ticks()
        elapsed = total - self._total
        cpu = 100 * (busy - self._busy) / elapsed if elapsed else 0.0
        self._busy, self._total = busy, total
        return {
            "system/cpu_percent": round(cpu, 2),
            "system/memory_used_mib": round(_memory_used_kib() / 2**10, 1),
            "system/disk_free_gib": round(shutil.disk_usage(self._folder).free / 2**30, 3),
        }


def _cpu_ticks() -> tuple[int, int]:
    """Busy and all ticks of all cores since boot (proc(5): user nice system idle iowait irq softirq steal)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _memory_used_kib() -> int:
    pairs = (line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {name: int(rest.split()[0]) for name, rest in pairs}
    return sizes["MemTotal"] - sizes["MemAvailable"]
