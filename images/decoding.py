"""Image files decoded to uint8 pixels of one size."""

import io
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from errors import InputError

SIZE = 32  # pixels a side
MAX_PIXELS = 64_000_000  # in an image: decoded, it takes 200 MB
MAX_BYTES = 64 * 2**20  # in an image file
# Recognised by content, as names are often wrong. Pillow reads dozens more, some of which (EPS) run other programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")


def to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode and size → uint8 (32, 32, 3), upright. Other sizes are resized, without cropping.

    Raises ValueError for one of more than 64 million pixels.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, too many")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip at 255
    image = image.convert("RGB")  # a copy, so that it can be rotated in place
    if "exif" in image.info:  # phones store pixels in the sensor's orientation, and the rotation there
        ImageOps.exif_transpose(image, in_place=True)
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.array(image)  # a copy: torch warns about Pillow's memory, which is read-only


def decode(
    data: bytes, name: str, animated: Callable[[str], None], sized: Callable[[tuple[int, int]], None] | None = None
) -> np.ndarray:
    """An image file's content → uint8 (32, 32, 3). Raises InputError, with its name, if it is not an image.

    Calls `animated` with the name if it has more frames than the first, and `sized` with its original width and height.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # A phone's JPEG can hold a second picture (MPO), which is no frame; to count frames could take minutes.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                animated(name)
            pixels, size = to_rgb(image), image.size
    except Exception as e:  # Pillow raises half a dozen types for damaged files
        reason = str(e).partition(" <_io")[0]
        raise InputError(f"{name}: not a readable image ({reason}); remove or replace it") from e
    if sized:
        sized(size)
    return pixels


def read_image(
    path: Path, animated: Callable[[str], None], sized: Callable[[tuple[int, int]], None] | None = None
) -> np.ndarray:
    """`decode` a file. Raises OSError if it cannot be read."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # reading a pipe could wait for ever
        raise InputError(f"{path}: not a file; remove it")
    if info.st_size > MAX_BYTES:
        raise InputError(f"{path}: {info.st_size:,} bytes, more than any image here has; remove it")
    return decode(path.read_bytes(), str(path), animated, sized)
