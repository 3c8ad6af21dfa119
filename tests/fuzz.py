"""Feed the readers of foreign files with damaged ones.

    pip install atheris
    python -W ignore tests/fuzz.py CORPUS -max_total_time=600

CORPUS is a folder, which is filled with good files first. Anything but an `InputError` is a finding; so is a file that
takes more than ten seconds or two GB. The options are those of libFuzzer.
"""

import io
import json
import sys
import tarfile
import tempfile
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch
from conftest import CIFAR_CLASSES, python2_pickle
from PIL import Image
from safetensors.torch import save

from errors import InputError
from model import CustomResNet

with atheris.instrument_imports(include=["images", "training", "trained", "options", "tarfile", "zipfile", "json",
                                         "pickle"]):  # fmt: skip
    from dataclasses import asdict

    import options
    from images import cifar10, decoding, sources
    from options import Options
    from trained.header import HEADER
    from trained.loading import load_model
    from trained.onnx_file import save_onnx
    from trained.safe_file import load_safetensors
    from training import checkpoint

WHERE = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
sources.decoded = lambda path, read, parts: read(path)  # keep nothing
NETWORK = CustomResNet(2, 1)
GIVEN = asdict(Options())
PIXELS = np.full((1, 32, 32, 3), 128, np.uint8)


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/ä" + "1" * 120 + ".png"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            archive.addfile(info, io.BytesIO(png()))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/ä.png"):
            archive.writestr(name, png())
    return file.getvalue()


def batch(n: int = 10) -> bytes:
    return python2_pickle({b"data": np.zeros((n, 3072), dtype=np.uint8), b"labels": list(range(n))})


def saved(state: dict) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def safe() -> bytes:
    header = {"format": 1, "architecture": {"num_classes": 2, "width": 1, "norm": "batch", "logit_scale": 1.0},
              "normalization": {"mean": [0.5] * 3, "std": [0.5] * 3}, "classes": ["a", "b"],
              "source": "digits", "valid": "test", "last_accuracy": 0.5}  # fmt: skip
    return save(NETWORK.state_dict(), {HEADER: json.dumps(header)})


def exported() -> Path:
    (WHERE / "model.safetensors").write_bytes(safe())
    save_onnx(*load_safetensors(WHERE / "model.safetensors"), WHERE / "model.onnx")
    return WHERE / "model.onnx"


def read_archive(data: bytes, suffix: str) -> None:
    path = WHERE / f"a{suffix}"
    path.write_bytes(data)
    sources.load_images(path)


def read_batches(data: bytes, name: str) -> None:
    files = {f"data_batch_{i}": batch() for i in range(1, 6)} | {"test_batch": batch()}
    files["batches.meta"] = python2_pickle({b"label_names": [c.encode() for c in CIFAR_CLASSES]})
    cifar10.read_batches("there", files | {name: data})


def read_image(data: bytes) -> None:
    decoding.decode(data, "a.png", [].append)


def read_checkpoint(data: bytes) -> None:
    (WHERE / checkpoint.NAME).write_bytes(data)
    checkpoint.load_checkpoint(WHERE, NETWORK)


def read_model(data: bytes, suffix: str) -> None:
    (WHERE / f"model{suffix}").write_bytes(data)
    model = load_model(WHERE / f"model{suffix}", "cpu")
    json.dumps(dict(zip(model.classes, model.probabilities(PIXELS)[0].tolist(), strict=True)), allow_nan=False)


def read_config(data: bytes) -> None:
    (WHERE / "config.json").write_bytes(data)
    options.read_config(WHERE)[1].settings()


# The first byte of an input says which.
READERS = [
    (lambda data: read_archive(data, ".tgz"), tar),
    (lambda data: read_archive(data, ".zip"), zipped),
    (lambda data: read_batches(data, "test_batch"), lambda: batch(2)),
    (lambda data: read_batches(data, "batches.meta"), lambda: python2_pickle({b"label_names": [b"a", b"b"]})),
    (read_image, png),
    (read_checkpoint, lambda: saved(dict.fromkeys(checkpoint.KEYS, 1) | {"model": NETWORK.state_dict()})),
    (lambda data: read_model(data, ".safetensors"), safe),
    (read_config, lambda: json.dumps({"options": GIVEN, "epochs": 3, "wd": 0.1}).encode()),
    (lambda data: read_model(data, ".onnx"), lambda: exported().read_bytes()),
]


def one_input(data: bytes) -> None:
    if not data:
        return
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            READERS[data[0] % len(READERS)][0](data[1:])
    except InputError as e:
        if not str(e).isprintable():
            raise


if __name__ == "__main__":
    corpus = Path(sys.argv[1])
    corpus.mkdir(exist_ok=True)
    for number, (_, good) in enumerate(READERS):
        (corpus / f"good-{number}").write_bytes(bytes([number]) + good())
    atheris.Setup([*sys.argv, "-timeout=10", "-rss_limit_mb=2500", "-max_len=40000"], one_input)
    atheris.Fuzz()
