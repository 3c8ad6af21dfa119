"""What the tests share: small image folders, a small trained learner, and the command as a user runs it."""

import csv
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run at a time

import cloudpickle
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastcore.foundation import L
from PIL import Image

import train_fastai
from options import Options

ROOT = Path(__file__).parents[1]
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of decoded images, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "custom-resnet"


@pytest.fixture(autouse=True)
def loaded_as_elsewhere(monkeypatch):
    """A learner that is loaded has classes of its own, as in another process.

    cloudpickle would give the classes of this one the methods that lie in the file, for all tests to come.
    """
    monkeypatch.setattr(cloudpickle.cloudpickle, "_lookup_class_or_track", lambda tracker_id, loaded: loaded)


@pytest.fixture
def image_folder(tmp_path):
    """A function that makes `train/<class>/` and `test/<class>/` folders of random PNG images."""

    def make(classes=("cat", "dog"), train=4, test=2, size=(32, 32), root=tmp_path / "images", suffix=".png"):
        rng = np.random.default_rng(0)
        for split, n in (("train", train), ("test", test)):
            for name in classes:
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(n):
                    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i:03}{suffix}")
        return root

    return make


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the official batch files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, obj):
        self.write(pickle.BINSTRING + struct.pack("<i", len(obj)) + obj)

    dispatch[bytes] = save_bytes


def python2_pickle(obj):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(obj)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def batches(tmp_path):
    """The official layout with 4 images of each class a file."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (40, 3072), dtype=np.uint8)
        labels = rng.permutation(np.repeat(range(10), 4)).tolist()
        (folder / name).write_bytes(python2_pickle({b"data": data, b"labels": labels, b"batch_label": b"some"}))
    (folder / "batches.meta").write_bytes(python2_pickle({b"label_names": [c.encode() for c in CIFAR_CLASSES]}))
    return folder


def tar(path, mode, root):
    with tarfile.open(path, mode) as archive:
        archive.add(root, arcname="top/inner")
    return path


def zipped(path, root):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(root))
    return path


@pytest.fixture
def command(tmp_path):
    """A function that runs `python train_fastai.py ARGUMENTS` in an empty folder."""

    def run(*arguments, **env):
        words = [sys.executable, str(ROOT / "train_fastai.py"), *map(str, arguments)]
        cwd = tmp_path / "cwd"
        cwd.mkdir(exist_ok=True)
        result = subprocess.run(words, cwd=cwd, capture_output=True, timeout=300, env={**os.environ, **env})
        # As bytes, because text mode would turn the carriage returns of a progress bar into innocent new lines
        result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
        return result

    return run


def main(cbs=(), **options):
    """What the command does with these options; returns what the run's `result.json` holds."""
    options = Options(**options)
    return (train_fastai.main if options.runs > 1 else train_fastai.train)(options, L(cbs))


class StopAt(Callback):
    """Asks the training to stop in that epoch and batch, of training or of validation."""

    def __init__(self, epoch, batch, training=True):
        self.at = epoch, batch, training

    def before_batch(self):
        if (self.epoch, self.iter, self.training) == self.at:
            self.checkpoint.ask_to_stop(143)


def outcome(run):
    """All that must not depend on stops: both weights, and the history but for its seconds."""
    weights = [torch.load(run / f"models/{name}.pth", weights_only=True) for name in ("last", "best")]
    rows = list(csv.DictReader((run / "history.csv").open()))
    result = json.loads((run / "result.json").read_text())
    best = (result["best_epoch"], result["best_accuracy"], result["last_accuracy"])
    return weights, [{name: row[name] for name in row if name != "seconds"} for row in rows], best


def same(a, b):
    equal = all(torch.equal(x[name], y[name]) for x, y in zip(a[0], b[0], strict=True) for name in x | y)
    return equal and a[1:] == b[1:]


def trained_learner(folder):
    """A learner that knows the digits after three epochs."""
    from data import get_dls
    from train_fastai import get_learner

    learn = get_learner(get_dls("digits", bs=64, flip=0, device="cpu"), "demo", path=folder)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 0.1)
    return learn


@pytest.fixture(scope="session")
def learner(tmp_path_factory):
    """One of them for all tests that leave it as it is."""
    return trained_learner(tmp_path_factory.mktemp("learner"))


RESULT = {
    "classes": list("0123456789"), "width": 16, "norm": "batch", "logit_scale": 0.125, "source": "digits",
    "fingerprint": "ab", "recipe": "demo", "flip": 0.0, "epochs": 3, "seed": 0, "valid": "test", "last_accuracy": 0.98,
    "tta_accuracy": None, "versions": {"torch": "2.15"},
}  # fmt: skip


@pytest.fixture(scope="session")
def trained(learner, tmp_path_factory):
    """A folder with `learner` as model.safetensors, .onnx, .pt2 and model.pkl, and digits/<class>/ test images."""
    from export import WRITERS
    from trained.learner_file import export
    from trained.safe_file import load_safetensors, save_safetensors

    folder = tmp_path_factory.mktemp("trained")
    export(learner, folder / "model.pkl")
    save_safetensors(learner, folder / "model.safetensors", RESULT)
    for suffix, write in WRITERS.items():
        write(*load_safetensors(folder / "model.safetensors"), folder / f"model.{suffix}")
    table = learner.dls.valid_ds.items
    for i in range(len(table)):
        path = folder / "digits" / table[i].label / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(table[i].image).save(path)
    return folder
