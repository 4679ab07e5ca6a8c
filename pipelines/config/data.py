"""The choices of `data`: which images, and how they become shards and batches."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.config.section import Section


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
        default="fast", description="How PNG is stored: fast, or small, 6 to 9 % smaller at under half the speed"
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
        description="Processes that create shards, and threads a rank that make batches beside its steps, a count",
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
