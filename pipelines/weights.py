"""Weights from anywhere into a model: a checkpoint, a safetensors file, a classic torch file, or MLflow."""

import io
import logging
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipelines import checkpoints
from pipelines.checkpoint_tensors import read_weights as read_weights_of
from pipelines.config import RunConfig
from pipelines.durable_files import told_where, write_bytes
from pipelines.errors import CodecmillError, InputError
from pipelines.model.build import Model, build_model, count_parameters, most_parameters
from pipelines.run_directory import Root
from pipelines.stored_tensors import StoredTensor
from pipelines.tensor_files import check_plain, read_tensors

log = logging.getLogger("codecmill.weights")

PARTS = ("encoder", "quantizer", "decoder")
"""Of a model, which have a dictionary `<part>_state_dict` each in the classic file."""

OTHERS = "other_state_dict"
"""The classic file's dictionary of what is in none of these, such as a codec's entropy model, under its full names."""


@dataclass(frozen=True)
class LoadReport:
    """What a load took and what it left, as sorted tensor names.

    Attributes:
        loaded: taken over.
        missing: in the model but not in the source; left as initialised.
        unexpected: in the source but not in the model; ignored.
        mismatched: in both, with another shape, or integers for fractions, as each says behind its name; left as
            initialised.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def summary(self, source: str) -> str:
        differences = f"; {self.differences()}" if self.differences() else ""
        return f"{len(self.loaded)} tensors loaded from {source}{differences}."

    def differences(self) -> str:
        parts = {"missing": self.missing, "unexpected": self.unexpected, "mismatched": self.mismatched}
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def load_weights(model: nn.Module, source: str | Path, strict: bool = True, root: Root | None = None) -> LoadReport:
    """Copy weights into a model, in place.

    Args:
        model: with parameters named `encoder.*`, `decoder.*` and so on.
        source: a checkpoint folder, a `.safetensors` file, a classic torch file (a dictionary with
            `encoder_state_dict`, `decoder_state_dict`, and of a codec `other_state_dict`), `runs:/...` or
            `models:/name@alias`.
        strict: any difference (see `LoadReport`) is an error; otherwise what fits is taken.
        root: whose MLflow `runs:/` and `models:/` are looked up in; by default that of the working directory.

    Raises:
        InputError: the source is not there or is none of these.
        CodecmillError: it is damaged, it differs (strict), or nothing of it fits (lenient).
    """
    report = apply_weights(model, read_weights(source, root), strict, str(source))
    log.info("%s", report.summary(str(source)))
    return report


def copy_all(into: Tensor, source: Tensor | StoredTensor) -> None:
    into.copy_(source[...])


Copy = Callable[[Tensor, Tensor | StoredTensor], None]
"""Fills a tensor; where a rank has a share of it, with the rows of that."""


def apply_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor] | Mapping[str, StoredTensor],
    strict: bool,
    source: str,
    copy: Copy = copy_all,
) -> LoadReport:
    """Copy named tensors into a model, in place; see `load_weights` for `strict` and the errors."""
    own = model.state_dict()
    shared = own.keys() & weights.keys()
    mismatched = {name for name in shared if _differing(own[name], weights[name])}
    report = LoadReport(
        loaded=tuple(sorted(shared - mismatched)),
        missing=tuple(sorted(own.keys() - weights.keys())),
        unexpected=tuple(sorted(weights.keys() - own.keys())),
        mismatched=tuple(f"{name} {_differing(own[name], weights[name])}" for name in sorted(mismatched)),
    )
    if strict and report.differences():
        raise CodecmillError(
            f"The weights in {source} do not match the model ({report.differences()}). "
            "Use the model settings that they were made with, or --training.strict false to take what fits."
        )
    if not report.loaded:
        raise CodecmillError(f"Nothing in {source} fits the model by name and shape ({report.differences()}).")
    with torch.no_grad():
        for name in report.loaded:
            copy(own[name], weights[name])
    return report


def _differing(own: Tensor, other: Tensor | StoredTensor) -> str:
    """Why a tensor is not copied into a model's own one, in a few words; empty where it may be.

    Weights may come in another precision, but a codec's tables that were once cast to half of it are no tables.
    """
    if own.shape != other.shape:
        return f"{list(other.shape)} for {list(own.shape)}"
    types = [str(each.dtype).removeprefix("torch.") for each in (other, own)]
    return " for ".join(types) if len({"float" in each for each in types}) > 1 else ""


HARMLESS_BYTES = 2**30
"""Of a model: one that is no larger is built before it is looked at what weights there are."""


def model_of(checkpoint: checkpoints.Checkpoint) -> Model:
    """The model that a checkpoint, which was verified when it was opened, says that it is of, with all its weights.

    Raises:
        CodecmillError: its weights are of another model; also where that would take any amount of memory to build.
    """
    config = checkpoint.manifest.model
    if 4 * most_parameters(config) > HARMLESS_BYTES:
        count = count_parameters(config)
        there = sum(record.bytes for record in checkpoint.manifest.files.values())
        if 4 * count > there:
            raise CodecmillError(
                f"{checkpoint.path} says that its model has {count:,} parameters, and its files have {there:,} bytes: "
                "it is damaged, or not what codecmill wrote."
            )
    with torch.device("cpu"):
        model = build_model(config).to(torch.float32)  # whatever defaults a program has that uses codecmill
    restore_weights(model, checkpoint)
    return model


def restore_weights(model: nn.Module, checkpoint: checkpoints.Checkpoint) -> None:
    """All weights of a checkpoint, which was verified when it was opened, into the model that it is of.

    Raises:
        CodecmillError: it is the checkpoint of another model.
    """
    apply_weights(
        model,
        read_weights_of(checkpoint),
        strict=True,
        source=str(checkpoint.path),
    )


def read_weights(source: str | Path, root: Root | None = None) -> dict[str, Tensor]:
    """The named tensors of a source, on the CPU; see `load_weights` for the sources and errors."""
    text = str(source)
    if text.startswith(("runs:/", "models:/")):
        from pipelines.tracking import fetch_checkpoint

        with tempfile.TemporaryDirectory(prefix="codecmill-") as folder:
            fetched = fetch_checkpoint(text, root or Root(RunConfig().root.absolute()), Path(folder))
            return _from_path(fetched, text)
    return _from_path(Path(source), text)


def _from_path(path: Path, source: str) -> dict[str, Tensor]:
    if path.is_dir():
        return read_weights_of(checkpoints.open_checkpoint(path))
    if not path.is_file():
        raise InputError(f"There are no weights at {source}: no such file or folder.")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged or hostile bytes lead to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CodecmillError(
            f"{source} cannot be read as plain tensors, and nothing else is ever loaded from it: {reason}"
        ) from error
    return _from_classic(content, source, path.stat().st_size)


def _check_archive(path: Path) -> None:
    """That what a torch file is made of is no larger than it is: torch compresses nothing, but reads what somebody did.

    Raises:
        ValueError: it is larger.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside, size = sum(part.file_size for part in archive.infolist()), path.stat().st_size
        if inside > size:
            raise ValueError(f"its parts have {inside:,} bytes, and it has {size:,}")


