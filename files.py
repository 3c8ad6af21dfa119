"""Files that appear under their name complete or not at all, and folders that one process holds at a time."""

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
BESIDE = re.compile(r"\..+\.\d+(\.\w+)?")  # how `complete` names what it writes to
ABSENT = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)  # what a file system says of what it does not have


def to_disk(path: Path) -> None:
    """Have a file's content, or a folder's names, outlive a power cut; where the file system can do that."""
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
    """A path beside `path` to write to: it takes `path`'s name when the block ends, and goes away when it fails.

    After the block it is on the disk, and so is its name.
    """
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # a writer takes its format from the suffix
    try:
        yield beside
        to_disk(beside)
        os.replace(beside, path)
        to_disk(path.parent)
    except OSError as e:
        if e.filename in (None, str(beside), beside):  # a write that fails does not know its file
            e.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # on a disk that has become read-only it stays
            beside.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What `complete` has left in `folder` where its process was killed."""
    return [path for path in folder.glob(".*") if BESIDE.fullmatch(path.name)]


def write_json(path: Path, content: dict) -> None:
    """Write `content`, complete or not at all."""
    with complete(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, names: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Write `rows` under a line of `names`, complete or not at all."""
    with complete(path) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, however it ends. Raises InputError where another one does.

    Its file `.lock` stays: were it deleted, two processes could hold it, one by the old file and one by a new one.
    """
    path = folder / LOCK
    if path.is_symlink():
        raise InputError(f"{path}: this is a link, and would lock what it points to; delete it")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl:  # lockf, as flock would be held by worker processes that live longer
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in ABSENT:
            os.close(descriptor)
            what = "another process trains in this folder"
            raise InputError(f"{folder}: {what}; wait for it, or pass --out PATH") from None
        print(f"{folder}: no locks there ({e.strerror}); let no other process train in it", file=sys.stderr)
    try:
        yield
    finally:
        os.close(descriptor)
