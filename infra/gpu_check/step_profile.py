"""Where a training step's time goes on this machine: `infra/gpu-check --step infra/configs/gpu.yaml --batch 16`.

The step of a recipe on one rank with a batch in memory, in float32 and as the recipe has it, eager and compiled: its
time by the clock, the time that the device was busy, and what kept it busy. A device that is idle for most of a step
waits for the processor to tell it what to do.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.autograd.profiler_util import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from infra.bench.programs.step import default_step
from pipelines.config import RunConfig
from pipelines.training.machine import compute_exactly

WARM_UP, TIMED, PROFILED = 5, 20, 3
"""Steps."""

LISTED = 12
"""Operations that take longest."""


def main(config: RunConfig, device: str) -> None:
    """Print it for each way to compute the step."""
    compute_exactly()
    for precision, compiled in (("float32", False), ("bf16", False), ("bf16", True)):
        update = {"precision": precision, "compile": compiled}
        chosen = config.model_copy(update={"training": config.training.model_copy(update=update)})
        _show(f"{precision}, {'compiled' if compiled else 'eager'}", chosen, torch.device(device))


def _show(name: str, config: RunConfig, device: torch.device) -> None:
    step = default_step(config, device.type)
    for _ in range(WARM_UP):
        step()
    seconds = statistics.median(_timed(step, device) for _ in range(TIMED))
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    ) as seen:
        for _ in range(PROFILED):
            step()
        _wait(device)
    events = seen.key_averages()
    # A kernel's time is in the event of the operation that began it, too, and in annotations that span several.
    kernels = [each for each in events if each.device_type != DeviceType.CPU and not each.is_user_annotation]
    busy = sum(each.self_device_time_total for each in kernels) / PROFILED / 1e3
    images = config.training.batch_size / seconds
    told = f"; the device is busy for {busy:.1f} ms" if device.type == "cuda" else ""
    print(f"{name}: {seconds * 1e3:.1f} ms a step, {images:.0f} images/s{told}")
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(events.table(sort_by=key, row_limit=LISTED, max_name_column_width=60), flush=True)


def _timed(step: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
