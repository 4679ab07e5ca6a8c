"""The training loop of one rank: from the latest checkpoint to the last step, or to the step at which it is stopped."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import checkpoint_format, checkpoints
from pipelines.config import RunConfig
from pipelines.data.images import Normalization
from pipelines.data.loading import Batch, training_batches
from pipelines.data.order import SampleOrder
from pipelines.data.randomness import random_generator
from pipelines.data.shard_set import ShardSet
from pipelines.errors import CodecmillError
from pipelines.model.build import Model
from pipelines.run_directory import RunDirectory
from pipelines.system_metrics import SystemMetrics
from pipelines.tracking.marks import unsent_checkpoints
from pipelines.training import optimization, schedules
from pipelines.training.agreement import Agreement, Stop, agree, agreed_checkpoint
from pipelines.training.codebooks import absorb
from pipelines.training.distributed import Ranks, check_replicas
from pipelines.training.gradients import Gradients
from pipelines.training.heartbeat import Beat, silent
from pipelines.training.journal import Journal
from pipelines.training.step import StepOutput, TrainingStep
from pipelines.training.validation import Validation, draw_beginning, validate
from pipelines.weights import restore_weights

log = logging.getLogger("codecmill.training")

SYSTEM_SECONDS = 5.0

MOST_BAD_IN_A_ROW = 10
"""Steps without a finite loss after which skipping them leads nowhere."""

MOST_OVERFLOWS_IN_A_ROW = 40
"""Halved so often, fp16's scale is far below 1: it is not the scale."""

MOST_NAMED = 8
"""Samples that a message names."""


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
        self._bad_in_a_row = 0
        self._overflows_in_a_row = 0

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
        restore_weights(self.model, checkpoint)
        optimization.restore(checkpoint, self.model, self.optimizer, self.scaler)
        self._bad_in_a_row = checkpoints.read_training_state(checkpoint).bad_in_a_row
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
        with training_batches(
            self.shard_set, self.config, self.step + 1, self.ranks.rank, self.ranks.world_size
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
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, training.gradient_clip or math.inf).item()
        # fp16's scaler meets infinite gradients by design, and leaves out their step by itself.
        scaled = self.scaler.is_enabled()
        self._overflows_in_a_row = 0 if math.isfinite(norm) else self._overflows_in_a_row + 1
        if scaled and self._overflows_in_a_row == MOST_OVERFLOWS_IN_A_ROW:
            raise CodecmillError(
                f"The fp16 gradients of {MOST_OVERFLOWS_IN_A_ROW} steps in a row, up to step {self.step + 1}, are not "
                "finite, however small their scale. Use training.precision bf16 or float32 in a new run."
            )
        is_bad = bool(agreed.nonfinite) or not (math.isfinite(norm) or scaled)
        if is_bad and training.on_nonfinite == "stop":
            raise self._stopped_by(agreed, self._keys(agreed), "The run was stopped before it")
        if scaled or not is_bad:
            absorb(self.model, self.scaler.get_scale())
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.module.zero_grad(set_to_none=True)
        line: dict[str, Any] = {"samples": agreed.samples, "train/learning_rate": rate}
        if is_bad:
            return line | self._pass_over(agreed), agreed.stop
        self._bad_in_a_row = 0
        line |= agreed.figures(self.model.parts)
        return line | ({"train/gradient_norm": norm} if math.isfinite(norm) else {}), agreed.stop

    def compute(self, batch: Batch) -> StepOutput:
        """The gradient of the whole batch, left in the parameters; returns the figures of this rank's samples."""
        device = self.ranks.device
        masks = None if batch.masks is None else batch.masks.to(device, non_blocking=True)
        images = batch.images.to(device, non_blocking=True)
        return self.gradients.compute(images, masks, self._noise(batch), self.scaler.scale)

    def _noise(self, batch: Batch) -> Tensor | None:
        """The model's uniform noise on [-0.5, 0.5), keyed by seed, step and sample: the same on any rank."""
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

    def _pass_over(self, agreed: Agreement) -> dict[str, Any]:
        """Go on after a step whose loss or gradient is no number; returns what the journal is to say of it."""
        keys = self._keys(agreed)
        self._bad_in_a_row += 1
        if self._bad_in_a_row == MOST_BAD_IN_A_ROW:
            text = f"It is the {MOST_BAD_IN_A_ROW}th such step in a row, so the run was stopped before it"
            raise self._stopped_by(agreed, keys, text)
        then, done, bad_in_a_row = self.config.training.on_nonfinite, self.step, self._bad_in_a_row
        if then == "rollback":
            # Not to one that a stop has left in between: the run that was not stopped has none there.
            checkpoint = agreed_checkpoint(self.directory, self.ranks, self.config.training.checkpoint_interval)
            if checkpoint is None:
                raise CodecmillError(f"There is no checkpoint in {self.directory.checkpoints} to go back to.")
            self.restore(checkpoint)
            # The samples go on: those of the steps that are lost would lead here again.
            self.step, self._bad_in_a_row = done, bad_in_a_row
            then = f"rollback to step {checkpoint.step}"
        if self.ranks.is_first:
            print(self._about_nonfinite(agreed, keys, f"It changes no weight ({then})"), flush=True)
        return {"nonfinite": {"samples": keys, "then": then}}

    def _stopped_by(self, agreed: Agreement, keys: list[str], outcome: str) -> CodecmillError:
        """What ends the run; the journal has no line of a step that was not taken, so the log names all samples."""
        if self.ranks.is_first:
            print(f"Step {self.step + 1} is not finite for the samples {', '.join(keys)}", flush=True)
        return CodecmillError(self._about_nonfinite(agreed, keys, outcome))

    def _about_nonfinite(self, agreed: Agreement, keys: list[str], outcome: str) -> str:
        shown = ", ".join(keys[:MOST_NAMED]) + (f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else "")
        what = "loss" if agreed.nonfinite else "gradient"
        return (
            f"The {what} of step {self.step + 1} is not finite, for the samples {shown}. {outcome}. "
            "Lower training.learning_rate, or use a wider training.precision, in a new run."
        )

    def _keys(self, agreed: Agreement) -> list[str]:
        """The samples whose losses are no numbers; of a gradient that is none, all samples of the batch."""
        size = self.config.training.batch_size
        order = SampleOrder(self.shard_set.counts("train"), self.config.seed, self.config.data.shuffle_window)
        places = [order.locate(self.step * size + place) for place in agreed.nonfinite or range(size)]
        return [self.shard_set.read("train", place.shard, place.index).key for place in places]

    def _validate_if_due(self) -> Validation | None:
        training = self.config.training
        if self.step % training.validation_interval and self.step != training.steps:
            return None
        self.beat(self.step, "validating")
        return validate(self.module, self.shard_set, self.config, self.ranks, self.directory, self.step, self.beat)

    def _is_best(self, validation: Validation) -> bool:
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
        if journal is None:
            return
        self.beat(self.step, "saving")
        self.check_writer()
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
        tensors, scalars = optimization.state(self.model, self.optimizer, self.scaler)
        scalars["bad_in_a_row"] = self._bad_in_a_row
        saved = checkpoints.save(self.directory, about, self.model.state_dict(), tensors, scalars)
        spared = unsent_checkpoints(self.directory) | {self.step - self.step % self.config.training.checkpoint_interval}
        checkpoints.retain(self.directory, saved, self.config.training.keep_latest, spared)
        log.info("Saved %s", saved.path.name, extra={"step": self.step})
