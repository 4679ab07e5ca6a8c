"""Whether the promises hold on this machine's GPUs: `infra/gpu-check`, some minutes.

Small complete runs: one that is killed and resumed ends as one that was left alone, with replicas of the model, with
shares of it (DDP and FSDP), and as `auto` has it for a long run on a GPU, compiled and in bf16; what a codec's files
decode to is the same with and without a GPU; with two GPUs and more, virtual ranks give the same bits on one and on
all.
`--device cpu` goes the same way with gloo, to try this program where there is no GPU.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.chaos.results import result_of
from infra.chaos.small_runs import PROJECT, SmallRun, emptied, make_pictures
from pipelines.errors import CodecmillError

STEPS = 64
CODEC = {
    "model.entropy": "hyperprior",
    "model.latent_channels": 16,
    "model.downsamplings": 3,
    "training.precision": "bf16",
    "evaluation.curve_images": 1,
}
RESUMED = {
    "ddp": {"training.parallel": "ddp"},
    "fsdp": {"training.parallel": "fsdp"},
    "compiled": {**CODEC, "training.compile": "true"},
}
"""What differs between the runs that are killed, by the names of the checks."""


def main() -> int:
    try:
        return _checked()
    except KeyboardInterrupt:
        return 130


def _checked() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is checked [cuda]")
    where = "folder; works in gpu-check/ below it, emptied first [codecmill-data]"
    parser.add_argument("--root", type=Path, default=Path("codecmill-data"), help=where)
    parser.add_argument("--step", metavar="CONFIG", type=Path, help="instead: where a recipe's step spends its time")
    parser.add_argument("--batch", metavar="N", type=int, help="with --step: images a step [the recipe's]")
    arguments = parser.parse_args()
    ranks = _describe(arguments.device)
    if not ranks:
        print("gpu-check: torch sees no GPU here. Look at nvidia-smi and at the build of torch.", file=sys.stderr)
        return 2
    if arguments.step:
        return _profile(arguments.step, arguments.batch, arguments.device)
    folder = emptied(arguments.root, "gpu-check")
    make_pictures(folder / "pictures")
    on_device = {"training.device": arguments.device, "training.processes": ranks}
    checks = [_killed_and_resumed(folder, name, {**on_device, **choices}) for name, choices in RESUMED.items()]
    checks.append(_decoded_everywhere(folder, on_device))
    if ranks > 1:
        checks.append(_virtual_ranks(folder, on_device))
    return 0 if all(checks) else 1


def _profile(recipe: Path, batch: int | None, device: str) -> int:
    """Returns the exit code."""
    from flows.cli.config_file import effective_config
    from infra.gpu_check import step_profile

    try:
        step_profile.main(effective_config(recipe, {"training": {"batch_size": batch}} if batch else {}), device)
    except CodecmillError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _describe(device: str) -> int:
    """Print what is there; returns the number of ranks to try."""
    import torch
    import torch.cuda.nccl

    if device == "cpu":
        print(f"torch {torch.__version__}, gloo, 2 ranks on the CPU", flush=True)
        return 2
    if not torch.cuda.is_available():
        return 0
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}: {', '.join(names)}", flush=True)
    return len(names)


def _killed_and_resumed(folder: Path, check: str, choices: Mapping[str, Any]) -> bool:
    alone = SmallRun(folder, f"alone-{check}", STEPS, choices)
    alone.finish()
    killed = SmallRun(folder, f"killed-{check}", STEPS, choices)
    process = killed.start()
    while killed.last_step() < STEPS // 2 and process.poll() is None:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # it has ended before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    caught, orphans = killed.last_step(), killed.orphans()
    killed.finish()
    differing = killed.differences(result_of(alone.root, alone.name))
    if caught == STEPS:
        differing.append("nothing: it had ended before it was killed")
    if orphans:
        differing.append(f"{orphans} processes left")
    return _told(f"{check}, killed at step {caught} of {STEPS} and resumed, ends as if left alone", differing)


def _virtual_ranks(folder: Path, on_device: Mapping[str, Any]) -> bool:
    ranks = on_device["training.processes"]
    choices = {**on_device, "training.virtual_ranks": ranks, "training.batch_size": 4 * ranks}
    many = SmallRun(folder, "many-ranks", STEPS, choices)
    one = SmallRun(folder, "one-rank", STEPS, {**choices, "training.processes": 1})
    many.finish()
    one.finish()
    weights = {result_of(run.root, run.name)["model.safetensors"] for run in (many, one)}
    promise = f"{ranks} virtual ranks have the same weights on 1 rank and on {ranks}"
    return _told(promise, [] if len(weights) == 1 else ["weights"])


def _decoded_everywhere(folder: Path, on_device: Mapping[str, Any]) -> bool:
    run = SmallRun(folder, "codec", STEPS, {**on_device, **CODEC})
    run.finish()
    pictures = sorted((folder / "pictures").iterdir())[:3]
    _codecmill(run, "compress", *pictures, "-o", folder / "coded", "--model", run.name, "--quality", "60")
    decoded = []
    for place, hidden in (("with", {}), ("without", {"CUDA_VISIBLE_DEVICES": ""})):
        files = sorted((folder / "coded").iterdir())
        _codecmill(run, "decompress", *files, "-o", folder / place, environment=hidden)
        decoded.append([file.read_bytes() for file in sorted((folder / place).iterdir())])
    differing = [file.name for file, one, other in zip(pictures, *decoded, strict=True) if one != other]
    return _told("a codec's files decode to the same pixels with and without a GPU", differing)


def _codecmill(run: SmallRun, *words: str | Path, environment: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "flows", *map(str, words), "--root", str(run.root)]
    environment = os.environ | dict(environment or {})
    if subprocess.run(command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"codecmill {words[0]} failed; what it said is above.")


def _told(promise: str, differing: list[str]) -> bool:
    print(f"{promise}: " + (f"NO ({', '.join(differing)})" if differing else "yes"), flush=True)
    return not differing


if __name__ == "__main__":
    sys.exit(main())
