"""The time of one image in each way of loading it, on one core."""

import tempfile
from pathlib import Path
from time import perf_counter

import albumentations as A
import numpy as np
import torch
from fastai.torch_core import TensorImage
from fasttransform import Pipeline
from ways import BS, documented, erasing, noise, torchvision_loader

from aug import KeyedAugment, train_transforms
from data import get_dls

IN_MEMORY = "fastai as documented, images in memory, our cutout"
FILES = "fastai as documented, PNG files, A.CoarseDropout"


def seconds(iterate) -> float:
    """Seconds that it takes to iterate over it."""
    start = perf_counter()
    for _ in iterate():
        pass
    return perf_counter() - start


def transforms_as_documented() -> A.Compose:
    """The same augmentation with albumentations' own cutout."""
    hole = A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(8, 8), hole_width_range=(8, 8), p=1)
    return A.Compose([*train_transforms(cutout=0).transforms, hole])


def loaders(images: int = 51200, rounds: int = 3) -> list[dict]:
    """Microseconds per image, the fastest of `rounds`, in which the ways take turns.

    "uint8" is what our loader passes to the device, which makes floats of it. If the CPU is the device, this takes time
    of its cores, too: the rows with floats. The slow ways load a fifth of the images.
    """
    torch.set_num_threads(1)
    table, small = noise(images, 2), noise(images // 5, 2)
    compose = train_transforms()
    dls = {workers: get_dls(table, workers=workers, device="cpu").train for workers in (0, 1, 2)}
    raw = {workers: get_dls(table, workers=workers, device="cpu").train for workers in (0, 1, 2)}
    for dl in raw.values():
        dl.after_batch = Pipeline([])
    plain, erased = torchvision_loader(small, 0), torchvision_loader(small, 0, erasing())
    with tempfile.TemporaryDirectory() as folder:
        in_memory = documented(small, train_transforms(), 0, "cpu")
        usual = documented(small, transforms_as_documented(), 0, "cpu", Path(folder))
        ways = {
            "bare A.Compose over arrays, uint8": (images, lambda: (compose(image=x) for x in table.images[:images])),
            "ours, uint8": (images, lambda: raw[0]),
            "ours, uint8, 1 worker": (images, lambda: raw[1]),
            "ours, uint8, 2 workers": (images, lambda: raw[2]),
            "ours, floats": (images, lambda: dls[0]),
            "ours, floats, 1 worker": (images, lambda: dls[1]),
            "ours, floats, 2 workers": (images, lambda: dls[2]),
            "torchvision, floats": (images // 5, lambda: plain),
            "torchvision with RandomErasing, floats": (images // 5, lambda: erased),
            f"{IN_MEMORY}, floats": (images // 5, lambda: in_memory.train),
            f"{FILES}, floats": (images // 5, lambda: usual.train),
        }
        best = dict.fromkeys(ways, np.inf)
        for dl in (raw[1], raw[2], dls[1], dls[2]):
            seconds(lambda dl=dl: dl)  # starts the workers, which happens once a run, not once an epoch
        for _ in range(rounds):
            for name, (n, way) in ways.items():
                best[name] = min(best[name], 1e6 * seconds(way) / n)
    return [{"way": name, "µs per image": cost} for name, cost in best.items()]


def profile(images: int = 10240, rounds: int = 3) -> list[dict]:
    """Where our loader's time goes: for each part, the microseconds that it adds to those above it."""
    torch.set_num_threads(1)
    table, dl = noise(images, 2), get_dls(noise(BS, 2), bs=BS, workers=0, device="cpu").train
    to_float, normalise = dl.after_batch.fs
    order = np.random.default_rng(0).permutation(images)
    batches = [order[start : start + BS].tolist() for start in range(0, images, BS)]
    steps = train_transforms().transforms

    def augmented(transforms):
        augment = KeyedAugment(A.Compose(transforms))
        return lambda: (augment(table.batch(batch)[0], 0, range(BS)) for batch in batches)

    def floats(*after):
        augment = KeyedAugment(train_transforms())
        for batch in batches:
            x = TensorImage(torch.from_numpy(augment(table.batch(batch)[0], 0, range(BS))).permute(0, 3, 1, 2))
            for transform in after:
                x = transform(x)
            yield x

    parts = {
        "gather the batch's pixels": lambda: (table.batch(batch) for batch in batches),
        "go to each random stream, A.Compose around nothing": augmented([]),
        "A.PadIfNeeded for the batch, A.RandomCrop": augmented(steps[:2]),
        "A.HorizontalFlip": augmented(steps[:3]),
        "Cutout": augmented(steps),
        "uint8 to floats": lambda: floats(to_float),
        "normalise": lambda: floats(to_float, normalise),
    }
    total = {name: min(1e6 * seconds(part) / images for _ in range(rounds)) for name, part in parts.items()}
    before = [0.0, *total.values()]
    rows = [
        {"part": name, "µs per image": cost - less} for (name, cost), less in zip(total.items(), before, strict=False)
    ]
    return [*rows, {"part": "all", "µs per image": before[-1]}]


def summary(rows: list[dict]) -> str:
    """The ratios that matter."""
    cost = {row["way"]: row["µs per image"] for row in rows}

    def ratio(a, b):
        return cost[a] / cost[b]

    files, in_memory = FILES + ", floats", IN_MEMORY + ", floats"
    return (
        f"our loader, uint8: {ratio('ours, uint8', 'bare A.Compose over arrays, uint8'):.2f} x the bare loop\n"
        f"torchvision: {ratio('torchvision, floats', 'ours, floats'):.1f} x ours, "
        f"with RandomErasing {ratio('torchvision with RandomErasing, floats', 'ours, floats'):.1f} x\n"
        f"fastai as documented: {ratio(files, 'ours, floats'):.1f} x ours, "
        f"with images in memory and our cutout {ratio(in_memory, 'ours, floats'):.1f} x\n"
        f"two workers: {ratio('ours, uint8, 1 worker', 'ours, uint8, 2 workers'):.2f} x as fast as one, "
        f"{ratio('ours, floats, 1 worker', 'ours, floats, 2 workers'):.2f} x with the floats made here"
    )
