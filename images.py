"""Files decoded to uint8 pixels, and tables of them as fastai items: an `ImageTable`'s views share its pixels."""

import hashlib
import io
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
    return np.asarray(image)


def decode(data: bytes, name: str, animated: Callable[[str], None]) -> np.ndarray:
    """A file's content → uint8 (32, 32, 3). Calls `animated` with its name where more frames are left out.

    Raises InputError that names it where it is no image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if getattr(image, "n_frames", 1) > 1:
                animated(name)
            return to_rgb(image)
    except Exception as e:  # whatever a decoder makes of a foreign file: Pillow raises half a dozen types
        reason = str(e).partition(" <_io")[0]
        raise InputError(f"{name}: not a readable image ({reason}); remove or replace it") from e


def read_image(path: Path, animated: Callable[[str], None]) -> np.ndarray:
    """`decode` of a file. Raises OSError where it cannot be read."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # to read a pipe would wait for ever
        raise InputError(f"{path}: not a file; remove it")
    if info.st_size > MAX_BYTES:
        raise InputError(f"{path}: {info.st_size:,} bytes, more than any image here has; remove it")
    return decode(path.read_bytes(), str(path), animated)


class Item(NamedTuple):
    """One image as a `DataBlock` sees it: uint8 (32, 32, 3) and the name of its class."""

    image: np.ndarray
    label: str


@dataclass(frozen=True)
class ImageTable:
    """Decoded images as fastai items: `table[i]` is an `Item`, `table[[i, …]]` a view of those rows without a copy.

    images: uint8 (n, 32, 32, 3); labels: int64 (n,), indices into `classes`; is_train: bool (n,); `rows` are the rows
    of a view. Where they are known beforehand, `stats` are mean and standard deviation per channel (range 0..1), and
    `digest` is the fingerprint; `notes` are what a user should know about the data.
    """

    name: str
    classes: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    is_train: np.ndarray
    rows: np.ndarray
    stats: tuple | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if np.ndim(i) == 0:
            row = self.rows[i]
            return Item(self.images[row], self.classes[self.labels[row]])
        return replace(self, rows=self.rows[i])

    @property
    def iloc(self) -> "ImageTable":
        """fastai takes subsets of table-like items through `.iloc`; with it, the splits share these pixels."""
        return self

    def batch(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """A copy of the pixels, uint8 (n, 32, 32, 3), and the labels, int64 (n,)."""
        rows = self.rows[indices]
        return self.images[rows], self.labels[rows]

    def train_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the training images, range 0..1."""
        if self.stats:
            return self.stats
        rows = self.rows[self.is_train[self.rows]]
        total, squares = np.zeros(3), np.zeros(3)
        for start in range(0, len(rows), 1024):  # in pieces, as floats take eight times the room
            pixels = self.images[rows[start : start + 1024]].reshape(-1, 3).astype(float)
            total += pixels.sum(0)
            squares += np.einsum("ij,ij->j", pixels, pixels)
        n = len(rows) * SIZE * SIZE
        mean = total / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
        return tuple((mean / 255).tolist()), tuple((std / 255).tolist())

    def fingerprint(self) -> str:
        """SHA-256 over classes, labels, split and pixels: equal for equal data, wherever it was read from."""
        if self.digest:
            return self.digest
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for array in (self.labels, self.is_train, self.images):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()
