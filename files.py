"""Files that appear under their name complete or not at all, and folders that one process holds at a time."""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import InputError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextmanager
def complete(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to: it takes `path`'s name when the block ends, and goes away when it fails."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # a writer takes its format from the suffix
    try:
        yield beside
        os.replace(beside, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # a write that fails does not know its file
        raise
    finally:
        beside.unlink(missing_ok=True)


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
    """Hold `folder` for this process, however it ends. Raises InputError where another one does."""
    path = folder / ".lock"
    with path.open("w") as file:
        try:
            if fcntl:  # lockf, as flock would be held by worker processes that live longer
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            what = "another process trains in this folder"
            raise InputError(f"{folder}: {what}; wait for it, or pass --out PATH") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
