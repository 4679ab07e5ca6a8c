"""The evaluation of a run: its checkpoint, on its test split or on images of the user's, into a folder of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from pipelines import checkpoints
from pipelines.codec.entropy_coder import Tables
from pipelines.codec.picture_codec import PictureCodec
from pipelines.config import EvaluationConfig
from pipelines.data.images import ImageError, Normalization, decode_png, open_image
from pipelines.data.shard_set import ShardSet
from pipelines.data.sources import find_images
from pipelines.evaluation.curve_images import bounded
from pipelines.evaluation.evaluate import Evaluation, evaluate, read_evaluation, score
from pipelines.model.build import Model
from pipelines.model.codec import TransformCodec
from pipelines.promotion import BD_RATES
from pipelines.run_directory import RunDirectory
from pipelines.tolerant_reading import number
from pipelines.tracking.marks import read_marks
from pipelines.training import journal
from pipelines.versions import git_commit
from pipelines.weights import model_of

TILES = "as a file decodes to"
"""How codecs have been shown pictures above `tile_size` since 2026-11-27; before, each tile was coded by itself."""


def evaluate_run(
    run: RunDirectory, checkpoint: checkpoints.Checkpoint, shard_set: ShardSet, choice: EvaluationConfig
) -> Evaluation:
    """Evaluate a checkpoint and write the report; one of the test split that is there already is returned as it is."""
    folder = run.evaluation(checkpoint.step, choice.images)
    if choice.images is None:
        choice = bounded(choice, ((each.width, each.height) for each in shard_set.sources("test")))
    about = {
        "run": run.path.name,
        "step": checkpoint.step,
        "checkpoint_sha256": checkpoint.sha256,
        "shard_set": shard_set.fingerprint,
        "images": choice.images or "test split",
        "test_set_sha256": None if choice.images else shard_set.test_set_sha256,
        "normalization": checkpoint.manifest.normalization.as_json(),
        "tile_size": choice.tile_size,
        "pictures": choice.pictures,
    }
    if checkpoint.manifest.model.entropy != "none":
        about["curve_images"] = choice.curve_images
        about["tiles"] = TILES
    done = read_evaluation(folder)
    # The user's own images may have changed since; the test split, named by its content, cannot have.
    if done is not None and choice.images is None and done.about.items() >= about.items():
        return done
    about |= {
        "git_commit": git_commit(),
        "training_seconds": _training_seconds(run, checkpoint.step),
        "mlflow_run": marks.run_id if (marks := read_marks(run)) else None,
    }
    model, normalization = load(checkpoint)
    codec = _codec(model, normalization, checkpoint.sha256)
    return evaluate(model, normalization, images_of(run, shard_set, choice), folder, choice, about, codec)


def _codec(model: Model, normalization: Normalization, sha256: str) -> PictureCodec | None:
    """The model as one that writes files, if it is such a one."""
    if not isinstance(model, TransformCodec):
        return None
    return PictureCodec(model, normalization, sha256, Tables(model.tables))


def _training_seconds(run: RunDirectory, step: int) -> float:
    """How long the steps took, interruptions left out, and the jumps of a clock that is set."""
    told = (number(line, "time") for line in journal.read(run.journal) if line["step"] <= step)
    times = [time for time in told if time is not None]
    gaps = [after - before for before, after in pairwise(times) if after >= before]
    usual = 100 * median(gaps) + 60 if gaps else 0.0
    return round(sum(gap for gap in gaps if gap < usual), 1)


def score_on_test_split(
    run: RunDirectory, checkpoint: checkpoints.Checkpoint, shard_set: ShardSet, choice: EvaluationConfig
) -> dict[str, float]:
    """Only the mean metrics of a checkpoint, on the test split of a shard set; nothing is written.

    Args:
        choice: how; a codec's curves are measured where they decide on the champion.
    """
    model, normalization = load(checkpoint)
    choice = choice.model_copy(update={"images": None})
    codec = _codec(model, normalization, checkpoint.sha256) if choice.promotion_metric in BD_RATES else None
    return score(model, normalization, images_of(run, shard_set, choice), choice, codec)


def load(checkpoint: checkpoints.Checkpoint) -> tuple[Model, Normalization]:
    """The model of a checkpoint, ready to evaluate, and the constants that it was trained with."""
    model = model_of(checkpoint)
    torch.backends.cudnn.allow_tf32 = False  # a champion may have been scored on a CPU
    torch.backends.cudnn.deterministic = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), checkpoint.manifest.normalization


def images_of(run: RunDirectory, shard_set: ShardSet, choice: EvaluationConfig) -> "NamedImages":
    """The pictures to evaluate: those of the user, else the test split's, whole and lossless."""
    if choice.images is None:
        sources = list(shard_set.sources("test"))  # all of them first: a damaged list is found before hours of work
        stored = zip(sources, shard_set.samples("test"), strict=True)
        named = ((Path(source.path).name, decode_png(sample.image)) for source, sample in stored)
        return NamedImages(named, sum(shard_set.counts("test")))
    background = run.read_config().data.background
    found = find_images(choice.images, "evaluation.images", run.root)
    opened = ((Path(image.path).name, _opened(Path(image.path), background)) for image in found.images)
    unread = ((Path(row.path).name, ImageError(row.reason)) for row in found.set_aside)
    return NamedImages(chain(opened, unread), len(found.images) + len(found.set_aside))


def _opened(path: Path, background: tuple[int, int, int]) -> Image.Image | ImageError:
    try:
        return open_image(path, background)
    except ImageError as error:
        return error


@dataclass(frozen=True)
class NamedImages:
    """Names and RGB pictures (or why one cannot be read), one at a time, and how many there are."""

    pairs: Iterator[tuple[str, Image.Image | ImageError]]
    count: int

    def __iter__(self) -> Iterator[tuple[str, Image.Image | ImageError]]:
        return self.pairs

    def __length_hint__(self) -> int:
        return self.count
