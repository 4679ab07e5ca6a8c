"""Which codec is meant: one that is named, the champion, or the one that wrote a file."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipelines import checkpoints, tracking
from pipelines.codec.entropy_coder import Tables
from pipelines.codec.picture_codec import PictureCodec
from pipelines.errors import CodecmillError, InputError
from pipelines.model.codec import TransformCodec
from pipelines.provenance.locating import Found, all_with_weights, find, readable
from pipelines.run_directory import Root
from pipelines.status import all_runs
from pipelines.weights import model_of

log = logging.getLogger("codecmill.codec")

CHAMPION = f"models:/{tracking.MODEL}@champion"


def open_codec(what: str | None, root: Root) -> PictureCodec:
    """The codec of a run, a checkpoint's folder or an address in MLflow; by default the champion's under the root.

    Where there is no champion, or one without an entropy model, it is that of the newest finished run of a codec.

    Raises:
        InputError: there is no such thing, or its model is no codec.
        CodecmillError: it is damaged, or only an MLflow that cannot be reached knows which it is.
    """
    with tempfile.TemporaryDirectory(prefix="codecmill-") as scratch:
        found = find(what, root, Path(scratch)) if what else _default(root, Path(scratch))
        return codec_of(checkpoints.open_checkpoint(found.folders[0]))


def codec_that_wrote(sha256: str, file: str, root: Root) -> PictureCodec:
    """The codec whose weights have this sha256: a checkpoint under a root, else a version in its MLflow.

    Raises:
        InputError: there is none.
        CodecmillError: all that there are are damaged.
    """
    damage: CodecmillError | None = None
    with tempfile.TemporaryDirectory(prefix="codecmill-") as scratch:
        for folder in _copies(sha256, root, Path(scratch)):
            try:
                return codec_of(checkpoints.open_checkpoint(folder))
            except CodecmillError as error:
                log.warning("Another copy of the model that wrote %s is looked for: %s", file, error)
                damage = error
    raise damage or InputError(
        f"{file} was written by a model with sha256 {sha256[:16]}, and neither a checkpoint under {root.path} "
        "nor a version in MLflow is that. Name it with --model, or its root with --root."
    )


def _copies(sha256: str, root: Root, scratch: Path) -> Iterator[Path]:
    """Checkpoints that are said to have these weights.

    The last one is what MLflow has: the champion that a file was written with may be of another root.
    """
    yield from all_with_weights(sha256, root)
    try:
        if address := tracking.version_with(sha256, root):
            yield tracking.fetch_checkpoint(address, root, scratch)
    except CodecmillError as error:  # MLflow is away, or has not what it says
        log.warning("What is registered could not be looked at: %s", error)


def codec_of(checkpoint: checkpoints.Checkpoint) -> PictureCodec:
    """The codec in a checkpoint.

    Raises:
        InputError: its model has no entropy model, so that it cannot write files.
        CodecmillError: it is damaged.
    """
    model = None if checkpoint.manifest.model.entropy == "none" else model_of(checkpoint)
    if not isinstance(model, TransformCodec):
        raise InputError(
            f"{checkpoint.path} holds an autoencoder without an entropy model, which writes no files. Train a codec: "
            "codecmill run --model.entropy hyperprior, or name another with --model."
        )
    return PictureCodec(model.eval(), checkpoint.manifest.normalization, checkpoint.sha256, Tables(model.tables))


def _default(root: Root, scratch: Path) -> Found:
    """The champion if it is a codec, else the newest finished run that is one.

    Where none is one, the champion, or the newest finished run: `codec_of` says what it lacks.
    """
    champion = None
    with suppress(tracking.NoVersionError):
        champion = find(CHAMPION, root, scratch)
    if champion and _may_write_files(champion):
        return champion
    finished = [str(run.path) for run in reversed(all_runs(root)) if run.state == "done"]
    codec = next(filter(_may_write_files, (find(path, root, scratch) for path in finished)), None)
    if champion and codec and codec.run:
        log.warning(
            "The champion is an autoencoder without an entropy model, which writes no files: taken is the newest "
            "finished codec, '%s'",
            codec.run.path.name,
        )
    if found := codec or champion:
        return found
    if not finished:
        raise InputError(f"There is no finished run under {root.path}. Train one, or name a model with --model.")
    return find(finished[0], root, scratch)


def _may_write_files(found: Found) -> bool:
    """Whether its model has an entropy model; a manifest that cannot be read counts, so that its reader says why."""
    manifest = readable(found.folders[0])
    return manifest is None or manifest.model.entropy != "none"
