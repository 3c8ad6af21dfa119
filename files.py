"""Atomic and durable file writing, and folders that one process at a time locks."""

import csv
import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

LOCK = ".lock"
BESIDE = re.compile(r"\..+\.\d+(\.\w+)?")  # the temporary names of `complete`
ABSENT = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # errors for what a file system does not support


def to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut, if the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that can be written to but not read; any folder on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in ABSENT:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it is renamed to `path` when the block ends, deleted if it fails.

    After the block, content and name are on the disk.
    """
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # a writer takes its format from the suffix
    try:
        yield beside
        to_disk(beside)
        os.replace(beside, path)
        to_disk(path.parent)
    except OSError as e:
        if e.filename in (None, str(beside), beside):  # the error of a failed write names no file
            e.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # a disk can have become read-only
            beside.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files in `folder`, left by a `complete` whose process was killed."""
    return [path for path in folder.glob(".*") if BESIDE.fullmatch(path.name)]


def write_json(path: Path, content: dict) -> None:
    """Write `content` as JSON, complete or not at all."""
    with complete(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, names: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write `rows` under a header of `names`, complete or not at all."""
    with complete(path) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process, however that ends. Raises InputError if another process has locked it.

    The file `.lock` is never deleted: else two processes could hold a lock, one on the old file, one on a new one.
    """
    path = folder / LOCK
    if path.is_symlink():
        raise InputError(f"{path}: this is a link, and would lock what it points to; delete it")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl:  # lockf, as worker processes would inherit and keep a flock
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in ABSENT:
            os.close(descriptor)
            raise InputError(f"{folder}: another process trains in this folder; wait for it to end") from None
        print(f"{folder}: no locks there ({e.strerror}); let no other process train in it", file=sys.stderr)
    try:
        yield
    finally:
        os.close(descriptor)
