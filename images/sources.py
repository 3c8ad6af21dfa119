"""The sources of images: each is decoded once, checked, and becomes an `ImageTable`."""

import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from errors import InputError
from images.archives import members
from images.cache import decoded
from images.cifar10 import BATCH_FILES, CIFAR10_STATS, download, read_batches
from images.decoding import decode, read_image, to_rgb
from images.table import Found, ImageTable, Tally, table_of
from names import TEST, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
SPLIT_NAMES = ("train", *TEST)


def load_images(source: str | Path | ImageTable) -> ImageTable:
    """Read a source: "cifar10", "digits", a folder or archive with `train/<class>/` and `test/<class>/` images, or the
    official `cifar-10-batches-py` folder or `cifar-10-python.tar.gz`. Raises an InputError that names what is wrong.
    """
    if isinstance(source, ImageTable):
        return source
    if source == "digits":
        return _read_digits()
    if "://" in str(source):
        raise InputError(f"{source}: an address, and only files are read; download it, then pass the file")
    path = Path(os.path.expanduser(source))
    try:
        if source == "cifar10":
            return replace(_read_path(download()), name="cifar10", stats=CIFAR10_STATS)
        if not path.is_dir() and not path.is_file():
            ways = "cifar10, digits, a folder or an archive of images"
            raise InputError(f"{path}: no such file or folder; data is {ways}")
        inner = path / "cifar-10-batches-py"
        table = _read_path(inner if inner.is_dir() else path)
    except OSError as e:
        raise InputError(f"{e.filename or path}: cannot be read ({e.strerror or e}); check its permissions") from e
    table = replace(table, name=printable(path.resolve().name))
    for note in table.notes:
        print(f"warning: {table.name}: {printable(note)}", file=sys.stderr)
    return table


def _read_digits() -> ImageTable:
    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    found: Found = {}
    for label in range(10):
        rows = np.random.default_rng([0, label]).permutation(np.flatnonzero(digits.target == label))
        images = [(str(row), to_rgb(Image.fromarray(small[row]))) for row in rows]
        n_train = round(0.8 * len(images))
        found["train", str(label)], found["test", str(label)] = images[:n_train], images[n_train:]
    return table_of("digits", found)


def _read_path(path: Path) -> ImageTable:
    if path.is_file():
        return decoded(path, _read_archive, [path])
    if (path / "batches.meta").is_file():
        return decoded(path, _read_official, [path / name for name in BATCH_FILES])
    return decoded(path, _read_folder, [path / name for name in _splits(path)])


def _read_official(root: Path) -> ImageTable:
    return read_batches(str(root), {n: (root / n).read_bytes() for n in BATCH_FILES if (root / n).is_file()})


def _splits(root: Path) -> tuple[str, str]:
    return "train", next((name for name in TEST if (root / name).is_dir()), TEST[0])


def _read_folder(root: Path) -> ImageTable:
    found, tally, splits = {}, Tally(), _splits(root)
    for split in splits:
        if not (root / split).is_dir():
            also = f" ({', '.join(TEST[1:])} will do)" if split == TEST[0] else ""
            ways = f"it must hold train/<class>/ and test/<class>/{also}"
            raise InputError(f"{root}: there is no {split} folder in it; {ways}")
        for folder in sorted(p for p in (root / split).iterdir() if not p.name.startswith(".")):
            if not folder.is_dir():
                raise InputError(f"{folder}: a file where the folder of a class should be; remove it")
            files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
            for path in files:
                _checked_suffix(str(path))
            found[split, folder.name] = [(p.name, read_image(p, tally.animated.append, tally.sized)) for p in files]
    return table_of(str(root), found, tally, splits)


def _checked_suffix(name: str) -> str:
    if not name.lower().endswith(IMAGE_SUFFIXES):
        raise InputError(f"{name}: not a {' or '.join(IMAGE_SUFFIXES)} image; remove or convert it")
    return name


def _read_archive(path: Path) -> ImageTable:
    batches, found, tally, root = {}, defaultdict(list), Tally(), _root(path)
    for member, data in members(path):
        if data is not None and member.name in BATCH_FILES:
            batches[member.name] = data
        parts = member.relative_to(root).parts if member.is_relative_to(root) else ()
        if len(parts) < 2 or parts[0] not in SPLIT_NAMES:
            continue  # a README, a list of labels
        if any(part.startswith(".") for part in parts[1:]):
            continue  # .DS_Store and the like
        images = found[parts[0], parts[1]]  # also for a folder, so that an empty class is reported
        if data is None:
            continue
        name = f"{path}: {member}"
        if len(parts) != 3:
            raise InputError(f"{name}: images must lie at train/<class>/ and test/<class>/")
        images.append((member.name, decode(data, _checked_suffix(name), tally.animated.append, tally.sized)))
    if batches:
        return read_batches(str(path), batches)
    if not found:
        raise InputError(f"{path}: holds neither train/<class>/ and test/<class>/ images nor CIFAR-10's batch files")
    there = {split for split, _ in found}
    splits = ("train", next((name for name in TEST if name in there), TEST[0]))
    return table_of(str(path / root), found, tally, splits)


def _root(path: Path) -> PurePosixPath:
    """The folder inside an archive that holds train and test; of several, the one nearest the top.

    Other folders can be called val, too, so images tell, and names only if no image lies as it must: for the message.
    """
    images, names = set(), set()
    for member, _ in members(path):
        if member.name.startswith("."):
            continue  # a Mac's __MACOSX/train/._cat
        names.update(folder.parent for folder in member.parents if folder.name in SPLIT_NAMES)
        if member.parent.parent.name in SPLIT_NAMES and member.name.lower().endswith(IMAGE_SUFFIXES):
            images.add(member.parents[2])
    return min(images or names, key=lambda folder: (len(folder.parts), folder), default=PurePosixPath())
