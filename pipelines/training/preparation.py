"""What one rank needs to train: built, warmed up, and brought to the latest checkpoint or to the start."""

import logging
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from pipelines import checkpoint_format, checkpoints, versions
from pipelines.config import RunConfig, TrainingConfig
from pipelines.data.block_statistics import block_transform
from pipelines.data.images import Normalization
from pipelines.data.loading import blank_batch
from pipelines.data.shard_format import MANIFEST
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import write_json
from pipelines.file_digests import file_sha256
from pipelines.model.build import Model, build_model
from pipelines.model.codec import TransformCodec
from pipelines.model.codec_start import Coefficients, start_from
from pipelines.run_directory import RunDirectory
from pipelines.training import gradients, optimization, state
from pipelines.training.agreement import agreed_checkpoint
from pipelines.training.distributed import Ranks
from pipelines.training.heartbeat import Beat, silent
from pipelines.training.loop import Training
from pipelines.training.step import TrainingStep
from pipelines.weights import LoadReport, apply_weights, read_weights

log = logging.getLogger("codecmill.training")


def prepare(
    directory: RunDirectory, config: RunConfig, shard_set: ShardSet, ranks: Ranks, beat: Beat = silent
) -> Training:
    """Build the model and its replicas on this rank and bring them to the latest checkpoint, or to the start."""
    training = config.training
    checkpoint = agreed_checkpoint(directory, ranks)
    normalization = (
        checkpoint.manifest.normalization
        if checkpoint
        else Normalization.resolve(config.data.normalization, shard_set.measured)
    )
    model = _built(config, normalization, shard_set, ranks, beat, is_fresh=checkpoint is None)
    is_child = checkpoint is None and bool(training.start_from)
    parent = _start_from(directory, training, model, ranks) if is_child else None
    if training.parallel == "ddp":
        model.to(ranks.device)  # else it is more than a GPU holds: its parts go there one after the other, as shares
    module = TrainingStep(model, normalization, config.loss, training, ranks.device.type)
    if training.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph: splitting it by buckets costs fusion
        module.compile(dynamic=False)
    computing = gradients.build(module, ranks, training)  # may put shares in the weights' place: first
    optimizer = optimization.build(model, training)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=training.precision == "fp16")
    prepared = Training(
        directory=directory,
        config=config,
        shard_set=shard_set,
        ranks=ranks,
        normalization=normalization,
        origin=_origin(_as_trained(config, ranks), shard_set, checkpoint) if ranks.is_first else {},
        module=module,
        beat=beat,
        gradients=computing,
        optimizer=optimizer,
        scaler=scaler,
        state=state.build(module, optimizer, scaler, ranks, training),
        parent=parent,
    )
    prepared.warm_up_seconds = _warm_up(prepared)
    if checkpoint:
        prepared.restore(checkpoint)
    return prepared


def _built(
    config: RunConfig, normalization: Normalization, shard_set: ShardSet, ranks: Ranks, beat: Beat, is_fresh: bool
) -> Model:
    """The model with its first weights, on the CPU: where it is not fresh, a checkpoint's take their place."""
    training = config.training
    dtype = torch.float64 if training.precision == "float64" else torch.float32
    # fully_shard takes contiguous weights alone; images may still be channels_last.
    is_last = training.channels_last and training.parallel == "ddp"
    layout = torch.channels_last if is_last else torch.contiguous_format
    model = build_model(config.model, config.seed).to(dtype).to(memory_format=layout)
    if is_fresh and isinstance(model, TransformCodec):
        _start_from_transform(model, normalization, shard_set, config.seed, ranks, beat)
    return model


def _as_trained(config: RunConfig, ranks: Ranks) -> RunConfig:
    """The config with the ranks that there are: their number may shape the bits, the hosts that they are on do not.

    Hosts come and go, so that a run's own config only says how many there may be.
    """
    as_trained = {"processes": ranks.world_size, "nodes": 1}
    return config.model_copy(update={"training": config.training.model_copy(update=as_trained)})


