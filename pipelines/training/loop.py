"""The training loop of one rank: from the latest checkpoint to the last step, or to the step at which it is stopped."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipelines import checkpoint_format, checkpoints
from pipelines.config import RunConfig
from pipelines.data.batch_making import Batch
from pipelines.data.images import Normalization
from pipelines.data.loading import training_batches
from pipelines.data.shard_set import ShardSet
from pipelines.errors import CodecmillError
from pipelines.model.build import Model
from pipelines.run_directory import RunDirectory
from pipelines.system_metrics import SystemMetrics
from pipelines.tracking.marks import unsent_checkpoints
from pipelines.training import optimization, schedules
from pipelines.training.agreement import Agreement, Stop, agree, agreed_checkpoint
from pipelines.training.bad_steps import BadSteps
from pipelines.training.codebooks import absorb
from pipelines.training.distributed import Ranks, check_replicas
from pipelines.training.gradients import Gradients
from pipelines.training.heartbeat import Beat, silent
from pipelines.training.journal import Journal
from pipelines.training.state import Saving, State
from pipelines.training.step import StepOutput, TrainingStep
from pipelines.training.validation import Validation, draw_beginning, validate

log = logging.getLogger("codecmill.training")

SYSTEM_SECONDS = 5.0


@dataclass
class Training:
    """What one rank holds while it trains; built by `prepare`, driven by `run`."""

    directory: RunDirectory
    config: RunConfig
    shard_set: ShardSet
    ranks: Ranks
    normalization: Normalization
    origin: dict[str, Any]
    module: TrainingStep
    gradients: Gradients
    state: State
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: checkpoint_format.Best | None = None
    parent: str | None = None
    beat: Beat = silent
    check_writer: Callable[[], None] = lambda: None
    warm_up_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._system = SystemMetrics(self.directory.path)
        self._next_sample = 0.0
        self._bad = BadSteps(self.config, self.shard_set, talks=self.ranks.is_first)

    @property
    def model(self) -> Model:
        return self.module.model

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Take over everything that a checkpoint of this run holds.

        Raises:
            CodecmillError: it was trained on another shard set, or is of another model.
        """
        if checkpoint.manifest.shard_set != self.shard_set.fingerprint:
            raise CodecmillError(
                f"{checkpoint.path} was trained on shard set {checkpoint.manifest.shard_set[:16]}, but the run is to "
                f"go on with {self.shard_set.fingerprint[:16]}. Start a new run, with --training.start_from "
                f"{checkpoint.path}"
            )
        self.state.restore(checkpoint)
        self._bad.in_a_row = checkpoints.read_training_state(checkpoint).bad_in_a_row
        self.step = checkpoint.step
        self.best = checkpoint.manifest.best
        self.parent = checkpoint.manifest.parent

    def run(self, stop_requested: Callable[[], Stop], journal: Journal | None, until: int | None = None) -> Stop:
        """Train to the last step, or until any rank is asked to stop; either way the state is saved.

        Returns what it was asked for, the same on every rank.

        Args:
            journal: the first rank, and no other, has it.
            until: a step at which to stop before the last one.
        """
        training = self.config.training
        if self.step == 0:
            draw_beginning(self.module, self.shard_set, self.config, self.ranks, self.directory)
        if training.on_nonfinite == "rollback" and self.step == 0:
            self._save(None, journal)  # something to go back to
        ranks = self.ranks
        with training_batches(
            self.shard_set, self.config, self.step + 1, ranks.rank, ranks.world_size, self.noise_shape
        ) as batches:
            while self.step < training.steps:
                self.beat(self.step, "a step")
                started = time.perf_counter()
                batch = next(batches)
                figures, stopping = self._train_step(batch, max(stop_requested(), self._stop_at(until)))
                self.step += 1
                ending = self.step == training.steps or bool(stopping)
                saving = self.step % training.checkpoint_interval == 0 or ending
                if self.step % training.replica_check_interval == 0 or saving:
                    check_replicas(self.state.replicas(), self.step)
                seconds = time.perf_counter() - started
                figures |= {"train/images_per_second": training.batch_size / seconds}
                figures["train/data_wait_fraction"] = batch.wait / seconds
                if batch.decoding:
                    figures["train/decoding_fraction"] = batch.decoding / seconds
                validation = self._validate_if_due()
                if journal:
                    figures |= validation.figures() if validation else {}
                    journal.append(self.step, figures | self._system_figures())
                if saving:
                    self._save(validation, journal)
                if stopping:
                    return stopping
        return Stop.NO

    def _stop_at(self, until: int | None) -> Stop:
        return Stop.THE_RUN if self.step + 1 == until else Stop.NO

    def _system_figures(self) -> dict[str, float]:
        """How busy the machine is, every few seconds."""
        if time.monotonic() < self._next_sample:
            return {}
        self._next_sample = time.monotonic() + SYSTEM_SECONDS
        return self._system.sample()

    def _train_step(self, batch: Batch, stop: Stop) -> tuple[dict[str, Any], Stop]:
        """One optimiser step; returns its line in the journal, alike on every rank, and whether any wants to stop."""
        training = self.config.training
        rate = optimization.learning_rate(training, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        schedules.set_quantizer(self.model, self.config, self.step)
        output = self.compute(batch)
        agreed = agree(self.ranks, batch, output, training.batch_size, stop)
        self.scaler.unscale_(self.optimizer)
        if schedules.encoder_stays(self.config, self.step):
            schedules.keep_encoder(self.model)
        norm = self.state.clip(training.gradient_clip)
        scaled = self.scaler.is_enabled()
        self._bad.note_norm(norm, scaled, self.step + 1)
        is_bad = bool(agreed.nonfinite) or not (math.isfinite(norm) or scaled)
        if is_bad and training.on_nonfinite == "stop":
            raise self._bad.stop(agreed, self.step + 1)
        if not is_bad:
            absorb(self.model, self.scaler.get_scale())
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.module.zero_grad(set_to_none=True)
        line: dict[str, Any] = {"samples": agreed.samples, "train/learning_rate": rate}
        if is_bad:
            return line | self._pass_over(agreed), agreed.stop
        self._bad.in_a_row = 0
        line |= agreed.figures(self.model.parts)
        return line | ({"train/gradient_norm": norm} if math.isfinite(norm) else {}), agreed.stop

    @property
    def noise_shape(self) -> tuple[int, ...] | None:
        """Of the noise that the model takes for a sample in training; None where it takes none."""
        side = self.config.training.crop_size
        shape = self.model.noise_shape(1, side, side)
        return shape and shape[1:]

    def compute(self, batch: Batch) -> StepOutput:
        """The gradient of the whole batch, left in the parameters; returns the figures of this rank's samples."""
        device = self.ranks.device
        images = batch.images.to(device, non_blocking=True)
        masks, noise = (
            None if part is None else part.to(device, non_blocking=True) for part in (batch.masks, batch.noise)
        )
        return self.gradients.compute(images, masks, noise, self.scaler.scale)

    def _pass_over(self, agreed: Agreement) -> dict[str, Any]:
        """Go on after a step whose loss or gradient is no number; returns what the journal is to say of it."""
        step = self.step + 1
        keys = self._bad.pass_over(agreed, step)
        then, done, in_a_row = self.config.training.on_nonfinite, self.step, self._bad.in_a_row
        if then == "rollback":
            checkpoint = agreed_checkpoint(self.directory, self.ranks, checkpoints.latest_regular)
            if checkpoint is None:
                raise CodecmillError(
                    f"No checkpoint in {self.directory.checkpoints} can be gone back to: none of those of its interval "
                    "is there and whole. Restore one from a copy, or start a new run under another name."
                )
            self.restore(checkpoint)
            # The samples go on: those of the steps that are lost would lead here again.
            self.step, self._bad.in_a_row = done, in_a_row
            then = f"rollback to step {checkpoint.step}"
        self._bad.tell(agreed, step, keys, then)
        return {"nonfinite": {"samples": keys, "then": then}}

    def _validate_if_due(self) -> Validation | None:
        training = self.config.training
        if self.step % training.validation_interval and self.step != training.steps:
            return None
        self.beat(self.step, "validating")
        return validate(self.module, self.shard_set, self.config, self.ranks, self.directory, self.step, self.beat)

    def _is_best(self, validation: Validation) -> bool:
        training = self.config.training
        if self.step % training.checkpoint_interval and self.step != training.steps:
            return False  # saved because the run was stopped: one that was not stopped could not choose this step
        loss = validation.means["loss"]
        if not (math.isfinite(validation.psnr) and math.isfinite(loss)):
            return False
        if self.best is None:
            return True
        if self.model.parts and self.best.loss is not None:  # a codec may buy PSNR with bits
            return loss < self.best.loss
        return validation.psnr > self.best.psnr

    def _save(self, validation: Validation | None, journal: Journal | None) -> None:
        if validation and self._is_best(validation):
            self.best = checkpoint_format.Best(step=self.step, psnr=validation.psnr, loss=validation.means["loss"])
        self.beat(self.step, "saving")
        if journal:
            journal.sync()
        about = {
            "step": self.step,
            "position": self.step * self.config.training.batch_size,
            "model": self.config.model,
            "normalization": self.normalization,
            "shard_set": self.shard_set.fingerprint,
            "parent": self.parent,
            **self.origin,
            "validation": validation.figures() if validation else {},
            "best": self.best,
        }
        scalars = {"bad_in_a_row": self._bad.in_a_row}
        saved = self.state.save(Saving(self.directory, about, scalars, self.check_writer))
        if saved is None:
            return
        spared = unsent_checkpoints(self.directory)
        checkpoints.retain(self.directory, saved, self.config.training.keep_latest, spared)
        log.info("Saved %s", saved.path.name, extra={"step": self.step})
