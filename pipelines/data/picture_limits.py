"""What a picture may ask for before it is decoded: bounds on memory and work, the same on every machine."""

import re

from PIL import Image, ImageFile, JpegImagePlugin

MAX_PIXELS = 400_000_000
"""Larger pictures are refused: a few bytes can claim to be one. The largest cameras' pictures have so many.

The way to RGB takes 8 bytes a pixel, up to 17 in WebP and 16-bit colour: 3.2 to 6.8 GB.
"""

MAX_SCANNED_PIXELS = 50 * MAX_PIXELS
"""A progressive JPEG of a few kB can have thousands of scans, each a pass over all pixels. Real ones have some 10."""

MAX_PLAIN_COMMENTS = 1000
"""Of a picture in Netpbm's plain text: Pillow copies a megabyte for each. Real ones have one or two, in the header."""

MAX_EXIF = 1000
"""Segments of a JPEG with EXIF data, which Pillow puts together anew for each. Real ones have one or two."""

MOST_COVERED = 8
"""How often the pieces of a picture may cover it: in a TIFF all may be one. Real ones have up to 5 planes."""

_SCAN = re.compile(b"\xff\xda")  # three times as fast as bytes.count

# Pillow's own bound, a quarter of this, would refuse panoramas and scans. This sets it for the whole process.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def check_size(image: Image.Image) -> None:
    """Before a picture is decoded.

    Raises:
        ValueError: it has more than `MAX_PIXELS`.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"its {image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")


def check_beside(content: bytes) -> None:
    """Before a picture is so much as opened.

    Raises:
        ValueError: what lies beside its pixels would take too long.
    """
    if content[:2] == b"\xff\xd8" and (count := content.count(b"Exif\0\0")) > MAX_EXIF:
        raise ValueError(f"its {count} segments of EXIF data are more than {MAX_EXIF}")


def check_work(image: ImageFile.ImageFile, content: bytes) -> None:
    """Before a picture is decoded: that its time is that of a picture of its size.

    Raises:
        ValueError: it would take a multiple of that.
    """
    # Several JPEGs in one file (MPO) are such a picture too: the first is decoded.
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        # In a JPEG's data the byte FF is followed by 00 or a marker, so this counts its scans, and those of thumbnails.
        scans = sum(1 for _ in _SCAN.finditer(content))
        if image.width * image.height * scans > MAX_SCANNED_PIXELS:
            raise ValueError(f"its {scans} scans of {image.width} x {image.height} pixels take too long to decode")
    boxes = (piece.extents for piece in image.tile)
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in filter(None, boxes))
    if covered > MOST_COVERED * image.width * image.height:
        raise ValueError(f"its {len(image.tile)} pieces cover it {covered / (image.width * image.height):.0f} times")
    if image.tile and image.tile[0].codec_name == "ppm_plain" and content.count(b"#") > MAX_PLAIN_COMMENTS:
        raise ValueError(f"its {content.count(b'#')} comments are more than {MAX_PLAIN_COMMENTS}")
