"""A whole run: its sections, and which of their choices go together."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipelines.config.data import DataConfig
from pipelines.config.evaluation import EvaluationConfig
from pipelines.config.loss import SMALLEST_MS_SSIM, LossConfig
from pipelines.config.model import ModelConfig
from pipelines.config.section import Section, at_home
from pipelines.config.training import MOST_RANKS, TrainingConfig
from pipelines.errors import InputError

SMALLEST_CROP = {"checkerboard": 2, "nested": 3}
"""Latents, in each direction, from which on each pass of a hyperprior's `model.context` has a place."""


def _check_name(name: str) -> str:
    # As long as what they are filled with: the name must be one still when it is read again from the run's folder.
    bare = name.replace("{date}", "0" * 10).replace("{time}", "0" * 6).replace("{id}", "0" * 8)
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    if not bare or bare[0] in ".-" or set(bare) - allowed or len(bare) > 100:
        raise ValueError(
            "a run's name has 1 to 100 letters, digits, '-', '_' or '.', starts with none of '.-', "
            "and may hold {date}, {time} and {id}, which are 10, 6 and 8 of them"
        )
    return name


def _check_root(root: Any) -> Any:
    if root == "":
        raise ValueError("a folder: the working directory is '.'")
    return at_home(root) if isinstance(root, str) else root


RootPath = Annotated[Path, BeforeValidator(_check_root)]
"""A root as somebody types it, in a form perhaps."""


