"""The choices of `training`: how long, on what, and how often it is saved and checked."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipelines.config.section import Section, at_home

MOST_STEPS = 1_000_000_000
"""Of a training."""

MOST_RANKS = 1024
"""On all hosts together."""

CountOrAuto = Annotated[int, Field(ge=1, le=MOST_RANKS)] | Literal["auto"]
"""A count, or what the machine suggests; resolved at a run's first start."""


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
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="What each rank holds: ddp, everything; fsdp, its share of weights and moments, for models that "
        "one GPU does not hold",
    )
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
        default="auto", description="Arithmetic of the step; auto: bf16 where hardware multiplies it faster"
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
    validation_interval: int = Field(
        default=500,
        ge=1,
        description="Steps between validations, a count; of those that are saved, too, the best is evaluated",
    )
    replica_check_interval: int = Field(
        default=100, ge=1, description="Steps between proofs that all ranks hold the same bits, a count"
    )
    keep_latest: int = Field(
        default=3, ge=1, description="Checkpoints kept, the newest; others that are needed stay too"
    )
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
        "back to the last checkpoint of the interval while the samples go on",
    )
    start_from: Annotated[str, AfterValidator(at_home)] | None = Field(
        default=None, description="Weights to start a new run from: a path, runs:/... or models:/name@alias"
    )
    strict: bool = Field(default=True, description="start_from must match exactly; false takes what fits")
