"""What lies in a checkpoint's folder, and what its manifest says of it and of where it comes from."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from pipelines.config import ModelConfig, RunConfig, Section, TrainingConfig
from pipelines.data.images import Normalization
from pipelines.errors import CodecmillError, first_fault
from pipelines.sealed_json import read_sealed

FORMAT_VERSION = 1
SHARDED_VERSION = 2
"""Of a checkpoint whose tensors lie in the shares of ranks. Others stay as they were: older codecmills read them."""
WEIGHTS = "model.safetensors"
STATE_TENSORS = "training_state.safetensors"
STATE_SCALARS = "training_state.json"
SHARDING = "sharding.json"
MANIFEST = "checkpoint.json"

SHAPING = ("steps", "processes", "parallel", "device", "threads", "compile", "precision")
"""The learning rate's course depends on the number of steps, rounding and the order of sums on the others."""

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""Of a file in the very folder: a manifest of somebody else's may name `../../elsewhere`."""


class FileRecord(Section):
    """Size in bytes and sha256 of a file."""

    bytes: int = Field(ge=0, lt=2**63)
    sha256: str


class Leg(Section):
    """Steps of a run that were trained under other circumstances than those after them, which may cost the bits."""

    until: int
    """The last of its steps."""
    training: dict[str, bool | int | str]
    """Those choices of `training` that a run may change and that touch the bits: see `choices_of`."""
    git_commit: str | None
    versions: dict[str, str]


def choices_of(training: TrainingConfig) -> dict[str, bool | int | str]:
    """What a leg says of how its steps were trained."""
    goes_back = training.on_nonfinite == "rollback"  # to a checkpoint of the interval
    return {name: getattr(training, name) for name in (*SHAPING, *(["checkpoint_interval"] if goes_back else []))}


class Best(Section):
    """The best validated checkpoint up to some step: of a codec by its loss, of other models by PSNR."""

    step: int = Field(ge=1)
    psnr: float
    """In dB."""
    loss: float | None = None


class ScalerState(Section):
    """Of torch.amp.GradScaler, by its own names; torch takes a count for no float, and its scale is a float32."""

    scale: float = Field(gt=0, le=2.0**127)
    growth_factor: float = Field(gt=1)
    backoff_factor: float = Field(gt=0, lt=1)
    growth_interval: int = Field(ge=1, lt=2**31)
    growth_tracker: int = Field(alias="_growth_tracker", ge=0, lt=2**31)


class TrainingState(Section):
    """`training_state.json`: what is no tensor."""

    optimizer: Literal["adam"]
    scaler: ScalerState | Annotated[dict[str, float], Field(max_length=0)]
    """Empty where nothing is scaled."""
    bad_in_a_row: int = Field(default=0, ge=0)
    """Steps passed over up to here without a good one between them: see `training.on_nonfinite`."""


class Manifest(Section):
    """`checkpoint.json`: what a checkpoint is, what it came from, and the digests of its files."""

    format_version: int
    run: str
    step: int = Field(ge=0)
    position: int = Field(ge=0)
    """Training samples consumed: the place in the global sample order."""
    model: ModelConfig
    normalization: Normalization
    shard_set: str
    """The whole fingerprint of the shard set."""
    shard_manifest_sha256: str | None = None
    """sha256 of the shard set's manifest, which names the digests of all of its files."""
    config: dict[str, Any] | None = None
    """The run's config, as it was trained with. Plain JSON, so that a later codecmill with other fields reads it."""
    git_commit: str | None = None
    """Of codecmill itself, with '+changes' if it was edited since; None where it is no checkout."""
    parent: str | None
    """sha256 of the weights that the run started from, if it did not start from nothing."""
    validation: dict[str, float]
    """Validation metrics at this very step; empty when none was made there."""
    best: Best | None
    versions: dict[str, str]
    legs: tuple[Leg, ...] = ()
    """What the earlier steps were trained under, where config, commit and versions are not those of all steps."""
    files: dict[FileName, FileRecord]
    weights_sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of a sharded checkpoint, what the sha256 of its `model.safetensors` would be; others have that file."""

    @property
    def is_sharded(self) -> bool:
        return self.format_version == SHARDED_VERSION

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_sharded != (self.weights_sha256 is not None):
            raise ValueError("weights_sha256 belongs to sharded checkpoints, and to no others")
        return self

    @property
    def is_regular(self) -> bool:
        """Whether a run that nobody stopped has a checkpoint of this step, too, by the interval of its time.

        True where it does not say which that was.
        """
        interval = self._trained_with("checkpoint_interval")
        return self.step % interval == 0 if isinstance(interval, int) and interval > 0 else True

    @property
    def may_go_back(self) -> bool:
        """Whether a loss that is no number takes the run back to its last regular checkpoint."""
        return self._trained_with("on_nonfinite") == "rollback"

    def _trained_with(self, choice: str) -> object:
        """A choice of `training`; None where a checkpoint, of another version maybe, does not say."""
        training = (self.config or {}).get("training")
        return training.get(choice) if isinstance(training, dict) else None

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude=set() if self.is_sharded else {"weights_sha256"})

    def run_config(self) -> RunConfig | None:
        """The config that it was trained with; None where it does not say.

        Raises:
            CodecmillError: it says something else than a config of this version.
        """
        try:
            return RunConfig.model_validate(self.config) if self.config is not None else None
        except ValidationError as error:
            raise CodecmillError(
                f"The checkpoint of step {self.step} of run '{self.run}' names no config of this version: "
                f"{first_fault(error)}."
            ) from error


def file_names(manifest: Manifest) -> list[str]:
    """The files that a checkpoint has, or should have, beside its manifest."""
    tensors = {SHARDING} if manifest.is_sharded else {WEIGHTS, STATE_TENSORS}
    return sorted({*tensors, STATE_SCALARS, *manifest.files})


def weights_sha256(manifest: Manifest) -> str | None:
    """What a checkpoint is known by: the sha256 of its weights as one file; None where it does not say."""
    weights = manifest.files.get(WEIGHTS)
    return manifest.weights_sha256 or (weights.sha256 if weights else None)


def read_manifest(path: Path) -> Manifest:
    """What a checkpoint's folder says that it holds; of its files only the manifest is read, and verified.

    Raises:
        CodecmillError: it is missing, altered, or of a version that this codecmill does not read.
    """
    raw, is_sealed = read_sealed(path / MANIFEST)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version not in (FORMAT_VERSION, SHARDED_VERSION):
        raise CodecmillError(
            f"{path / MANIFEST} has format version {version!r}; this codecmill reads {FORMAT_VERSION} and "
            f"{SHARDED_VERSION}."
        )
    raw.pop("digest", None)  # for a day, what is now the seal
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise CodecmillError(f"{path / MANIFEST} is damaged: {first_fault(error)}.") from error
    except CodecmillError as error:
        raise CodecmillError(f"{path / MANIFEST} is damaged: {error}") from error
    if manifest.config is not None and not is_sealed:  # who writes a config down has sealed it, too
        raise CodecmillError(f"{path / MANIFEST} was altered after it was written: it has lost its seal.")
    return manifest
