"""Decoded images on disk: a source is decoded once and read memory-mapped from then on."""

import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from images.table import ImageTable
from names import printable

VERSION = 7  # of the decoding; a new version makes new entries
ARRAYS = ("images", "labels", "is_train")
SUM = "sha256"  # the file with an entry's checksum
DAY = 24 * 60 * 60  # seconds


def cache_root() -> Path | None:
    """`custom-resnet` in the user's cache folder, None without a home. Its entries can be deleted at any time."""
    root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if root.startswith("~") else Path(root) / "custom-resnet"  # a user in a container can be without a home


def decoded(path: Path, read: Callable[[Path], ImageTable], parts: list[Path]) -> ImageTable:
    """The table that `read` makes of the file or folder `path`, from the cache if the source has not changed since.

    parts: what is read of it: files and folders in it, or the file itself. A source counts as changed when the name,
    size or modification time of any file in its parts has changed, hidden ones aside; an entry is checked against its
    SHA-256. A line on stderr reports an entry that is damaged or cannot be kept.
    """
    name, root = path.resolve().name, cache_root()
    if root is None:
        print(
            printable(f"decoding {name}; to keep that for the next start set HOME or XDG_CACHE_HOME"), file=sys.stderr
        )
        return read(path)
    entry = root / f"{name[:50]}-{_key(path, parts)}"
    if table := _load(entry):
        return table
    print(printable(f"decoding     {name}; the next start finds it in {entry.parent}"))
    table = read(path)
    try:
        _save(entry, table)
    except OSError as e:  # a full disk, a home that cannot be written to
        why = f"the decoded images cannot be kept in {entry.parent} ({e.strerror}); continuing without"
        print(printable(why), file=sys.stderr)
        return table
    return _load(entry) or table


def _key(path: Path, parts: list[Path]) -> str:
    digest = hashlib.sha256(f"{VERSION}\0{path.resolve()}".encode(errors="surrogateescape"))

    def add(part: str, depth: int) -> None:
        info = os.stat(part)
        line = f"{depth}\0{os.path.basename(part)}\0{info.st_size}\0{info.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
        if depth and stat.S_ISDIR(info.st_mode):
            for name in sorted(name for name in os.listdir(part) if not name.startswith(".")):
                add(os.path.join(part, name), depth - 1)

    for part in parts:
        if os.path.lexists(part):  # `read` reports what is missing
            add(str(part), depth=2)  # train, <class>, images
    return digest.hexdigest()[:16]


def _save(entry: Path, table: ImageTable) -> None:
    beside = entry.with_name(f".{entry.name}.{os.getpid()}")
    entry.parent.mkdir(parents=True, exist_ok=True)
    for leftover in entry.parent.glob(".*"):
        if time.time() - leftover.stat().st_mtime > DAY:  # left by a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        beside.mkdir()
        for name in ARRAYS:
            np.save(beside / f"{name}.npy", getattr(table, name))
        about = {"name": table.name, "classes": table.classes}
        about |= {"digest": table.fingerprint(), "stats": table.train_stats(), "notes": table.notes}
        (beside / "about.json").write_text(json.dumps(about))
        (beside / SUM).write_text(_digest(beside))
        beside.rename(entry)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process has just written the same entry
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _load(entry: Path) -> ImageTable | None:
    """The table in the entry; None if it does not exist, or is damaged, in which case it is reported and deleted."""
    if not os.path.exists(entry):
        return None
    try:
        if (entry / SUM).read_text() != _digest(entry):
            raise ValueError("its SHA-256 has changed")
        about = json.loads((entry / "about.json").read_text())
        # As plain arrays over the mapping: np.memmap's own type costs microseconds at every access.
        images, labels, is_train = (np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r")) for name in ARRAYS)
    except (OSError, ValueError) as e:
        print(printable(f"{entry}: the decoded images are damaged ({e}); decoding anew"), file=sys.stderr)
        shutil.rmtree(entry, ignore_errors=True)
        return None
    rows, classes, notes = np.arange(len(images)), tuple(about["classes"]), tuple(about["notes"])
    stats = tuple(map(tuple, about["stats"]))
    return ImageTable(about["name"], classes, images, labels, is_train, rows, stats, about["digest"], notes)


def _digest(entry: Path) -> str:
    """SHA-256 over the entry's files: 0.2 s for the 60,000 images of CIFAR-10."""
    digest = hashlib.sha256()
    for name in (*(f"{name}.npy" for name in ARRAYS), "about.json"):
        with (entry / name).open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # adds to this digest
    return digest.hexdigest()
