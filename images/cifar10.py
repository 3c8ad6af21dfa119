"""CIFAR-10: fastai's download of it, and the official batch files, which are untrusted pickles."""

import io
import pickle
import sys
import threading
import urllib.request
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
from fastai.data.external import URLs, fastai_path, untar_data

from errors import InputError
from images.decoding import SIZE
from images.table import SPLITS, Found, ImageTable, table_of

CIFAR10_STATS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # of the 50,000 training images, range 0..1
BATCHES = {f"data_batch_{i}": "train" for i in range(1, 6)} | {"test_batch": "test"}  # official file → split
BATCH_FILES = (*BATCHES, "batches.meta")


def download() -> Path:
    """The folder of fastai's copy of CIFAR-10, downloaded if it is not there. Raises InputError if that fails."""
    try:
        archive = fastai_path("archive") / Path(URLs.CIFAR).name
    except RuntimeError as e:  # pathlib's, for a user without a home
        raise InputError("there is no home folder for CIFAR-10; set HOME or FASTAI_HOME, or pass --data PATH") from e
    if not (fastai_path("data") / "cifar10").exists() and not archive.exists():
        _check_reachable(URLs.CIFAR)
        print(f"downloading CIFAR-10 (135 MB) to {archive}")
    try:
        with nullcontext() if sys.stdout.isatty() else redirect_stdout(io.StringIO()):  # the bar redraws itself with \r
            return untar_data(URLs.CIFAR)
    except Exception as e:  # fastdownload raises a plain Exception for a wrong checksum
        raise InputError(f"the download of CIFAR-10 failed ({e}); pass --data PATH or --data digits") from e


def _check_reachable(url: str, timeout: float = 6) -> None:
    """Raise InputError unless `url` answers within `timeout` seconds. In a thread, as socket timeouts leave DNS out."""
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


class _DType:
    """Stands in for numpy's dtype."""

    def __init__(self, code: str, *_):
        self.code = code

    def __setstate__(self, state):
        """Ignores the byte order and alignment: single bytes have none."""


class _Array:
    """Stands in for numpy's array: numpy trusts a pickle's content, and a damaged one can crash the process."""

    def __setstate__(self, state):
        _, shape, dtype, fortran_order, data = state
        if dtype.code not in ("u1", b"u1") or fortran_order:
            raise pickle.UnpicklingError("its array is not one of uint8")
        self.pixels = np.frombuffer(data, np.uint8).reshape(shape)


class _ArrayUnpickler(pickle._Unpickler):
    """Reads what the official batch files contain (dicts, lists, bytes, strings, numbers, uint8 arrays) and calls only
    the functions here, where a plain unpickler would run any code that a file asks for.

    It extends the unpickler written in Python, as the one in C allocates as much memory as a file claims to need.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012
    del dispatch[pickle.BYTEARRAY8[0]]  # the one opcode at which the one in Python does so, too

    def find_class(self, module: str, name: str):
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _DType
        if name == "_reconstruct" and module in {"numpy.core.multiarray", "numpy._core.multiarray"}:
            return lambda *_: _Array()
        if (module, name) == ("_codecs", "encode"):  # Python 3 writes bytes like this in the protocol of these files
            return lambda text, encoding: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch file needs")


def _unpickle(data: bytes, name: str) -> dict:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    except Exception as e:  # a damaged pickle can raise anything
        raise InputError(f"{name}: not an official CIFAR-10 file ({e}); fetch it again") from e


def read_batches(where: str, files: dict[str, bytes]) -> ImageTable:
    """The table of the official batch files; files: name → content. Raises InputError if they are something else."""
    for needed in BATCH_FILES:
        if needed not in files:
            raise InputError(f"{where}: {needed} is missing; fetch the whole of CIFAR-10's python version")
    names = _unpickle(files["batches.meta"], f"{where}: batches.meta").get("label_names")
    if not isinstance(names, list) or not all(isinstance(n, bytes | str) for n in names):
        raise InputError(f"{where}: batches.meta holds no label_names; fetch it again")
    classes = [n.decode(errors="surrogateescape") if isinstance(n, bytes) else n for n in names]
    found: Found = {(split, c): [] for split in SPLITS for c in classes}
    pixels = SIZE * SIZE * 3
    for file, split in BATCHES.items():
        batch = _unpickle(files[file], f"{where}: {file}")
        data, labels = getattr(batch.get("data"), "pixels", None), batch.get("labels")
        good = isinstance(labels, list) and all(isinstance(i, int) and i in range(len(classes)) for i in labels)
        if not good or np.shape(data) != (len(labels), pixels):
            raise InputError(f"{where}: {file} does not hold (n, {pixels}) uint8 data and n labels; fetch it again")
        images = data.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            found[split, classes[label]].append((f"{file}-{i:05}", image))
    return replace(table_of(where, found), stats=CIFAR10_STATS)
