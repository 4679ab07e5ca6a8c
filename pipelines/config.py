"""Every choice of a run, typed once: one class serves the command line, YAML files, Prefect's form and the workers."""

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal
from uuid import uuid4

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pipelines.errors import InputError


def _check_name(name: str) -> str:
    bare = name.replace("{date}", "0").replace("{time}", "0").replace("{id}", "0")
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
    if not bare or bare[0] in ".-" or set(bare) - allowed or len(bare) > 100:
        raise ValueError(
            "a run's name has 1 to 100 letters, digits, '-', '_' or '.', starts with none of '.-', "
            "and may hold {date}, {time} and {id}"
        )
    return name


CountOrAuto = Annotated[int, Field(ge=1, le=1024)] | Literal["auto"]
"""A count, or what the machine suggests; resolved at a run's first start."""


SMALLEST_STEP, LARGEST_STEP = 2.0, 256.0
"""Of a codec's quantiser, in grey levels."""

SMALLEST_MS_SSIM = 176
"""Pixels of a side that MS-SSIM is defined for: its window of 11 must fit at the coarsest of five scales."""

MOST_STEPS = 1_000_000_000
"""Of a training."""


class Section(BaseModel):
    """A frozen group of choices in which an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )


class NormalizationChoice(Section):
    """Numbers of one's own for `data.normalization`."""

    mean: tuple[float, float, float] = Field(description="Mean of red, green and blue, on the scale 0 to 1")
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        description="Standard deviation of red, green and blue, on the scale 0 to 1"
    )


