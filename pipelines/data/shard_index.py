"""Where each sample lies in a tar: the index beside it, written, and read with a look at every number."""

from io import BytesIO
from pathlib import Path

import numpy as np

from pipelines.errors import CodecmillError

SPAN = np.dtype(
    [
        (name, "<u8")
        for name in (
            "offset",
            "size",
            "json_offset",
            "json_size",
            "mask_offset",
            "mask_size",
            "image_offset",
            "image_size",
            "crc32",
        )
    ]
)
"""A row of an index (.npy format, little-endian), one a sample in the order of the tar, in bytes.

`offset` and `size` are the sample's span in the tar, tar headers included; the other offsets count from its start; a
mask of size 0 is none; `crc32` (zlib's) is the whole span's checksum.
"""


def write_index(file: Path, spans: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.lib.format.write_array(stream, spans, allow_pickle=False)


def read_index(file: Path, samples: int, tar_bytes: int) -> np.ndarray:
    """The rows of an index, (samples,) of SPAN.

    Args:
        samples, tar_bytes: what the manifest says of the tar.

    Raises:
        CodecmillError: it cannot be read, or its samples do not lie one behind the other in the tar.
    """
    try:
        return parsed_index(file.read_bytes(), samples, tar_bytes)
    except OSError as error:
        raise CodecmillError(f"{file} cannot be opened: {error.strerror}. Run: codecmill shards") from error
    except ValueError as error:
        raise CodecmillError(
            f"{file} is no index of its tar: {error}. Delete the file and run: codecmill shards"
        ) from error


def parsed_index(content: bytes, samples: int, tar_bytes: int) -> np.ndarray:
    """As `read_index`, of the file's bytes.

    Raises:
        ValueError: what is wrong, as the rest of a sentence.
    """
    try:
        # Whatever the header says, nothing is made that the file does not hold.
        header = BytesIO(content)
        major, _ = np.lib.format.read_magic(header)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(header)
        spans = np.frombuffer(content, dtype=SPAN, offset=header.tell()) if dtype == SPAN else None
    except Exception as error:  # numpy takes the header for Python and raises whatever its tokeniser raises
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error
    if spans is None or shape != spans.shape or spans.shape != (samples,):
        raise ValueError(f"it has {shape} rows of {dtype.itemsize} bytes in {len(content)}, the tar {samples} samples")
    sizes = spans["size"]
    if (sizes > tar_bytes).any() or int(sizes.sum()) > tar_bytes:  # of such sizes no sum wraps around
        raise ValueError(f"it has {sum(sizes.tolist())} bytes of samples, the tar {tar_bytes}")
    if not np.array_equal(spans["offset"], np.cumsum(spans["size"]) - spans["size"]):
        raise ValueError("its samples do not lie one behind the other")
    for part in ("json", "mask", "image"):
        start, size = spans[f"{part}_offset"], spans[f"{part}_size"]
        if (start > spans["size"]).any() or (size > spans["size"] - start).any():
            raise ValueError(f"a sample's {part} lies outside of it")
    return spans
