"""What lies in a shard set: the manifest, the index and the list of sources beside each tar, and their names."""

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import features
from pydantic import Field, TypeAdapter, ValidationError

from pipelines.config import RunConfig, Section
from pipelines.data.png_writing import WRITER
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError, first_fault
from pipelines.tolerant_reading import is_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
CODECS = ("pil", "zlib", "zlib_ng", "jpg", "libjpeg_turbo", "webp", "avif", "libtiff", "littlecms2")


@dataclass(frozen=True)
class SourceRow:
    """A source that gave samples: a line of `.sources.jsonl`, in the order in which their samples lie in the tar.

    Attributes:
        sha256: of the source (see `hashing.Source`).
        bytes, width, height: of the image's file, and of the upright image in pixels.
        tar_bytes: length of its samples in the tar.
        pixels, sums, squares: number of stored pixels, and a channel's sum of levels and of squared levels (0 to 255).
        pixels_sha256: of size and pixels of a whole test image and its mask, of nothing else.
        note: what was amiss with it, such as a broken colour profile that was ignored.
    """

    path: str
    mask: str | None
    sha256: str
    image_sha256: str
    mask_sha256: str | None
    bytes: int
    width: int
    height: int
    status: Literal["used"]
    samples: int
    tar_bytes: int
    pixels: int
    sums: list[int]
    squares: list[int]
    pixels_sha256: str | None
    note: str = ""


_SOURCE_ROW = TypeAdapter(SourceRow)


class ShardRow(Section):
    """One tar of a shard set; `inputs` names what went into it: equal inputs, equal bytes."""

    name: str = Field(pattern=f"^({'|'.join(SPLITS)})-[0-9a-f]{{6}}$")
    """Of files in the set's own folder: a manifest of somebody else's may name `../../elsewhere`."""
    split: Split
    samples: int = Field(ge=1)
    bytes: int = Field(ge=0)
    sha256: str
    index_sha256: str
    index_bytes: int = Field(ge=0)
    sources_sha256: str
    sources_bytes: int = Field(ge=0)
    inputs: str

    @property
    def tar(self) -> str:
        return f"{self.name}.tar"

    @property
    def index(self) -> str:
        return f"{self.name}.index"

    @property
    def sources(self) -> str:
        return f"{self.name}.sources.jsonl"

    def files(self) -> list[tuple[str, int, str]]:
        """Name, size in bytes and sha256 of each file of this shard."""
        return [
            (self.tar, self.bytes, self.sha256),
            (self.index, self.index_bytes, self.index_sha256),
            (self.sources, self.sources_bytes, self.sources_sha256),
        ]


class SetAsideRow(Section):
    """A file that gave no sample, and why; its size in bytes where it could be read."""

    path: str
    status: Literal["skipped", "duplicate", "broken"]
    reason: str
    sha256: str | None
    bytes: int | None = None


class Manifest(Section):
    """All about a shard set; it is written last, so that where it is, everything is."""

    format_version: int
    fingerprint: str
    settings: dict[str, Any]
    settings_digest: str
    versions: dict[str, str | None]
    shards: list[ShardRow]
    set_aside: list[SetAsideRow]
    sources: dict[Split, int] = Field(description="Sources that gave samples, by split")
    samples: dict[Split, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    test_set_sha256: str

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest in a folder.

        Raises:
            CodecmillError: it is missing, damaged or of another version.
        """
        file = folder / MANIFEST
        if not is_file(file):
            raise CodecmillError(f"{folder} is no shard set: it has no {MANIFEST}. Make it with: codecmill shards")
        return cls.in_file(file)

    @classmethod
    def in_file(cls, file: Path) -> "Manifest":
        """As `read`, of a file."""
        return cls.checked(read_json(file), str(file), f"Delete {file.parent} and run: codecmill shards")

    @classmethod
    def checked(cls, value: Any, place: str, way_out: str) -> "Manifest":
        """A manifest from JSON that was read somewhere, anybody's.

        Raises:
            CodecmillError: it is damaged or of another version.
        """
        version = value.get("format_version") if isinstance(value, dict) else None
        if version != FORMAT_VERSION:
            raise CodecmillError(
                f"{place} has format version {version}, but this codecmill reads {FORMAT_VERSION}. "
                "Make the shard set anew with: codecmill shards"
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise CodecmillError(f"{place} is damaged: {first_fault(error)}. {way_out}") from error


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The choices that shape a shard set; others (normalisation, workers, paths, draws) leave it as it is."""
    data = config.data
    # The first sets with masks were split by image and mask together.
    split_by = {"split_by": "image"} if data.masks else {}
    return split_by | {
        "patch_size": data.patch_size,
        "patches": data.patches,
        "max_patches_per_image": data.max_patches_per_image,
        "min_detail": data.min_detail,
        "small_images": data.small_images,
        "background": list(data.background),
        "validation_fraction": data.validation_fraction,
        "test_fraction": data.test_fraction,
        "compression": data.compression,
        "max_shard_mib": data.max_shard_mib,
        "seed": config.seed if data.patches == "random" else None,
    }


def codec_versions() -> dict[str, str | None]:
    """Pillow and the libraries that decide on decoded pixels, and what decides on the bytes of a PNG."""
    return {codec: features.version(codec) for codec in CODECS} | {"png_writer": WRITER}


def settings_digest_of(settings: dict[str, Any], versions: dict[str, str | None]) -> str:
    """Names all that shapes a set but its sources."""
    made_by = {"format_version": FORMAT_VERSION, "settings": settings, "versions": versions}
    return hashlib.sha256(canonical(made_by)).hexdigest()


def fingerprint_of(settings_digest: str, hashes: Sequence[str]) -> str:
    """Names a set by its settings and the sorted hashes of its sources, used or not."""
    return hashlib.sha256(canonical([settings_digest, list(hashes)])).hexdigest()


def canonical(value: Any) -> bytes:
    """JSON of which equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_sources(file: Path, rows: Iterable[SourceRow]) -> None:
    file.write_bytes(b"".join(canonical(asdict(row)) + b"\n" for row in rows))


def read_sources(file: Path) -> Iterator[SourceRow]:
    """The lines of a list of sources, in order.

    Raises:
        CodecmillError: it cannot be read, or a line is none of such a list.
    """
    number = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007
                yield _SOURCE_ROW.validate_json(line)
    except OSError as error:
        raise CodecmillError(f"{file} cannot be read: {error.strerror}. Run: codecmill shards") from error
    except ValidationError as error:
        raise CodecmillError(
            f"{file} is damaged: line {number} says {first_fault(error)}. Delete the file and run: codecmill shards"
        ) from error


def is_whole(file: Path, size: int) -> bool:
    """Whether a file is there with so many bytes. Asked once: another process may evict it at any moment."""
    try:
        about = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(about.st_mode) and about.st_size == size
