"""Where images come from: every source is decoded once, checked, and becomes an `ImageTable`."""

import hashlib
import io
import pickle
import sys
import threading
import unicodedata
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from archives import members
from cache import decoded
from errors import InputError
from images import SIZE, ImageTable, decode, read_image, to_rgb

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of the 50,000 training images, range 0..1
SPLITS = ("train", "test")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
BATCH_FILES = {
    "train": [f"data_batch_{i}" for i in range(1, 6)],
    "test": ["test_batch"],
}
Found = dict[tuple[str, str], list[tuple[str, np.ndarray]]]  # (split, class) → (file name, pixels)


def load_images(source: str | Path | ImageTable) -> ImageTable:
    """Read a source: "cifar10", "digits", a folder or archive with `train/<class>/` and `test/<class>/` images, or the
    official `cifar-10-batches-py` folder or `cifar-10-python.tar.gz`. Raises InputError that names what is wrong.
    """
    if isinstance(source, ImageTable):
        return source
    if source == "digits":
        return _read_digits()
    path = Path(source).expanduser()
    try:
        if source == "cifar10":
            return replace(decoded(_download_cifar10(), _read_folder), name="cifar10", stats=CIFAR10_STATS)
        if path.is_dir():
            inner = path / "cifar-10-batches-py"
            table = decoded(inner if inner.is_dir() else path, _read_folder)
        elif path.is_file():
            table = decoded(path, _read_archive)
        else:
            raise InputError(
                f"{path}: no such file or folder; data is cifar10, digits, a folder or an archive of images"
            )
    except OSError as e:
        raise InputError(f"{e.filename or path}: cannot be read ({e.strerror or e}); check its permissions") from e
    table = replace(table, name=path.resolve().name)
    for note in table.notes:
        print(f"warning: {table.name}: {' '.join(note.split())}", file=sys.stderr)
    return table


def _download_cifar10() -> Path:
    from fastai.data.external import URLs, fastai_path, untar_data  # slow to import, and needed by this source alone

    archive = fastai_path("archive") / Path(URLs.CIFAR).name
    if not (fastai_path("data") / "cifar10").exists() and not archive.exists():
        _check_reachable(URLs.CIFAR)
        print(f"downloading CIFAR-10 (135 MB) to {archive}")
    quiet = nullcontext() if sys.stdout.isatty() else redirect_stdout(io.StringIO())  # the bar redraws itself with \r
    try:
        with quiet:
            return untar_data(URLs.CIFAR)
    except Exception as e:  # fastdownload raises that very class for a wrong checksum
        raise InputError(f"the download of CIFAR-10 failed ({e}); pass --data PATH or --data digits") from e


def _check_reachable(url: str, timeout: float = 6) -> None:
    """Raise InputError unless `url` answers in `timeout` seconds. In a thread, as no socket timeout covers the DNS."""
    outcome: list = []

    def probe():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout - 1).close()
            outcome.append(None)
        except Exception as e:
            outcome.append(getattr(e, "reason", e))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    reason = outcome[0] if outcome else f"no answer in {timeout} s"
    if reason is not None:
        raise InputError(f"CIFAR-10 is not in fastai's cache and cannot be downloaded ({reason}); pass --data PATH "
                         "(a folder or archive of it), or --data digits")  # fmt: skip


def _read_digits() -> ImageTable:
    from sklearn.datasets import load_digits  # an import of a second, for this source alone

    digits = load_digits()
    small = np.round(digits.images * (255 / 16)).astype(np.uint8)
    found: Found = {}
    for label in range(10):
        rows = np.random.default_rng([0, label]).permutation(np.flatnonzero(digits.target == label))
        images = [(str(row), to_rgb(Image.fromarray(small[row]))) for row in rows]
        n_train = round(0.8 * len(images))
        found["train", str(label)], found["test", str(label)] = images[:n_train], images[n_train:]
    return _table("digits", found)


def _read_folder(root: Path) -> ImageTable:
    if (root / "batches.meta").is_file():
        names = [name for split in SPLITS for name in BATCH_FILES[split]] + ["batches.meta"]
        return _read_batches(str(root), {n: (root / n).read_bytes() for n in names if (root / n).is_file()})
    found: Found = {}
    animated: list[str] = []
    for split in SPLITS:
        if not (root / split).is_dir():
            raise InputError(f"{root}: there is no {split} folder in it; it must hold train/<class>/ and test/<class>/")
        for folder in sorted(p for p in (root / split).iterdir() if not p.name.startswith(".")):
            if not folder.is_dir():
                raise InputError(f"{folder}: a file where the folder of a class should be; remove it")
            files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
            for path in files:
                _checked_suffix(str(path))
            found[split, folder.name] = [(path.name, read_image(path, animated.append)) for path in files]
    return _table(str(root), found, animated)


def _checked_suffix(name: str) -> str:
    if not name.lower().endswith(IMAGE_SUFFIXES):
        raise InputError(f"{name}: not a {' or '.join(IMAGE_SUFFIXES)} image; remove or convert it")
    return name


