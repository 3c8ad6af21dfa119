"""Decoded images as fastai items: an `ImageTable`, whose subsets are views of the same pixels."""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import NamedTuple

import numpy as np

from errors import InputError
from images.decoding import SIZE

SPLITS = ("train", "test")
LARGE = 2 * SIZE  # pixels a side; larger images lose much when they are resized
SECONDS = 10  # between two lines about the progress of decoding
Found = dict[tuple[str, str], list[tuple[str, np.ndarray]]]  # (split, class) → (file name, pixels)


class Item(NamedTuple):
    """One image as a `DataBlock` sees it: uint8 (32, 32, 3) and the name of its class."""

    image: np.ndarray
    label: str


@dataclass(frozen=True)
class ImageTable:
    """Decoded images as fastai items: `table[i]` is an `Item`, `table[[i, …]]` a view of those rows without a copy.

    images: uint8 (n, 32, 32, 3); labels: int64 (n,), indices into `classes`; is_train: bool (n,); rows: those that this
    view consists of. stats: mean and standard deviation of each channel (range 0..1), and digest: the fingerprint, or
    None to compute them when asked for. notes: warnings about the data, for the user.
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
        rows = self.rows[i]
        if np.ndim(rows) == 0:
            return Item(self.images[rows], self.classes[self.labels[rows]])
        return replace(self, rows=rows)

    @property
    def iloc(self) -> "ImageTable":
        """fastai takes subsets of table-like items through `.iloc`: so the splits are views, too."""
        return self

    def itertuples(self) -> Iterator[Item]:
        """The items one by one; fastai iterates over table-like items by this name."""
        return (self[i] for i in range(len(self)))

    def batch(self, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """A copy of these images, uint8 (n, 32, 32, 3), and their labels, int64 (n,)."""
        rows = self.rows[indices]
        return self.images[rows], self.labels[rows]

    def train_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the training images, range 0..1."""
        if self.stats:
            return self.stats
        rows = self.rows[self.is_train[self.rows]]
        total, squares = np.zeros(3), np.zeros(3)
        for start in range(0, len(rows), 1024):  # in pieces, as floats take eight times the memory
            pixels = self.images[rows[start : start + 1024]].reshape(-1, 3).astype(float)
            total += pixels.sum(0)
            squares += np.einsum("ij,ij->j", pixels, pixels)
        n = len(rows) * SIZE * SIZE
        mean = total / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
        return tuple((mean / 255).tolist()), tuple((std / 255).tolist())

    def fingerprint(self) -> str:
        """SHA-256 over classes, labels, split and pixels: the same for the same images in the same order of names."""
        if self.digest:
            return self.digest
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for array in (self.labels, self.is_train, self.images):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@dataclass
class Tally:
    """Observations while a source is decoded: which images are animated, and their original sizes."""

    animated: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    said: float = field(default_factory=perf_counter)

    def sized(self, size: tuple[int, int]) -> None:
        """Count an image of that width and height; now and then, print how many there are so far."""
        self.sizes.append(size)
        if perf_counter() - self.said > SECONDS:
            print(f"decoding     {len(self.sizes):,} images so far")
            self.said = perf_counter()

    def notes(self) -> list[str]:
        """The warnings that follow from them, one line each."""
        notes = []
        if self.animated:
            others = f", and of {len(self.animated) - 1} others" if len(self.animated) > 1 else ""
            notes.append(f"{self.animated[0]}: animated; its first frame is taken{others}")
        width, height = np.median(self.sizes, axis=0).astype(int) if self.sizes else (0, 0)
        if max(width, height) > LARGE:
            size = f"{width}x{height} pixels (the median)"
            notes.append(f"images of {size} are resized to {SIZE}x{SIZE}; small details are lost")
        return notes


def table_of(name: str, found: Found, tally: Tally | None = None, splits: tuple[str, str] = SPLITS) -> ImageTable:
    """Check the classes and put all images into one array, ordered by split, class and file name.

    splits: the names of the training and the test set in `found`. Raises InputError for classes that cannot be used.
    """
    classes = {split: {c for s, c in found if s == split} for split in splits}
    for split, other in (splits, splits[::-1]):
        if missing := sorted(classes[split] - classes[other]):
            raise InputError(f"{name}: class {missing[0]!r} is in {split} but not in {other}; both need every class")
    names = sorted(classes[splits[0]])
    if len(names) < 2:
        raise InputError(f"{name}: {len(names)} class in it; at least two are needed")
    for c in names:
        if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in c):
            raise InputError(f"{name}: class {c!r}: its name is not one line of text; rename the folder")
    keys = [(split, c) for split in splits for c in names]
    for split, c in keys:
        if not found[split, c]:
            raise InputError(f"{name}: class {c!r} has no image in {split}; add some, or remove it from both sides")
    images = np.stack([pixels for key in keys for _, pixels in sorted(found[key], key=lambda image: image[0])])
    counts = [len(found[key]) for key in keys]
    labels = np.repeat([names.index(c) for _, c in keys], counts)
    is_train = np.repeat([split == splits[0] for split, _ in keys], counts)
    notes = tally.notes() if tally else []
    digests = np.array([hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images])
    if twice := int(np.isin(digests[~is_train], digests[is_train]).sum()):
        notes.append(f"{twice} of {(~is_train).sum()} test images are also training images; the accuracy is optimistic")
    rows = np.arange(len(images))
    return ImageTable(name, tuple(names), images, labels, is_train, rows, notes=tuple(notes))
