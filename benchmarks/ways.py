"""The loaders that a user would otherwise write, over the same images as ours."""

from pathlib import Path

import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import AttrGetter, Normalize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fasttransform import Transform
from PIL import Image
from torchvision import transforms as T

from images.cifar10 import CIFAR10_STATS
from images.table import ImageTable, Item

BS = 512


def noise(train: int, valid: int) -> ImageTable:
    """A table of blurred noise in ten classes, about as compressible as photographs."""
    rng = np.random.default_rng(0)
    few = [Image.fromarray(x) for x in rng.integers(0, 256, (256, 8, 8, 3), dtype=np.uint8)]
    few = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in few])
    n = train + valid
    images, rows = few[np.arange(n) % len(few)], np.arange(n)
    classes = tuple("0123456789")
    return ImageTable("noise", classes, images, rows % 10, rows < train, rows, CIFAR10_STATS)


class AlbumentationsTransform(Transform):
    """As fastai's tutorial on albumentations writes it (docs.fast.ai/tutorial.albumentations)."""

    split_idx = 0

    def __init__(self, transforms):
        self.transforms = transforms

    def encodes(self, img: PILImage):
        return PILImage.create(self.transforms(image=np.array(img))["image"])


def documented(table: ImageTable, transforms, workers: int, device, folder: Path | None = None) -> DataLoaders:
    """fastai's way: a PIL image an item, albumentations in an item transform. With `folder`, from PNG files in it."""
    items = [table[i] for i in range(len(table))]
    if folder is not None:
        files = [folder / f"{i}.png" for i in range(len(table))]
        for item, file in zip(items, files, strict=True):
            Image.fromarray(item.image).save(file)
        items = [Item(file, item.label) for file, item in zip(files, items, strict=True)]
    train, valid = np.flatnonzero(table.is_train).tolist(), np.flatnonzero(~table.is_train).tolist()
    return DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=AttrGetter("image"),
        get_y=AttrGetter("label"),
        splitter=lambda _: (train, valid),
        item_tfms=AlbumentationsTransform(transforms),
        batch_tfms=Normalize.from_stats(*CIFAR10_STATS, cuda=False),
    ).dataloaders(items, bs=BS, num_workers=workers, device=device)


class PILImages(torch.utils.data.Dataset):
    """PIL images in memory and their labels, through a torchvision pipeline."""

    def __init__(self, table: ImageTable, transform):
        images, self.labels = table.batch(np.flatnonzero(table.is_train))
        self.images, self.transform = [Image.fromarray(image) for image in images], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.labels[i]


def torchvision_loader(table: ImageTable, workers: int, *extra, pin: bool = False) -> torch.utils.data.DataLoader:
    """The pipeline of most examples: pad and crop, flip, to floats, normalise; `extra` transforms come last."""
    usual = [T.RandomCrop(32, 4, padding_mode="reflect"), T.RandomHorizontalFlip(), T.ToTensor()]
    dataset = PILImages(table, T.Compose([*usual, T.Normalize(*CIFAR10_STATS), *extra]))
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin}
    return torch.utils.data.DataLoader(dataset, BS, shuffle=True, drop_last=True, **options)


def erasing() -> T.RandomErasing:
    """torchvision's cutout: a square of a sixteenth of the image."""
    return T.RandomErasing(1.0, scale=(1 / 16, 1 / 16), ratio=(1, 1))
