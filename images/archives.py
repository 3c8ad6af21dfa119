"""Archives of strangers, read member by member in memory: as nothing is unpacked, nothing can land outside a folder."""

import errno
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from errors import InputError

SUFFIXES = (".tgz", ".tar.gz", ".tar.xz", ".zip")
MAX_MEMBER = 64 * 2**20  # bytes; an official batch file has 31 MB, so that more than this is no part of a data set
MAX_RATIO = 200  # bytes out of an archive for each in it; images hardly shrink, and zeros a thousandfold


def members(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    """(name, content) of every member in stored order, content None for a folder.

    Raises InputError for an archive that is damaged or none, and for a member that is a link, points outside, or is far
    larger than any image.
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
    except Exception as e:  # a damaged archive can make anything of Python's readers
        # Of an OSError, None is gzip's own and EINVAL is a wrong offset; all others are the disk's.
        if isinstance(e, InputError) or (isinstance(e, OSError) and e.errno not in (None, errno.EINVAL)):
            raise
        reason = str(e).partition(":\n")[0]  # tarfile goes on with what each of its formats says
        raise InputError(f"{path}: a damaged or locked archive ({reason}); fetch it again") from e


def _checked(path: Path, name: str, size: int, special: bool) -> PurePosixPath:
    member = PurePosixPath(name.replace("\\", "/"))
    if member.is_absolute() or ".." in member.parts or special:
        raise InputError(f"{path}: member {name!r} is a link or points outside the archive; refused")
    if size > MAX_MEMBER:
        raise InputError(f"{path}: member {name!r} has {size:,} bytes, more than any image here; refused")
    return member


class _SmallMember(tarfile.TarInfo):
    """A member's header. tarfile reads the content of some kinds, long names among them, before anyone sees them."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        if info.size > MAX_MEMBER:
            raise tarfile.ReadError(f"a member of {info.size:,} bytes")
        return info


def _tar_members(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    with tarfile.open(path, "r:*", tarinfo=_SmallMember) as archive:
        for info in archive:  # one pass, as a compressed file cannot seek
            member = _checked(path, info.name, info.size, special=not (info.isfile() or info.isdir()))
            yield member, archive.extractfile(info).read() if info.isfile() else None


def _zip_members(path: Path) -> Iterator[tuple[PurePosixPath, bytes | None]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            is_link = stat.S_ISLNK(info.external_attr >> 16)
            member = _checked(path, info.filename, info.file_size, special=is_link)
            yield member, None if info.is_dir() else archive.read(info)
