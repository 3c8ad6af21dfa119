"""What an image costs in each way of loading it, on one core."""

import tempfile
from pathlib import Path
from time import perf_counter

import albumentations as A
import numpy as np
import torch
from fasttransform import Pipeline
from ways import documented, erasing, noise, torchvision_loader

from aug import train_transforms
from data import get_dls


def seconds(iterate) -> float:
    """How long going through it takes."""
    start = perf_counter()
    for _ in iterate():
        pass
    return perf_counter() - start


def transforms_as_documented() -> A.Compose:
    """The same augmentation with albumentations' own cutout."""
    steps = train_transforms(cutout=0).transforms
    return A.Compose([*steps, A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(8, 8), hole_width_range=(8, 8), p=1)])  # fmt: skip # noqa: E501


def loaders(images: int = 51200, rounds: int = 3) -> list[dict]:
    """Microseconds per image. The ways take turns, and each one's fastest round counts.

    "uint8" is what our loader hands to the device, which makes floats itself. Where the CPU is the device, that costs
    its cores extra: the rows with floats. The slow ways see a fifth of the images.
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
            "fastai as documented, images in memory, our cutout, floats": (images // 5, lambda: in_memory.train),
            "fastai as documented, PNG files, A.CoarseDropout, floats": (images // 5, lambda: usual.train),
        }
        best = dict.fromkeys(ways, np.inf)
        for dl in (raw[1], raw[2], dls[1], dls[2]):
            seconds(lambda dl=dl: dl)  # starts the workers: once a run, not once an epoch
        for _ in range(rounds):
            for name, (n, way) in ways.items():
                best[name] = min(best[name], 1e6 * seconds(way) / n)
    return [{"way": name, "µs per image": cost} for name, cost in best.items()]


def summary(rows: list[dict]) -> str:
    """The ratios that matter."""
    cost = {row["way"]: row["µs per image"] for row in rows}
    ours = cost["ours, floats"]
    return "\n".join(
        (
            f"our loader, uint8: {cost['ours, uint8'] / cost['bare A.Compose over arrays, uint8']:.2f} x the bare loop",
            f"torchvision: {cost['torchvision, floats'] / ours:.1f} x ours, "
            f"with erasing {cost['torchvision with RandomErasing, floats'] / ours:.1f} x",
            f"fastai as documented: {cost['fastai as documented, PNG files, A.CoarseDropout, floats'] / ours:.1f} x ours, "
            f"in memory and with our cutout "
            f"{cost['fastai as documented, images in memory, our cutout, floats'] / ours:.1f} x",
            f"two workers: {cost['ours, uint8, 1 worker'] / cost['ours, uint8, 2 workers']:.2f} x as fast as one, "
            f"{cost['ours, floats, 1 worker'] / cost['ours, floats, 2 workers']:.2f} x with the floats made here",
        )
    )