class RunConfig(Section):
    """A whole run, from images to a registered model."""

    name: Annotated[str, AfterValidator(_check_name)] = Field(
        default="run-{date}-{time}", description="The run's name and folder; {date}, {time} and {id} are filled in once"
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Seed of every random choice")
    root: RootPath = Field(
        default=Path("codecmill-data"), description="Folder that holds shards, runs and MLflow's files"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        self._check_distortion()
        if self.model.quantizer == "vq" and self.model.codebook_decay is None and self.loss.quantizer_weight == 0:
            raise ValueError(
                "loss.quantizer_weight 0 leaves the codes of vq as they start: give it a weight, or the codes a "
                "model.codebook_decay"
            )
        metric = self.evaluation.promotion_metric
        if metric.startswith("bd_rate") and self.model.entropy == "none":
            raise ValueError(f"evaluation.promotion_metric {metric} needs a codec: model.entropy factorized, say")
        if metric.startswith("bd_rate") and not self.evaluation.curve_images:
            raise ValueError(f"evaluation.promotion_metric {metric} needs evaluation.curve_images above 0")
        stride = 2**self.model.downsamplings
        if self.training.crop_size % stride:
            raise ValueError(
                f"training.crop_size {self.training.crop_size} is no multiple of {stride}, which "
                f"model.downsamplings {self.model.downsamplings} asks for"
            )
        needed = self.training.crop_size / self.data.min_scale
        if needed > self.data.patch_size:
            raise ValueError(
                f"training.crop_size {self.training.crop_size} at data.min_scale {self.data.min_scale} needs "
                f"patches of {needed:.0f} pixels, but data.patch_size is {self.data.patch_size}"
            )
        self._check_ranks()
        if self.training.parallel == "fsdp":
            self._check_shares()
        return self

    def _check_ranks(self) -> None:
        batch, virtual, nodes = self.training.batch_size, self.training.virtual_ranks, self.training.nodes
        processes = 1 if self.training.processes == "auto" else self.training.processes
        ranks = f"training.processes {processes}" + (f" on training.nodes {nodes}" if nodes > 1 else "")
        if nodes * processes > MOST_RANKS:
            raise ValueError(f"{ranks} is more than {MOST_RANKS} ranks")
        if nodes * processes > batch:
            raise ValueError(
                f"{ranks} is more than training.batch_size {batch}: each rank needs at least one image of the global "
                "batch"
            )
        if virtual is not None and batch % virtual:
            raise ValueError(f"training.virtual_ranks {virtual} does not divide training.batch_size {batch}")
        if virtual is not None and virtual % processes:
            raise ValueError(f"training.processes {processes} does not divide training.virtual_ranks {virtual}")
        left = next((left for left in range(2, nodes + 1) if virtual and virtual % (left * processes)), None)
        if left is not None:
            raise ValueError(
                f"training.virtual_ranks {virtual} is no multiple of the {left * processes} ranks that there are while "
                f"{left} of training.nodes {nodes} are at work: take a multiple of "
                f"{processes * math.lcm(*range(1, nodes + 1))}"
            )

    def _check_shares(self) -> None:
        if self.training.virtual_ranks is not None:
            raise ValueError(
                f"training.parallel fsdp takes no training.virtual_ranks, and {self.training.virtual_ranks} are asked "
                "for: their gradients lie whole on every rank"
            )
        has_whole_gradients = self.model.quantizer == "vq" and self.model.codebook_decay is None
        if has_whole_gradients and self.training.precision == "fp16":
            raise ValueError(
                "training.parallel fsdp with training.precision fp16 takes no codes of vq that the loss learns: "
                "torch's scaler takes gradients in shares or whole, not both. Use bf16, or give model.codebook_decay"
            )

    def _check_distortion(self) -> None:
        distortion = self.loss.distortion
        if distortion == "ms_ssim" and self.training.crop_size < SMALLEST_MS_SSIM:
            raise ValueError(
                f"loss.distortion ms_ssim needs a training.crop_size of {SMALLEST_MS_SSIM} or more, not "
                f"{self.training.crop_size}"
            )
        if distortion == "ms_ssim" and self.data.masks is not None:
            raise ValueError("loss.distortion ms_ssim takes no data.masks")
        if distortion == "l1" and self.model.entropy != "none":
            raise ValueError("a model.entropy takes loss.distortion mse or ms_ssim, not l1")

    @property
    def has_a_test_split(self) -> bool:
        """Whether there are images to evaluate it on; a run without is done when it is trained."""
        return self.data.test_fraction > 0

    def must_have_a_test_split(self) -> None:
        """To be called before a whole run begins, not where hours of training end.

        Raises:
            InputError: the run has no images to be evaluated on.
        """
        if not self.has_a_test_split:
            raise InputError(
                "A whole run evaluates its model on the test split, but data.test_fraction is 0. Give it a share, such "
                "as 0.1, or stop after the training: codecmill train."
            )

    def must_suit_a_new_run(self) -> None:
        """To be called where a run begins; one of former times is read, and goes on, all the same.

        Raises:
            InputError: the champion is chosen by curves, but the codec's is a single point, which never meets another.
                Or crops are too small for a hyperprior, or what it starts from is empty.
        """
        if self.training.start_from == "":
            raise InputError("training.start_from is empty: name weights, or leave it out to start from none.")
        self._must_have_a_curve()
        self._must_teach_each_pass()

    def _must_teach_each_pass(self) -> None:
        """One that no crop has a place for would never be taught, and DDP ends in a traceback for the lack of it."""
        context, crop = self.model.context, self.training.crop_size
        smallest = SMALLEST_CROP[context] * 2**self.model.downsamplings
        if self.model.entropy == "hyperprior" and crop < smallest:
            raise InputError(
                f"training.crop_size {crop} at model.downsamplings {self.model.downsamplings} has too few latents for "
                f"model.context {context}: take {smallest} or more, or fewer downsamplings."
            )

    def _must_have_a_curve(self) -> None:
        metric, weight = self.evaluation.promotion_metric, self.loss.lambda_
        finest, coarsest = self.model.step_range
        is_of_lambda = weight is not None and not (self.model.finest_step or self.model.coarsest_step)
        if metric.startswith("bd_rate") and (is_of_lambda or finest == coarsest):
            cause = f"loss.lambda {weight:g}" if is_of_lambda else f"one model.finest_step and coarsest_step {finest:g}"
            raise InputError(
                f"evaluation.promotion_metric {metric} compares curves, but {cause} makes a codec of one quality, "
                "whose curve is a single point: choose psnr or ms_ssim, or train for a range of steps."
            )

    def named(self, start: datetime | None = None, identity: str | None = None) -> "RunConfig":
        """The same config with `{date}`, `{time}` (UTC) and `{id}` filled in, by default from now and at random."""
        start = (start or datetime.now(UTC)).astimezone(UTC)
        name = self.name.replace("{date}", f"{start:%Y-%m-%d}").replace("{time}", f"{start:%H%M%S}")
        return self.model_copy(update={"name": name.replace("{id}", (identity or uuid4().hex)[:8])})
