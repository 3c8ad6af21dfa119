"""What the tests share: small image folders, a small trained learner, and the command as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of decoded images, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "custom-resnet"


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


@pytest.fixture(scope="session")
def learner(tmp_path_factory):
    """A learner that knows the digits after three epochs."""
    from data import get_dls
    from train_fastai import get_learner

    dls = get_dls("digits", bs=64, flip=0, device="cpu")
    learn = get_learner(dls, "demo", path=tmp_path_factory.mktemp("learner"))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 0.1)
    return learn
