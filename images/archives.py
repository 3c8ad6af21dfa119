"""Untrusted archives, read member by member in memory: nothing is unpacked, so nothing can land outside a folder."""

import errno
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from errors import InputError

SUFFIXES = (".tgz", ".tar.gz", ".tar.xz", ".zip")
MAX_MEMBER = 64 * 2**20  # bytes; the largest member of a real data set, an official batch file, has 31 MB
MAX_RATIO = 200  # unpacked bytes for each packed one; images hardly compress, and zeros a thousandfold


def members(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """(name, content) of every member in stored order, content None for a folder.

    Raises InputError for a damaged archive or another kind of file, and for a member that is a link, points outside, or
    is far larger than any image.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise InputError(f"{path}: neither a folder nor an archive; an archive ends in {', '.join(SUFFIXES)}")
    most, total = max(MAX_MEMBER, MAX_RATIO * path.stat().st_size), 0
    try:
        for member, data in _zip_members(path) if path.suffix.lower() == ".zip" else _tar_members(path):
            total += len(data or b"")
            if total > most:
                raise InputError(f"{path}: unpacks to more than {MAX_RATIO} times its size, as no images do; refused")
            yield member, data
    except Exception as e:  # a damaged archive can make Python's readers raise anything
        # An OSError without an errno comes from gzip, EINVAL from a wrong offset in the file; all others from the disk.
        if isinstance(e, InputError) or (isinstance(e, OSError) and e.errno not in (None, errno.EINVAL)):
            raise
        reason = str(e).partition(":\n")[0]  # tarfile lists one reason for each of its formats
        raise InputError(f"{path}: a damaged or locked archive ({reason}); fetch it again") from e


def _checked(path: Path, name: str, size: int, special: bool) -> PurePosixPath:
    member = PurePosixPath(name.replace("\\", "/"))
    if member.is_absolute() or ".." in member.parts or special:
        raise InputError(f"{path}: member {name!r} is a link or points outside the archive; refused")
    if size > MAX_MEMBER:
        raise InputError(f"{path}: member {name!r} has {size:,} bytes, more than any image here; refused")
    return member


class _SmallMember(tarfile.TarInfo):
    """A member's header, checked early: tarfile reads some members, long names for example, before it returns them."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        if info.size > MAX_MEMBER:
            raise tarfile.ReadError(f"a member of {info.size:,} bytes")
        return info


def _tar_members(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    with tarfile.open(path, "r:*", tarinfo=_SmallMember) as archive:
        for info in archive:  # in one pass, as seeking in a compressed file is slow
            member = _checked(path, info.name, info.size, special=not (info.isfile() or info.isdir()))
            yield member, archive.extractfile(info).read() if info.isfile() else None


def _zip_members(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            member = _checked(path, info.filename, info.file_size, special=is_link)
            yield member, None if info.is_dir() else archive.read(info)
