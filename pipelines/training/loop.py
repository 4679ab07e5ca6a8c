"""The training loop of one rank: from the latest checkpoint to the last step, or to the step at which it is stopped."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from pipelines import checkpoints, versions
from pipelines.config import RunConfig
from pipelines.data.images import Normalization
from pipelines.data.loading import Batch, training_batches
from pipelines.data.order import SampleOrder
from pipelines.data.randomness import random_generator
from pipelines.data.shard_set import ShardSet
from pipelines.errors import CodecmillError
from pipelines.model.autoencoder import Autoencoder
from pipelines.model.losses import psnr
from pipelines.run_directory import RunDirectory, write_json
from pipelines.system_metrics import SystemMetrics
from pipelines.tracking.marks import unsent_checkpoints
from pipelines.training import optimization
from pipelines.training.distributed import Ranks, check_replicas
from pipelines.training.journal import Journal
from pipelines.training.step import StepOutput, TrainingStep
from pipelines.training.validation import Validation, validate
from pipelines.weights import LoadReport, apply_weights, read_weights, restore_weights

SYSTEM_SECONDS = 5.0


@dataclass
class Training:
    """What one rank holds while it trains; built by `prepare`, driven by `run`."""

    directory: RunDirectory
    config: RunConfig
    shard_set: ShardSet
    ranks: Ranks
    normalization: Normalization
    module: TrainingStep
    replicas: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict[str, float] | None = None
    parent: str | None = None
    durations: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._system = SystemMetrics(self.directory.path)
        self._next_sample = 0.0

    @property
    def model(self) -> Autoencoder:
        return self.module.model

    def run(self, stop_requested: Callable[[], bool], journal: Journal | None) -> None:
        """Train to the last step, or until any rank is asked to stop; either way the state is saved.

        The first rank, and no other, has the journal.
        """
        training = self.config.training
        with training_batches(
            self.shard_set, self.config, self.step + 1, self.ranks.rank, self.ranks.world_size
        ) as batches:
            while self.step < training.steps:
                started = time.perf_counter()
                batch = next(batches)
                figures, stopping = self._train_step(batch, stop_requested())
                self.step += 1
                ending = self.step == training.steps or stopping
                saving = self.step % training.checkpoint_interval == 0 or ending
                if self.step % training.replica_check_interval == 0 or saving:
                    check_replicas(self.module.state_dict(), self.step)
                seconds = time.perf_counter() - started
                figures |= {"train/images_per_second": training.batch_size / seconds}
                figures["train/data_wait_fraction"] = batch.wait / seconds
                validation = self._validate_if_due()
                if journal:
                    figures |= validation.figures() if validation else {}
                    journal.append(self.step, figures | self._system_figures())
                if saving:
                    self._save(validation, journal)
                if stopping:
                    return

    def _system_figures(self) -> dict[str, float]:
        """How busy the machine is, every few seconds."""
        if time.monotonic() < self._next_sample:
            return {}
        self._next_sample = time.monotonic() + SYSTEM_SECONDS
        return self._system.sample()

    def _train_step(self, batch: Batch, stop: bool) -> tuple[dict[str, float], bool]:
        """One optimiser step; returns its figures, the same on every rank, and whether any rank wants to stop."""
        training, world_size = self.config.training, self.ranks.world_size
        rate = optimization.learning_rate(training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        output = self._forward(batch)
        # DDP averages over the ranks, so a rank's sum times the world size over the batch gives the batch's mean.
        self.scaler.scale(output.loss.sum() * (world_size / training.batch_size)).backward()
        loss, decibels, stops = self.ranks.sum(
            [output.loss.detach().double().sum().item(), psnr(output.mse.double()).sum().item(), float(stop)]
        )
        if not math.isfinite(loss):
            self._stop_at_nonfinite(batch, output)
        self.scaler.unscale_(self.optimizer)
        limit = training.gradient_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        figures = {
            "train/loss": loss / training.batch_size,
            "train/psnr": decibels / training.batch_size,
            "train/learning_rate": rate,
        }
        # fp16's scaler meets infinite gradients by design and skips their step; they are no figure to log.
        return figures | ({"train/gradient_norm": norm} if math.isfinite(norm) else {}), stops > 0

    def _forward(self, batch: Batch) -> StepOutput:
        device = self.ranks.device
        masks = None if batch.masks is None else batch.masks.to(device, non_blocking=True)
        noise = self._noise(batch)
        return self.replicas(batch.images.to(device, non_blocking=True), masks, noise)

    def _noise(self, batch: Batch) -> Tensor | None:
        """The quantiser's uniform noise on [-0.5, 0.5), keyed by seed, step and sample: the same on any rank."""
        side = self.config.training.crop_size
        shape = self.model.noise_shape(1, side, side)
        if shape is None:
            return None
        drawn = [
            torch.from_numpy(
                random_generator(self.config.seed, self.step + 1, position, "noise").random(shape, "float32")
            )
            for position in batch.positions
        ]
        return (torch.cat(drawn) - 0.5).to(self.ranks.device)

    def _stop_at_nonfinite(self, batch: Batch, output: StepOutput) -> None:
        """End the training at a loss that is no number, before it reaches the weights; names the samples."""
        size = self.config.training.batch_size
        first = self.step * size
        flags = [0.0] * size
        for position, loss in zip(batch.positions, output.loss.tolist(), strict=True):
            flags[position - first] = float(not math.isfinite(loss))
        order = SampleOrder(self.shard_set.counts("train"), self.config.seed, self.config.data.shuffle_window)
        guilty = [order.locate(first + index) for index, flag in enumerate(self.ranks.sum(flags)) if flag]
        keys = [self.shard_set.read("train", place.shard, place.index).key for place in guilty]
        raise CodecmillError(
            f"The loss of step {self.step + 1} is not finite, for the samples {', '.join(keys)}. The weights were left "
            "as they were before it. Lower training.learning_rate, or use a wider training.precision, in a new run."
        )

    def _validate_if_due(self) -> Validation | None:
        training = self.config.training
        if self.step % training.validation_interval and self.step != training.steps:
            return None
        return validate(self.module, self.shard_set, self.config, self.ranks, self.directory, self.step)

    def _save(self, validation: Validation | None, journal: Journal | None) -> None:
        if validation and (self.best is None or validation.psnr > self.best["psnr"]):
            self.best = {"step": self.step, "psnr": validation.psnr}
        if journal is None:
            return
        journal.sync()
        about = {
            "step": self.step,
            "position": self.step * self.config.training.batch_size,
            "model": self.config.model,
            "normalization": self.normalization,
            "shard_set": self.shard_set.fingerprint,
            "parent": self.parent,
            "validation": validation.figures() if validation else {},
            "best": self.best,
            "versions": versions.package_versions(),
        }
        tensors, scalars = optimization.state(self.model, self.optimizer, self.scaler)
        saved = checkpoints.save(self.directory, about, self.model.state_dict(), tensors, scalars)
        checkpoints.retain(
            self.directory, saved, self.config.training.keep_latest, spared=unsent_checkpoints(self.directory)
        )


