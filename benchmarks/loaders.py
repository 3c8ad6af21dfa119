"""What an image costs in each way of loading it, on one core and in one run.

    python benchmarks/loaders.py

The images are in memory and 32x32, the batch is 512, and each way delivers augmented, normalised float batches on the
CPU, except where it says uint8, which is what our loader's workers hand on: a GPU makes the floats itself. The ways
take turns, and each one's fastest round counts. torchvision's crop, flip and erasing are the pipeline of most examples.
"""

import sys
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import AttrGetter, Normalize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fastcore.script import call_parse
from fasttransform import Transform
from PIL import Image
from torchvision import transforms as T

from aug import train_transforms
from data import get_dls
from images import ImageTable
from sources import CIFAR10_STATS

BS = 512


class DocumentedTransform(Transform):
    """The transform that fastai's albumentations tutorial writes."""

    split_idx = 0

    def __init__(self, transforms):
        self.transforms = transforms

    def encodes(self, img: PILImage):
        return PILImage.create(self.transforms(image=np.array(img))["image"])


class InMemory(torch.utils.data.Dataset):
    """PIL images and labels through a torchvision pipeline."""

    def __init__(self, table, transform):
        self.images, self.labels = [Image.fromarray(image) for image in table.images], table.labels
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def noise(n: int) -> ImageTable:
    """n training images and two to validate on."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n + 2, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(n + 2) % 2
    return ImageTable("noise", ("a", "b"), images, labels, np.arange(n + 2) < n, np.arange(n + 2), CIFAR10_STATS)


def seconds(iterate) -> float:
    start = perf_counter()
    for _ in iterate():
        pass
    return perf_counter() - start


@call_parse
def main(
    images: int = 8192,  # How many images a round
    rounds: int = 3,  # Rounds; the fastest of each way counts
):
    """Print what an image costs in each way of loading it, on one core."""
    torch.set_num_threads(1)
    table = noise(images)
    compose = train_transforms()
    documented = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=AttrGetter("image"),
        get_y=AttrGetter("label"),
        splitter=lambda _: (list(range(images)), [images, images + 1]),
        item_tfms=DocumentedTransform(compose),
        batch_tfms=Normalize.from_stats(*CIFAR10_STATS, cuda=False),
    ).dataloaders(table, bs=BS, num_workers=0, device="cpu")
    crop, flip = T.RandomCrop(32, 4, padding_mode="reflect"), T.RandomHorizontalFlip()
    usual = [crop, flip, T.ToTensor(), T.Normalize(*CIFAR10_STATS)]

    def torch_loader(*extra):
        dataset = InMemory(table, T.Compose([*usual, *extra]))
        return torch.utils.data.DataLoader(dataset, BS, shuffle=True, drop_last=True)

    ours = {n: get_dls(table, bs=BS, workers=n, device="cpu").train for n in (0, 1, 2)}
    plain, erasing = torch_loader(), torch_loader(T.RandomErasing(1.0, scale=(1 / 16, 1 / 16), ratio=(1, 1)))

    def bare():
        return (compose(image=image)["image"] for image in table.images[:images])

    def batches():  # what the loader does in its process, without a worker and without floats
        dl = ours[0]
        dl.before_iter()
        order = dl.get_idxs()
        return dl.create_batches(iter(order))

    ways = {
        "bare A.Compose over arrays, uint8": bare,
        "ours, uint8 batches": batches,
        "ours, float batches": lambda: ours[0],
        "ours, float batches, 1 worker": lambda: ours[1],
        "ours, float batches, 2 workers": lambda: ours[2],
        "torchvision, float batches": lambda: plain,
        "torchvision with RandomErasing, float batches": lambda: erasing,
        "fastai's documented albumentations transform, float batches": lambda: documented.train,
    }
    for loader in (ours[1], ours[2]):
        seconds(lambda loader=loader: loader)  # start the workers: once a run, not once an epoch
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            best[name] = min(best[name], seconds(way))
    per_image = {name: 1e6 * s / images for name, s in best.items()}
    base = per_image["ours, float batches"]
    print(f"{'':<60} µs/image   in units of ours")
    for name, cost in per_image.items():
        print(f"{name:<60} {cost:>8.1f}   {cost / base:>16.2f}")
    ratio = per_image["ours, uint8 batches"] / per_image["bare A.Compose over arrays, uint8"]
    gain = per_image["ours, float batches, 1 worker"] / per_image["ours, float batches, 2 workers"]
    print(f"\nour loader takes {ratio:.2f} x the bare compose loop; two workers are {gain:.2f} x as fast as one")
