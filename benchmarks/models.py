"""Size, time to load and time per image of the four files of a trained model, and the overhead of predict.py.

The network has random weights, which take the same time as trained ones.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
BATCHES = (1, 256)
IN_A_PROCESS_OF_ITS_OWN = """
import sys
from time import perf_counter
start = perf_counter()
import numpy as np
import torch
from trained.loading import load_model
imported = perf_counter()
model = load_model(sys.argv[1], "cpu")
loaded = perf_counter()
images = np.load(sys.argv[2])
model.logits(images[:1])
answered = perf_counter()
print(loaded - imported, answered - start)
for batch in map(int, sys.argv[3:]):
    model.logits(images[:batch])
    start, n = perf_counter(), 0
    while perf_counter() - start < 2:
        model.logits(images[:batch])
        n += batch
    print(n / (perf_counter() - start))
"""


def write_models(folder: Path, width: int) -> None:
    """Write a network of that width for ten classes as model.safetensors, .onnx, .pt2 and model.pkl."""
    from data import get_dls
    from export import WRITERS
    from recipes import get_recipe
    from train_fastai import get_learner
    from trained.learner_file import export
    from trained.safe_file import load_safetensors, save_safetensors

    dls = get_dls("digits", bs=64, device="cpu")
    learn = get_learner(dls, get_recipe("demo", width=width))
    unknown = ("fingerprint", "recipe", "flip", "epochs", "seed", "tta_accuracy", "versions")
    result = dict.fromkeys(unknown) | {"classes": list(dls.vocab), "norm": "batch", "width": width}
    result |= {"logit_scale": 0.125, "source": "digits", "valid": "test", "last_accuracy": 0.1}
    save_safetensors(learn, folder / "model.safetensors", result)
    export(learn, folder / "model.pkl")
    for suffix, write in WRITERS.items():
        write(*load_safetensors(folder / "model.safetensors"), folder / f"model.{suffix}")


def models(width: int = 64, rounds: int = 3) -> list[dict]:
    """Medians over `rounds`, in each of which a new process reads each file in turn."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_models(folder, width)
        images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 32, 32, 3), np.uint8)
        np.save(folder / "images.npy", images)
        names = ("model.safetensors", "model.onnx", "model.pt2", "model.pkl")
        figures: dict[str, list] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                words = ["-W", "ignore", "-c", IN_A_PROCESS_OF_ITS_OWN, folder / name, folder / "images.npy", *BATCHES]
                command = [sys.executable, *map(str, words)]
                printed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
                figures[name].append([float(number) for number in printed.split()])
        columns = ("s to load", "s to the first answer", *(f"images/s, batch {batch}" for batch in BATCHES))
        return [
            {"file": name, "MB": (folder / name).stat().st_size / 1e6}
            | {column: median(values) for column, values in zip(columns, zip(*rows, strict=True), strict=True)}
            for name, rows in figures.items()
        ]


def predict(width: int = 16, n: int = 10_000, rounds: int = 3) -> list[dict]:
    """Seconds, medians of `rounds`. With a narrow network, the overhead is a larger part of the time."""
    from trained.loading import load_model

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_models(folder, width)
        (folder / "images").mkdir()
        paths = [folder / "images" / f"{i:05}.png" for i in range(n)]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        model = load_model(folder, "cpu")
        command = [sys.executable, str(ROOT / "predict.py"), str(folder), str(folder / "images"), "--json"]
        seconds = []
        for _ in range(rounds):
            marks = [perf_counter()]
            images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
            marks.append(perf_counter())
            for start in range(0, n, 256):
                model.logits(images[start : start + 256])
            marks.append(perf_counter())
            subprocess.run([*command, "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
            marks.append(perf_counter())
            seconds.append(np.diff(marks))
    whats = ("decoding alone", "forward pass alone, batch 256", "python predict.py, its start included")
    return [{"what": what, "seconds": float(s)} for what, s in zip(whats, np.median(seconds, 0), strict=True)]


def summary(rows: list[dict]) -> str:
    """The ratio that matters, for `predict`."""
    decoding, forward, whole = (row["seconds"] for row in rows)
    return f"predict.py: {whole / (decoding + forward):.2f} x decoding and forward pass"
