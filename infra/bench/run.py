"""`make bench`: codecmill beside webdataset's own writer and loader, and its step beside a plain one.

Each pair runs interleaved, ROUNDS times; what is printed and written to <root>/bench/latest.md are medians and their
ratio. Figures of one machine mean little elsewhere; the ratios travel better.
"""

import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import webdataset as wds
from PIL import Image

from flows.cli.demo import find_photographs
from pipelines.config import RunConfig
from pipelines.data.images import HALF
from pipelines.data.loading import training_batches
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.durable_files import write_json
from pipelines.model.autoencoder import Autoencoder
from pipelines.run_directory import Root
from pipelines.training import launch
from pipelines.training.journal import read
from pipelines.training.machine import multiplies_bf16, resolve
from pipelines.training.step import TrainingStep

ROUNDS = 3
LOADED = 640
STEPS = 30


def config_for(folder: Path, photographs: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bench",
            "root": str(folder),
            "data": {"images": str(photographs), "workers": 1},
            "training": {"batch_size": 32, "crop_size": 128},
        }
    )


def create_with_codecmill(photographs: Path) -> float:
    """Patches a second, hashing, statistics and index included, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        shard_set = create_shards(config_for(Path(folder), photographs))
        seconds = time.perf_counter() - started
        return sum(sum(shard_set.counts(split)) for split in ("train", "validation")) / seconds


def create_with_webdataset(photographs: Path) -> float:
    """The same cut by hand: Pillow's default PNG into webdataset's ShardWriter."""
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with wds.ShardWriter(f"{folder}/%06d.tar", verbose=0) as writer:  # pyright: ignore[reportCallIssue]
            for path in photographs.read_text().splitlines():
                image = Image.open(path).convert("RGB")
                for top in range(0, image.height - 255, 256):
                    for left in range(0, image.width - 255, 256):
                        stream = io.BytesIO()
                        image.crop((left, top, left + 256, top + 256)).save(stream, "PNG")
                        writer.write({"__key__": f"{count:08d}", "png": stream.getvalue()})
                        count += 1
        return count / (time.perf_counter() - started)


def load_with_codecmill(shard_set: ShardSet, config: RunConfig) -> float:
    """CPU seconds a patch: random 128 crop, flip, float32 normalised, batches of 32."""
    started = time.process_time()
    with training_batches(shard_set, config, 1, 0, 1) as batches:
        for _ in range(LOADED // 32):
            HALF.normalize(next(batches).images.float() / 255)
    return (time.process_time() - started) / LOADED


def load_with_webdataset(shard_set: ShardSet) -> float:
    """The same by webdataset's pipeline with torchvision's transforms."""
    from torchvision import transforms

    steps = [transforms.RandomCrop(128), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    prepare = transforms.Compose([*steps, transforms.Normalize(HALF.mean, HALF.std)])
    tars = [str(shard_set.path / row.tar) for row in shard_set.rows("train")]
    data = wds.WebDataset(tars, shardshuffle=False, empty_check=False).repeat().shuffle(100).decode("pil")  # pyright: ignore
    batches = iter(data.to_tuple("png").map_tuple(prepare).batched(32))
    started = time.process_time()
    for _ in range(LOADED // 32):
        next(batches)
    return (time.process_time() - started) / LOADED


def step_seconds(config: RunConfig, precision: str, channels_last: bool, compiled: bool) -> float:
    """Seconds of a forward and backward pass and Adam's step, once warm."""
    training = config.training.model_copy(update={"precision": precision, "channels_last": channels_last})
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = Autoencoder(config.model).to(memory_format=layout)
    module = TrainingStep(model, HALF, config.loss, training, "cpu")
    if compiled:
        module.compile(dynamic=False)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images = torch.randint(0, 256, (32, 3, 128, 128), dtype=torch.uint8)
    started = 0.0
    for number in range(STEPS + 5):
        if number == 5:
            started = time.perf_counter()
        module(images, None, None).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - started) / STEPS


def trained_seconds(shard_set: ShardSet, processes: int, virtual_ranks: int | None) -> float:
    """Seconds a step of a real training, torchrun and all: the median over its journal, without the first steps."""
    with tempfile.TemporaryDirectory() as folder:
        run = Root(Path(folder)).run("bench")
        values = config_for(Path(folder), Path("-")).model_dump(mode="json")
        values["training"] |= {"steps": 40, "processes": processes, "virtual_ranks": virtual_ranks, "threads": 1}
        run.write_config(resolve(RunConfig.model_validate(values)))
        write_json(run.shard_set_file, {"fingerprint": shard_set.fingerprint, "path": str(shard_set.path)})
        with run.locked() as lock:
            launch.train(run, lock, on_line=lambda line: None)
        rates = [line["train/images_per_second"] for line in read(run.journal)][10:]
        return values["training"]["batch_size"] / statistics.median(rates)


def interleaved(ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    pairs = [(ours(), theirs()) for _ in range(ROUNDS)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def main(root: Path) -> None:
    folder = root / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    photographs = folder / "photos.txt"
    photographs.write_text("".join(f"{path}\n" for path in find_photographs()))
    config = config_for(folder, photographs)
    shard_set = create_shards(config)
    fast = "bf16" if multiplies_bf16("cpu") else "float32"
    rows: list[tuple[str, str, float, float, float]] = []

    def measure(
        name: str, unit: str, ours: Callable[[], float], theirs: Callable[[], float], more_is_better: bool
    ) -> None:
        a, b = interleaved(ours, theirs)
        rows.append((name, unit, a, b, a / b if more_is_better else b / a))
        print(f"{name}: {a:.4g} against {b:.4g} {unit}, {rows[-1][4]:.2f} times as fast", flush=True)

    measure(
        "shard creation over webdataset's ShardWriter, one process",
        "patches/s",
        lambda: create_with_codecmill(photographs),
        lambda: create_with_webdataset(photographs),
        more_is_better=True,
    )
    measure(
        "loading over webdataset's pipeline",
        "CPU s/patch",
        lambda: load_with_codecmill(shard_set, config),
        lambda: load_with_webdataset(shard_set),
        more_is_better=False,
    )
    measure(
        f"the default step ({fast}, channels_last) over a plain float32 one",
        "s/step",
        lambda: step_seconds(config, fast, channels_last=True, compiled=False),
        lambda: step_seconds(config, "float32", channels_last=False, compiled=False),
        more_is_better=False,
    )
    measure(
        f"the compiled {fast} step over the eager one",
        "s/step",
        lambda: step_seconds(config, fast, channels_last=True, compiled=True),
        lambda: step_seconds(config, fast, channels_last=True, compiled=False),
        more_is_better=False,
    )
    for processes in (1, 2):
        measure(
            f"a step in two virtual ranks over plain data parallelism, {processes} process(es)",
            "s/step",
            partial(trained_seconds, shard_set, processes, 2),
            partial(trained_seconds, shard_set, processes, None),
            more_is_better=False,
        )
    lines = ["| what | unit | codecmill | other | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {unit} | {a:.4g} | {b:.4g} | {ratio:.2f} |" for name, unit, a, b, ratio in rows]
    (folder / "latest.md").write_text("\n".join(lines) + "\n")
    (folder / "latest.json").write_text(json.dumps({name: ratio for name, *_, ratio in rows}, indent=2) + "\n")
    print(f"Written to {folder / 'latest.md'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "codecmill-data"))