def _origin(config: RunConfig, shard_set: ShardSet, checkpoint: checkpoints.Checkpoint | None) -> dict[str, Any]:
    """What every checkpoint says of where it comes from: choices, data and code, as they are when the training starts.

    The shard set's manifest names the digests of all of its files, so that its own closes the chain to the last sample.
    """
    commit, packages = versions.git_commit(), versions.package_versions(str(config.training.device))
    _warn_of_other_processor(checkpoint, packages[versions.PROCESSOR])
    return {
        "config": config.model_dump(mode="json"),
        "shard_manifest_sha256": file_sha256(shard_set.path / MANIFEST),
        "git_commit": commit,
        "versions": packages,
        "legs": _legs(checkpoint, _leg(config, 0, commit, packages)) if checkpoint else (),
    }


def _warn_of_other_processor(checkpoint: checkpoints.Checkpoint | None, now: str) -> None:
    before = checkpoint.manifest.versions.get(versions.PROCESSOR, now) if checkpoint and checkpoint.step else now
    if before != now:
        log.warning(
            "The steps before were trained on another kind of processor (%s, now %s), which may round otherwise: from "
            "here on the weights may not be those of one that did all. Every checkpoint says so (codecmill explain)",
            before,
            now,
        )


def _legs(checkpoint: checkpoints.Checkpoint, now: checkpoint_format.Leg) -> tuple[checkpoint_format.Leg, ...]:
    """What a checkpoint's steps were trained under, as far as `now` is not the same."""
    manifest, config = checkpoint.manifest, checkpoint.manifest.run_config()
    if config is None or not checkpoint.step:
        return manifest.legs
    before = _leg(config, checkpoint.step, manifest.git_commit, manifest.versions)
    is_same = before == now.model_copy(update={"until": checkpoint.step})
    return manifest.legs if is_same else (*manifest.legs, before)


def _leg(config: RunConfig, until: int, commit: str | None, packages: dict[str, str]) -> checkpoint_format.Leg:
    return checkpoint_format.Leg(
        until=until,
        training=checkpoint_format.choices_of(config.training),
        git_commit=commit,
        versions=packages,
    )


def _warm_up(prepared: Training) -> float:
    """One forward and backward pass on blank images, of which nothing is kept; returns the seconds that it took.

    DDP lays out its gradient buckets anew after the first backward pass it sees, and with three and more ranks another
    layout sums in another order. Passing that point here, a fresh and a resumed process take every real step alike.
    It is also where a compiled step is compiled.
    """
    started = time.perf_counter()
    ranks = prepared.ranks
    prepared.compute(blank_batch(prepared.config, ranks.world_size, ranks.rank, prepared.noise_shape))
    prepared.module.zero_grad(set_to_none=True)
    if prepared.ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _start_from_transform(
    model: TransformCodec, normalization: Normalization, shard_set: ShardSet, seed: int, ranks: Ranks, beat: Beat
) -> None:
    """Give a codec the transform that fits its photographs best, which the first rank finds: the same bits on all."""
    length = 3 * model.stride**2
    count = min(model.config.latent_channels, length)
    if ranks.is_first:
        transform = block_transform(shard_set, model.stride, count, lambda: beat(0, "warming up"))
    else:
        transform = torch.empty(count, length), torch.empty(count)
    for tensor in transform:
        sending: Any = dist.broadcast(on_device := tensor.to(ranks.device), src=0, async_op=True)
        while not sending.is_completed():  # the first rank fetches shards, on another host perhaps
            beat(0, "warming up")
            time.sleep(0.05)
        sending.wait()
        tensor.copy_(on_device)
    start_from(model, Coefficients(*transform), normalization, seed)


def _start_from(directory: RunDirectory, training: TrainingConfig, model: Model, ranks: Ranks) -> str:
    """Begin with the weights that `launch` has fetched into the run directory; returns their sha256.

    What was taken is reported.
    """
    file = directory.start_weights / checkpoint_format.WEIGHTS
    source = str(training.start_from)
    report: LoadReport = apply_weights(model, read_weights(file), training.strict, source)
    if ranks.is_first:
        write_json(directory.load_report, asdict(report))
        print(f"Starting from {source}: {report.summary(source)}", flush=True)
    return file_sha256(file)