def _read_archive(path: Path) -> ImageTable:
    batches, found, animated, depth = {}, defaultdict(list), [], None
    known_batches = {"batches.meta", *BATCH_FILES["train"], *BATCH_FILES["test"]}
    for member, data in members(path):
        parts = member.parts
        if data is not None and member.name in known_batches:
            batches[member.name] = data
        if depth is None:  # the first train or test folder tells how deep the layout starts
            depth = next((i for i, part in enumerate(parts) if part in SPLITS), None)
        if depth is None or len(parts) < depth + 2 or parts[depth] not in SPLITS:
            continue  # a read-me, a list of labels
        if any(part.startswith(".") for part in parts[depth + 1 :]):
            continue  # .DS_Store and its like
        images = found[parts[depth], parts[depth + 1]]  # also for a folder, so that an empty class is seen
        if data is None:
            continue
        name = f"{path}: {member}"
        if len(parts) != depth + 3:
            raise InputError(f"{name}: images must lie at train/<class>/ and test/<class>/")
        images.append((member.name, decode(data, _checked_suffix(name), animated.append)))
    if batches:
        return _read_batches(str(path), batches)
    if not found:
        raise InputError(f"{path}: holds neither train/<class>/ and test/<class>/ images nor CIFAR-10's batch files")
    return _table(str(path), found, animated)


class _DType:
    """Stands in for numpy's dtype."""

    def __init__(self, code: str, *_):
        self.code = code

    def __setstate__(self, state):
        """Byte order and the like, which single bytes do not have."""


class _Array:
    """Stands in for numpy's array: numpy trusts what it reads from a pickle, and a damaged one can end the process."""

    def __setstate__(self, state):
        _, shape, dtype, fortran_order, data = state
        if dtype.code not in ("u1", b"u1") or fortran_order:
            raise pickle.UnpicklingError("its array is not one of uint8")
        self.pixels = np.frombuffer(data, np.uint8).reshape(shape)


class _ArrayUnpickler(pickle._Unpickler):
    """Reads what the official batch files hold (dicts, lists, bytes, strings, numbers, uint8 arrays), and calls nothing
    but the functions here: a pickle can otherwise run any code.

    It builds on the reader that is written in Python: the one in C reserves as much memory as a file says it needs.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012
    del dispatch[pickle.BYTEARRAY8[0]]  # the one code at which this reader does the same

    def find_class(self, module: str, name: str):
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _DType
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return lambda *_: _Array()
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes at the protocol of these files
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch file needs")


def _unpickle(data: bytes, name: str) -> dict:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    except Exception as e:  # a damaged pickle can raise anything
        raise InputError(f"{name}: not an official CIFAR-10 file ({e}); fetch it again") from e


def _read_batches(where: str, files: dict[str, bytes]) -> ImageTable:
    for needed in [*BATCH_FILES["train"], *BATCH_FILES["test"], "batches.meta"]:
        if needed not in files:
            raise InputError(f"{where}: {needed} is missing; fetch the whole of CIFAR-10's python version")
    names = _unpickle(files["batches.meta"], f"{where}: batches.meta").get("label_names")
    if not isinstance(names, list) or not all(isinstance(n, bytes | str) for n in names):
        raise InputError(f"{where}: batches.meta holds no label_names; fetch it again")
    classes = [n.decode(errors="surrogateescape") if isinstance(n, bytes) else n for n in names]
    found: Found = {(split, c): [] for split in SPLITS for c in classes}
    for split in SPLITS:
        for file in BATCH_FILES[split]:
            batch = _unpickle(files[file], f"{where}: {file}")
            data, labels = getattr(batch.get("data"), "pixels", None), batch.get("labels")
            pixels = SIZE * SIZE * 3
            good_data = data is not None and data.ndim == 2 and data.shape[1] == pixels
            good_labels = isinstance(labels, list) and all(
                isinstance(i, int) and i in range(len(classes)) for i in labels
            )
            if not (good_data and good_labels and len(data) == len(labels)):
                raise InputError(f"{where}: {file} does not hold (n, {pixels}) uint8 data and n labels; fetch it again")
            images = data.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                found[split, classes[label]].append((f"{file}-{i:05}", image))
    return replace(_table(where, found), stats=CIFAR10_STATS)


def _table(name: str, found: Found, animated: Sequence[str] = ()) -> ImageTable:
    """Check the classes and put all images into one array, ordered by split, class and file name."""
    classes = {split: {c for s, c in found if s == split} for split in SPLITS}
    for split, other in (SPLITS, SPLITS[::-1]):
        if missing := sorted(classes[split] - classes[other]):
            raise InputError(f"{name}: class {missing[0]!r} is in {split} but not in {other}; both need every class")
    names = sorted(classes["train"])
    if len(names) < 2:
        raise InputError(f"{name}: {len(names)} class in it; at least two are needed")
    for c in names:
        if any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in c):
            raise InputError(f"{name}: class {c!r}: its name is not one line of text; rename the folder")
    keys = [(split, c) for split in SPLITS for c in names]
    for split, c in keys:
        if not found[split, c]:
            raise InputError(f"{name}: class {c!r} has no image in {split}; add some, or remove it from both sides")
    images = np.stack([pixels for key in keys for _, pixels in sorted(found[key], key=lambda image: image[0])])
    counts = [len(found[key]) for key in keys]
    labels = np.repeat([names.index(c) for _, c in keys], counts)
    is_train = np.repeat([split == "train" for split, _ in keys], counts)
    notes = []
    if animated:
        others = f", and of {len(animated) - 1} others" if len(animated) > 1 else ""
        notes.append(f"{animated[0]}: animated; its first frame is taken{others}")
    digests = np.array([hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in images])
    if twice := int(np.isin(digests[~is_train], digests[is_train]).sum()):
        notes.append(f"{twice} of {(~is_train).sum()} test images are among the training images; the accuracy flatters")
    rows = np.arange(len(images))
    return ImageTable(name, tuple(names), images, labels, is_train, rows, notes=tuple(notes))
