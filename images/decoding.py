"""Image files decoded to uint8 pixels of one size."""

import io
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from errors import InputError

SIZE = 32  # pixels a side
MAX_PIXELS = 64_000_000  # of an image that is shrunk to 32x32; decoded it would take 200 MB
MAX_BYTES = 64 * 2**20  # of an image's file
# By content, as a name is often wrong. Pillow reads dozens, some of which (EPS) run other programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")


def to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode and size → uint8 (32, 32, 3), upright. Other sizes are squeezed: nothing is cut off.

    Raises ValueError for one of more than 64 million pixels.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, too many")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would make all above 255 white
    image = image.convert("RGB")  # a copy, which may be turned
    if "exif" in image.info:  # a telephone stores its photographs as the sensor lay, and says so there
        ImageOps.exif_transpose(image, in_place=True)
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.array(image)  # Pillow's own memory could not be written to, which torch warns about


def decode(
    data: bytes, name: str, animated: Callable[[str], None], sized: Callable[[tuple[int, int]], None] | None = None
) -> np.ndarray:
    """A file's content → uint8 (32, 32, 3). Calls `animated` with its name where more frames are left out, and `sized`
    with the width and height that it had.

    Raises InputError that names it where it is no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if getattr(image, "is_animated", False):  # to count its frames takes minutes where there are millions
                animated(name)
            pixels, size = to_rgb(image), image.size
    except Exception as e:  # whatever a decoder makes of a foreign file: Pillow raises half a dozen types
        reason = str(e).partition(" <_io")[0]
        raise InputError(f"{name}: not a readable image ({reason}); remove or replace it") from e
    if sized:
        sized(size)
    return pixels


def read_image(
    path: Path, animated: Callable[[str], None], sized: Callable[[tuple[int, int]], None] | None = None
) -> np.ndarray:
    """`decode` of a file. Raises OSError where it cannot be read."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # to read a pipe would wait for ever
        raise InputError(f"{path}: not a file; remove it")
    if info.st_size > MAX_BYTES:
        raise InputError(f"{path}: {info.st_size:,} bytes, more than any image here has; remove it")
    return decode(path.read_bytes(), str(path), animated, sized)
