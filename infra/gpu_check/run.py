"""Whether the promises hold on this machine's GPUs: `infra/gpu-check`, some minutes.

A step of each quantiser, distortion and entropy model has deterministic kernels. Then small complete runs: one that is
killed and resumed ends as one that was left alone, with replicas of the model, with shares of it (DDP and FSDP), and as
`auto` has it for a long run on a GPU, compiled and in bf16; what a codec's files decode to is the same on a GPU and
without one, whichever wrote them; with two GPUs and more, virtual ranks give the same bits on one and on all.
`--device cpu` goes the same way with gloo, to try this program where there is no GPU.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from infra.chaos.results import result_of
from infra.chaos.small_runs import SmallRun, emptied, make_pictures
from pipelines import checkpoints
from pipelines.config import LossConfig, ModelConfig, RunConfig
from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory

if TYPE_CHECKING:
    from pipelines.model.codec import TransformCodec

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

STEPPED: tuple[dict[str, dict[str, Any]], ...] = (
    *({"model": {"quantizer": name}} for name in get_args(ModelConfig.model_fields["quantizer"].annotation)),
    *({"loss": {"distortion": name}} for name in get_args(LossConfig.model_fields["distortion"].annotation)),
    {"model": {"entropy": "factorized"}},
    *({"model": {"entropy": "hyperprior", "context": name}} for name in ("checkerboard", "nested")),
)
"""What a step is tried with."""


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
    on_device = {
        "training.device": arguments.device,
        "training.processes": ranks,
        "training.batch_size": max(8, ranks),
    }
    checks = [_steps_are_deterministic(arguments.device)]
    checks += [_killed_and_resumed(folder, name, {**on_device, **choices}) for name, choices in RESUMED.items()]
    checks.append(_decoded_everywhere(folder, arguments.device, on_device))
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


def _steps_are_deterministic(device: str) -> bool:
    """torch refuses an operation that has no deterministic kernel when it comes to it."""
    from infra.bench.programs.step import default_step
    from pipelines.training.machine import compute_exactly, resolve

    compute_exactly()
    failing = []
    for choices in STEPPED:
        crop = 192 if choices.get("loss") == {"distortion": "ms_ssim"} else 64  # as large as need be
        training = {"device": device, "processes": 1, "batch_size": 2, "crop_size": crop, "compile": False}
        config = resolve(RunConfig.model_validate({"name": "step", **choices, "training": training}))
        try:
            default_step(config, device)()
        except RuntimeError as error:
            failing.append(f"{choices}: {str(error).partition('. ')[0]}")
    return _told(f"a step of each of {len(STEPPED)} models and losses has deterministic kernels", failing)


def _killed_and_resumed(folder: Path, check: str, choices: Mapping[str, Any]) -> bool:
    alone = SmallRun(folder, f"alone-{check}", STEPS, choices)
    alone.finish()
    killed = SmallRun(folder, f"killed-{check}", STEPS, choices)
    with killed.under_way() as process:
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


def _decoded_everywhere(folder: Path, device: str, on_device: Mapping[str, Any]) -> bool:
    """Files that the processor wrote, and those that the device wrote, each read by both."""
    from pipelines.codec.container import parse
    from pipelines.codec.opening import codec_of
    from pipelines.data.images import open_image
    from pipelines.evaluation.stage import load

    run = SmallRun(folder, "codec", STEPS, {**on_device, **CODEC})
    run.finish()
    checkpoint = checkpoints.of_step(RunDirectory(run.folder), STEPS)
    here = codec_of(checkpoint)
    model, normalization = load(checkpoint)  # on the device, as in an evaluation
    there = replace(here, model=cast("TransformCodec", model), normalization=normalization)
    differing = []
    for file in sorted((folder / "pictures").iterdir())[:3]:
        image = open_image(file, background=(255, 255, 255))
        for writer, codec in (("processor", here), (device, there)):
            coded = parse(codec.encode(image, here.step_of(60)), file.name)
            if here.decode(coded).tobytes() != there.decode(coded).tobytes():
                differing.append(f"{file.name}, written by the {writer}")
    return _told("a codec's files decode to the same pixels with and without a GPU", differing)


def _told(promise: str, differing: list[str]) -> bool:
    print(f"{promise}: " + (f"NO ({', '.join(differing)})" if differing else "yes"), flush=True)
    return not differing


if __name__ == "__main__":
    sys.exit(main())