MOST_SHARED = 16
"""How often, at most, the numbers in a file may be tensors of it: tied weights are several, but a file of a few bytes
could have one that fills the memory."""


def _from_classic(content: object, source: str, size: int) -> dict[str, Tensor]:
    """The weights in a dictionary of dictionaries that was read from a file of so many bytes."""
    states = content if isinstance(content, dict) else {}
    if not all(isinstance(states.get(f"{part}_state_dict"), dict) for part in ("encoder", "decoder")):
        raise CodecmillError(f"{source} holds no dictionary with encoder_state_dict and decoder_state_dict.")
    weights = {f"{part}.{name}": tensor for part in PARTS for name, tensor in _within(states, f"{part}_state_dict")}
    weights |= {str(name): tensor for name, tensor in _within(states, OTHERS)}
    check_plain(weights, source)
    claimed = sum(tensor.nbytes for tensor in weights.values())
    if claimed > MOST_SHARED * size:
        raise CodecmillError(
            f"{source} has {size:,} bytes, but its tensors claim to have {claimed:,}: clone those that are views of a "
            "few numbers, and save them anew."
        )
    return weights


def _within(states: dict[Any, Any], key: str) -> Iterable[tuple[Any, Any]]:
    found = states.get(key)
    return found.items() if isinstance(found, dict) else ()


def export_classic(checkpoint: checkpoints.Checkpoint, path: Path) -> None:
    """Write all of a checkpoint's weights as the classic single torch file, readable with `weights_only=True`.

    Raises:
        InputError: the file cannot be written there.
        CodecmillError: there is no room.
    """
    file = io.BytesIO()
    torch.save({**_classic(read_weights_of(checkpoint)), "step": checkpoint.step}, file)
    with told_where(path):
        write_bytes(path, file.getvalue())


def _classic(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {f"{part}_state_dict": {} for part in PARTS}
    for name, tensor in weights.items():
        part, _, inner = name.partition(".")
        if part in PARTS and inner:
            states[f"{part}_state_dict"][inner] = tensor
        else:
            states.setdefault(OTHERS, {})[name] = tensor
    return states