class DataConfig(Section):
    """Which images, and how they become shards and batches."""

    images: str = Field(
        default="",
        description="Images: a glob ('photos/**/*.png'), a folder with all below it, a .txt list of paths, or a "
        "glob or prefix at s3://",
    )
    masks: str | None = Field(
        default=None, description="Masks: a folder or a prefix at s3://, paired with the images by path or file stem"
    )
    patch_size: int = Field(default=256, ge=16, le=4096, description="Side of the stored square patches, in pixels")
    patches: Literal["grid", "random"] = Field(
        default="grid", description="Where patches are cut: side by side, or at random places"
    )
    max_patches_per_image: int = Field(
        default=256, ge=1, le=100_000, description="Most patches taken from one image, a count"
    )
    min_detail: float = Field(
        default=0.0,
        ge=0,
        le=128,
        description="Patches with a smaller deviation are skipped, in grey levels of 255",
    )
    small_images: Literal["skip", "pad", "resize"] = Field(
        default="pad", description="What becomes of an image smaller than a patch"
    )
    background: tuple[
        Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
    ] = Field(
        default=(255, 255, 255), description="Colour that shows through transparent pixels, red green blue, 0 to 255"
    )
    validation_fraction: float = Field(default=0.1, ge=0, le=0.5, description="Share of the images for validation")
    test_fraction: float = Field(default=0.1, ge=0, le=0.5, description="Share of the images for the test")
    max_shard_mib: int = Field(
        default=256, ge=1, le=65_536, description="A shard is split above this size of its decoded patches, in MiB"
    )
    compression: Literal["fast", "small"] = Field(
        default="fast", description="How PNG is stored: fast, or small, 5 % smaller at half the speed"
    )
    normalization: Literal["imagenet", "half", "dataset"] | NormalizationChoice = Field(
        default="dataset",
        description="Mean and std for the inputs: imagenet, half (0.5), dataset (measured), or {mean, std}",
    )
    max_bad_fraction: float = Field(
        default=0.1, ge=0, le=1, description="Largest share of unreadable images before the shard stage fails"
    )
    workers: int = Field(
        default=2,
        ge=1,
        le=256,
        description="Processes that create shards, and threads a rank that decode batches, a count",
    )
    decoded_cache: int = Field(
        default=0,
        ge=0,
        le=100_000_000,
        description="Training patches that each rank keeps decoded, a count; 3 * patch_size^2 bytes each, with masks 4",
    )
    shuffle_window: int = Field(
        default=64, ge=1, le=100_000, description="Shards that samples are mixed across at a time, a count"
    )
    task_runner: Literal["auto", "processes", "threads", "dask", "ray"] = Field(
        default="auto",
        description="What runs the shard stage's tasks in parallel; auto: threads for little work, else processes; "
        "dask and ray: on the cluster that DASK_SCHEDULER_ADDRESS or RAY_ADDRESS names, other hosts too",
    )
    flip_horizontal: bool = Field(default=True, description="Mirror half of the training crops left to right")
    flip_vertical: bool = Field(default=False, description="Mirror half of the training crops top to bottom")
    min_scale: float = Field(
        default=1.0, ge=0.25, le=4, description="Smallest random magnification of a training crop, a factor"
    )
    max_scale: float = Field(
        default=1.0, ge=0.25, le=4, description="Largest random magnification of a training crop, a factor"
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.validation_fraction + self.test_fraction > 0.9:
            raise ValueError("validation_fraction + test_fraction leave less than 0.1 of the images for training")
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is above max_scale {self.max_scale}")
        return self


class ModelConfig(Section):
    """The encoder-decoder."""

    quantizer: Literal[
        "round",
        "clamped_round",
        "sign",
        "soft_to_hard",
        "noise",
        "universal",
        "binarizer",
        "fsq",
        "vq",
        "lfq",
        "gumbel",
    ] = Field(default="round", description="Straight-through layer between encoder and decoder")
    channels: int = Field(default=64, ge=4, le=2048, description="Width of the hidden layers, in channels")
    latent_channels: int = Field(default=24, ge=1, le=2048, description="Width of the quantised latents, in channels")
    downsamplings: int = Field(
        default=3, ge=1, le=6, description="Stride-2 stages of the encoder: 3 make one latent from 8x8 pixels"
    )
    residual_blocks: int = Field(default=1, ge=0, le=64, description="Residual blocks after each stage, a count")
    levels: int = Field(
        default=8, ge=2, le=256, description="Values that clamped_round, soft_to_hard and fsq may take, a count"
    )
    sigma: float = Field(
        default=1.0, gt=0, le=1e4, description="Hardness of the soft assignment of soft_to_hard, per squared unit"
    )
    final_sigma: float | None = Field(
        default=None, gt=0, le=1e4, description="What sigma grows to until the last step; null: it stays"
    )
    codes: int = Field(default=512, ge=2, le=65_536, description="Size of the codebook of vq and gumbel, a count")
    code_channels: int = Field(
        default=4, ge=1, le=2048, description="Latent channels that share a code of vq or gumbel, a count"
    )
    codebook_decay: float | None = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="Codes of vq are moving averages that keep this share a step; null: learned by the loss",
    )
    rotation_trick: bool = Field(default=False, description="Lead the gradient of vq along a rotation")
    temperature: float = Field(default=1.0, gt=0, le=1e4, description="Softness of the draws of gumbel")
    entropy: Literal["none", "factorized", "hyperprior"] = Field(
        default="none",
        description="Entropy model of the latents, which makes the model a codec that writes files; its quantiser "
        "rounds, with steps from finest_step to coarsest_step",
    )
    entropy_channels: int = Field(
        default=96, ge=4, le=2048, description="Width of the hyperprior's networks, in channels"
    )
    hyper_channels: int = Field(default=32, ge=1, le=2048, description="Width of the hyper-latents, in channels")
    context: Literal["checkerboard", "nested"] = Field(
        default="nested",
        description="How a hyperprior's latents predict each other: in two passes over a checkerboard, or in five over "
        "grids within grids",
    )
    finest_step: float | None = Field(
        default=None,
        ge=SMALLEST_STEP,
        le=LARGEST_STEP,
        description="Smallest quantiser step of a codec, in grey levels; null: 14",
    )
    coarsest_step: float | None = Field(
        default=None,
        ge=SMALLEST_STEP,
        le=LARGEST_STEP,
        description="Largest quantiser step of a codec, in grey levels; null: 130",
    )

    @property
    def step_range(self) -> tuple[float, float]:
        """The finest and the coarsest step, in grey levels."""
        return self.finest_step or 14.0, self.coarsest_step or 130.0

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        finest, coarsest = self.step_range
        if finest > coarsest:
            raise ValueError(f"finest_step {finest:g} is above coarsest_step {coarsest:g}")
        if self.quantizer in ("vq", "gumbel") and self.latent_channels % self.code_channels:
            raise ValueError(
                f"latent_channels {self.latent_channels} is no multiple of code_channels {self.code_channels}"
            )
        if self.entropy != "none" and self.quantizer != "round":
            raise ValueError(f"an entropy model takes quantizer round, not {self.quantizer}")
        return self


class LossConfig(Section):
    """What the training minimises."""

    distortion: Literal["mse", "l1", "ms_ssim"] = Field(
        default="mse", description="Distance of pixels on the scale 0 to 1, or 1 - MS-SSIM"
    )
    lambda_: float | None = Field(
        default=None,
        alias="lambda",
        gt=0,
        le=10,
        description="Weight of 255^2 * MSE, or of 1280 (1 - MS-SSIM), against bits per pixel, for a codec of one "
        "quality; null: 22 / step^2, for all steps at once",
    )
    quantizer_weight: float | None = Field(
        default=None,
        ge=0,
        le=1e4,
        description="Weight of the loss that vq and lfq have of their own, not of vq's moving averages; null: 0.1 of "
        "vq, 0.001 of lfq",
    )
    mask_weight: float = Field(
        default=4.0, ge=0, le=1e4, description="Weight of pixels inside a mask, where all others have 1"
    )


