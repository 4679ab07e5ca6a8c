"""Writes the digests of images behind their tags, where a registry can be reached: `infra/pin-images`.

A tag may be moved; with its digest an image is the one that was tried. The registry is asked by Docker's own client
(`docker buildx imagetools inspect`), which needs no engine. Images that are built here have none to
be asked for: codecmill:..., on whatever registry.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pipelines.durable_files import write_bytes
from pipelines.errors import CodecmillError

INFRA = Path(__file__).parents[1]
_IMAGE = re.compile(r"^(\s*(?:- )?(?:image: |FROM ))([\w./-]+:[\w.-]+)(?:@sha256:[0-9a-f]{64})?$", re.MULTILINE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def main() -> int:
    try:
        for file in (INFRA / "compose.yaml", INFRA / "Dockerfile", *sorted((INFRA / "kubernetes").glob("*.yaml"))):
            text = file.read_text(encoding="utf-8")
            changed = pinned(text, digest)
            if changed != text:
                write_bytes(file, changed.encode())
                print(f"Pinned {file.relative_to(INFRA.parent)}")
    except CodecmillError as error:
        print(f"pin-images: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def pinned(text: str, digest_of: Callable[[str], str]) -> str:
    """A file's text with each image's digest behind its tag; those of before are replaced."""

    def with_digest(match: re.Match[str]) -> str:
        ours = match[2].rpartition("/")[2].startswith("codecmill:")  # on a registry of the user's, too
        return match[0] if ours else f"{match[1]}{match[2]}@{digest_of(match[2])}"

    return _IMAGE.sub(with_digest, text)


def digest(image: str) -> str:
    """What the registry says.

    Raises:
        CodecmillError: it cannot be asked, or has no such image.
    """
    command = ["docker", "buildx", "imagetools", "inspect", image, "--format", "{{json .Manifest.Digest}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CodecmillError(
            f"Docker's client cannot be asked for {image}: {error}. Install docker with buildx."
        ) from error
    found = _DIGEST.search(done.stdout)
    if done.returncode or found is None:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise CodecmillError(f"The registry does not tell the digest of {image}: {said}")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
