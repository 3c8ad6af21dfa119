"""How long a user waits for --help, and for the first training step with and without the data set in the cache."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

TRAIN = Path(__file__).parents[1] / "train_fastai.py"
STAGES = """
import sys, time
start = time.perf_counter()
def stage(name):
    global start
    print(name, time.perf_counter() - start, sep=chr(9))
    start = time.perf_counter()
import torch
stage("import torch")
import fastai.vision.core, fastai.callback.all, fastai.learner
stage("import fastai")
import albumentations
stage("import albumentations")
import train_fastai, data
from pathlib import Path
from reporting import pictures
from training import lr_finder
stage("import this project and matplotlib")
dls = data.get_dls(sys.argv[1], device="cpu")
stage("map the images, make the loaders")
learn = train_fastai.get_learner(dls)
stage("make the network")
with lr_finder.undisturbed(learn), learn.no_bar():
    learn.summary()
stage("summary")
pictures.save_augmentations(dls, Path(sys.argv[2]) / "augmentations.png")
stage("picture of the augmentation")
next(iter(dls.train))
stage("first batch")
"""


def fake_cifar10(folder: Path) -> Path:
    """Noise in the format of CIFAR-10's python version."""
    rng = np.random.default_rng(0)
    root = folder / "cifar-10-batches-py"
    root.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {
            b"data": rng.integers(0, 256, (10_000, 3072), dtype=np.uint8),
            b"labels": (np.arange(10_000) % 10).tolist(),
        }
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {b"label_names": [str(i).encode() for i in range(10)]}
    (root / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return root


def first_step(words: list[str], env: dict) -> float:
    """Seconds from the start of the command to the line that says that training begins."""
    start = perf_counter()
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("training"):
            break
    seconds = perf_counter() - start
    process.kill()
    process.wait()
    return seconds


def start(rounds: int = 3) -> list[dict]:
    """Seconds, the fastest of `rounds`; then a breakdown of the time to the first step, from one more process."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        env = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(TRAIN.parent)}
        cifar10 = fake_cifar10(folder)

        def train(run):
            options = ["--data", str(cifar10), "--no-lr-find", "--device", "cpu", "--out", str(folder / str(run))]
            return first_step([sys.executable, str(TRAIN), *options], env)

        def help_(_):
            begin = perf_counter()
            subprocess.run([sys.executable, str(TRAIN), "--help"], check=True, stdout=subprocess.DEVNULL)
            return perf_counter() - begin

        rows = [
            {"what": "--help", "seconds": min(map(help_, range(rounds)))},
            {"what": "to the first step, first use of the data set", "seconds": train("first")},
            {"what": "to the first step, data set in the cache", "seconds": min(map(train, range(rounds)))},
        ]
        words = [sys.executable, "-W", "ignore", "-c", STAGES, str(cifar10), str(folder)]
        lines = subprocess.run(words, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    stages = [line.split("\t") for line in lines if "\t" in line]
    return rows + [{"what": f"  of that: {name}", "seconds": float(seconds)} for name, seconds in stages]