class TrainingConfig(Section):
    """How long, on what, and how often it is saved and checked."""

    steps: int = Field(default=2000, ge=1, le=MOST_STEPS, description="Optimiser steps, a count")
    batch_size: int = Field(default=16, ge=1, le=65_536, description="Global batch, in images, whatever the processes")
    crop_size: int = Field(default=128, ge=16, le=4096, description="Side of the random training crops, in pixels")
    nodes: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Hosts that train together, at most, a count; above 1 each runs the same command, and "
        "CODECMILL_RENDEZVOUS says where they meet",
    )
    processes: CountOrAuto = Field(default="auto", description="Ranks a host: a count, or auto (one a GPU; 1 without)")
    virtual_ranks: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Parts of the batch whose gradients are added in a fixed order, a count: the weights are then the "
        "same bits on any number of processes that divides it",
    )
    threads: CountOrAuto = Field(
        default="auto", description="CPU threads a rank: a count, or auto (1 with several ranks, virtual ones too)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the ranks compute")
    precision: Literal["auto", "float32", "bf16", "fp16", "float64"] = Field(
        default="auto", description="Arithmetic of the step; auto takes bf16 where the hardware multiplies it"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="Compile the step with torch.compile; auto: on a GPU from 1000 steps on"
    )
    channels_last: bool = Field(default=True, description="Store images with the channel as the fastest dimension")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Adam's peak step size")
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Share of Adam's mean of squared gradients that is kept a step"
    )
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="Course of the learning rate")
    hard_from: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the steps after which the encoder stays and noise gives way to rounding",
    )
    warmup_steps: int = Field(default=50, ge=0, le=1_000_000, description="Steps of linear warm-up, a count")
    gradient_clip: float = Field(default=1.0, ge=0, le=1e6, description="Largest gradient norm; 0 leaves it alone")
    checkpoint_interval: int = Field(default=500, ge=1, description="Steps between checkpoints, a count")
    validation_interval: int = Field(default=500, ge=1, description="Steps between validations, a count")
    replica_check_interval: int = Field(
        default=100, ge=1, description="Steps between proofs that all ranks hold the same bits, a count"
    )
    keep_latest: int = Field(default=3, ge=1, description="Checkpoints kept, the newest; the best stays too")
    max_restarts: int = Field(default=0, ge=0, le=1000, description="Times torchrun restarts failed ranks, a count")
    hang_timeout: float = Field(
        default=600.0,
        ge=1,
        le=86_400,
        description="A rank that gives no sign of life for so long is killed and the training restarted, in seconds",
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        default="stop",
        description="What follows a NaN or infinite loss: the run stops; the step changes no weight; or the weights go "
        "back to the newest checkpoint while the samples go on",
    )
    start_from: str | None = Field(
        default=None, description="Weights to start a new run from: a path, runs:/... or models:/name@alias"
    )
    strict: bool = Field(default=True, description="start_from must match exactly; false takes what fits")


class EvaluationConfig(Section):
    """What is evaluated, and what makes a champion."""

    images: str | None = Field(
        default=None, description="Images to evaluate instead of the test split: a glob, a folder or a .txt list"
    )
    tile_size: int = Field(
        default=1024,
        ge=64,
        le=65_536,
        description="Images with a longer side are computed in tiles of this side, in pixels",
    )
    pictures: int = Field(default=64, ge=0, le=100_000, description="Most images that pictures are written of, a count")
    curve_images: int = Field(
        default=24,
        ge=0,
        le=100_000,
        description="Images that a codec's rate-distortion curves are measured on, the first, a count; 0: none",
    )
    promotion_metric: Literal["psnr", "ms_ssim", "bd_rate", "bd_rate_ms_ssim"] = Field(
        default="psnr",
        description="What decides on the champion; bd_rate: a codec's bits at equal PSNR, in percent of JPEG's",
    )
    promotion_margin: float = Field(
        default=0.0, ge=0, description="By how much the champion must be beaten, in the metric's unit"
    )


class RunConfig(Section):
    """A whole run, from images to a registered model."""

    name: Annotated[str, AfterValidator(_check_name)] = Field(
        default="run-{date}-{time}", description="The run's name and folder; {date}, {time} and {id} are filled in once"
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="Seed of every random choice")
    root: Path = Field(default=Path("codecmill-data"), description="Folder that holds shards, runs and MLflow's files")
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
        return self

    def _check_ranks(self) -> None:
        batch, virtual, nodes = self.training.batch_size, self.training.virtual_ranks, self.training.nodes
        processes = 1 if self.training.processes == "auto" else self.training.processes
        ranks = f"training.processes {processes}" + (f" on training.nodes {nodes}" if nodes > 1 else "")
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

    def must_have_a_test_split(self) -> None:
        """To be called before a whole run begins, not where hours of training end.

        Raises:
            InputError: the run has no images to be evaluated on.
        """
        if not self.data.test_fraction:
            raise InputError(
                "A whole run evaluates its model on the test split, but data.test_fraction is 0. Give it a share, such "
                "as 0.1, or stop after the training: codecmill train."
            )

    def named(self, start: datetime | None = None, identity: str | None = None) -> "RunConfig":
        """The same config with `{date}`, `{time}` (UTC) and `{id}` filled in, by default from now and at random."""
        start = (start or datetime.now(UTC)).astimezone(UTC)
        name = self.name.replace("{date}", f"{start:%Y-%m-%d}").replace("{time}", f"{start:%H%M%S}")
        return self.model_copy(update={"name": name.replace("{id}", (identity or uuid4().hex)[:8])})