def prepare(directory: RunDirectory, config: RunConfig, shard_set: ShardSet, ranks: Ranks) -> Training:
    """Build the model and its replicas on this rank and bring them to the latest checkpoint, or to the start."""
    training = config.training
    checkpoint = checkpoints.latest(directory)
    normalization = (
        checkpoint.manifest.normalization
        if checkpoint
        else Normalization.resolve(config.data.normalization, shard_set.measured)
    )
    dtype = torch.float64 if training.precision == "float64" else torch.float32
    layout = torch.channels_last if training.channels_last else torch.contiguous_format
    model = Autoencoder(config.model, seed=config.seed).to(ranks.device, dtype).to(memory_format=layout)
    module = TrainingStep(model, normalization, config.loss, training, ranks.device.type)
    if training.compile:
        torch._dynamo.config.optimize_ddp = False  # one graph: splitting it by buckets costs fusion
        module.compile(dynamic=False)
    replicas = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, forward_sync_buffers=False)
    state = Training(
        directory=directory,
        config=config,
        shard_set=shard_set,
        ranks=ranks,
        normalization=normalization,
        module=module,
        replicas=replicas,
        optimizer=optimization.build(model, training),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=training.precision == "fp16"),
    )
    _warm_up(state)
    if checkpoint:
        _restore(state, checkpoint)
    elif training.start_from:
        _start_from(state)
    return state


def _warm_up(state: Training) -> None:
    """One forward and backward pass on blank images, of which nothing is kept.

    DDP lays out its gradient buckets anew after the first backward pass it sees, and with three and more ranks another
    layout sums in another order. Passing that point here, a fresh and a resumed process take every real step alike.
    It is also where a compiled step is compiled.
    """
    started = time.perf_counter()
    training, device = state.config.training, state.ranks.device
    positions = [i for i in range(training.batch_size) if i % state.ranks.world_size == state.ranks.rank]
    side = training.crop_size
    blank = torch.zeros(len(positions), 3, side, side, dtype=torch.uint8)
    masks = blank[:, :1].contiguous() if state.config.data.masks is not None else None
    batch = Batch(images=blank, masks=masks, keys=[""] * len(positions), positions=positions, step=0, wait=0.0)
    state._forward(batch).loss.sum().backward()
    state.optimizer.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    state.durations["warm_up"] = time.perf_counter() - started


def _restore(state: Training, checkpoint: checkpoints.Checkpoint) -> None:
    if checkpoint.manifest.shard_set != state.shard_set.fingerprint:
        raise CodecmillError(
            f"{checkpoint.path} was trained on shard set {checkpoint.manifest.shard_set[:16]}, but the run is to go on "
            f"with {state.shard_set.fingerprint[:16]}. Start a new run, with --training.start_from {checkpoint.path}"
        )
    restore_weights(state.model, checkpoint)
    optimization.restore(checkpoint.path, state.model, state.optimizer, state.scaler)
    state.step = checkpoint.step
    state.best = checkpoint.manifest.best
    state.parent = checkpoint.manifest.parent


def _start_from(state: Training) -> None:
    """Begin with the weights that `launch` has fetched into the run directory; report what was taken."""
    folder = state.directory.start_weights
    weights = read_weights(folder / checkpoints.WEIGHTS)
    source = str(state.config.training.start_from)
    report: LoadReport = apply_weights(state.model, weights, state.config.training.strict, source)
    state.parent = checkpoints.sha256_of(folder / checkpoints.WEIGHTS)
    if state.ranks.is_first:
        write_json(state.directory.load_report, asdict(report))
        print(f"Starting from {source}: {report.summary(source)}", flush=True)
