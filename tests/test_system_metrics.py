"""The machine's figures, against what it says of itself elsewhere."""

import os
import time
from pathlib import Path

from pipelines.system_metrics import SystemMetrics


def test_a_busy_core_shows_and_the_sizes_are_the_machines(tmp_path: Path) -> None:
    metrics = SystemMetrics(tmp_path)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    sample = metrics.sample()
    cores = os.cpu_count() or 1
    assert 50 / cores < sample["system/cpu_percent"] <= 100
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 0 < sample["system/memory_used_mib"] < physical
    disk = os.statvfs(tmp_path)
    assert abs(sample["system/disk_free_gib"] - disk.f_bavail * disk.f_frsize / 2**30) < 0.5
    assert all(name.startswith("system/") for name in sample)


def test_two_samples_at_once_are_no_division_by_zero(tmp_path: Path) -> None:
    metrics = SystemMetrics(tmp_path)
    assert [0 <= metrics.sample()["system/cpu_percent"] <= 100 for _ in range(50)] == [True] * 50
