"""How images become fastai `DataLoaders`: a `DataBlock` over an `ImageTable`."""

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fastai.vision.data  # noqa: F401  tells show_batch how to draw images
import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import IntToFloatTensor, Normalize, ToTensor, parent_label
from fastai.torch_core import default_device
from fastai.vision.core import PILImage
from fastcore.basics import num_cpus
from fasttransform import ItemTransform
from PIL import Image

from aug import KeyedAugment, train_transforms
from errors import InputError
from images.decoding import to_rgb
from images.sources import load_images
from images.table import ImageTable
from loader import Augment, KeyedDL
from recipes import FLIPS
from trained.learner_file import carry_our_code

VALID = ("test", "holdout")


def picture(o: list | tuple):
    """A row of the table, or an (image, class) pair → the image."""
    return o[0]


def label(o: list | tuple | str | Path):
    """A row of the table, or an (image, class) pair → the class; a file → the name of its folder."""
    return parent_label(o) if isinstance(o, str | Path) else o[1]


def whole(function: Callable) -> ItemTransform:
    """`function` as a transform that is given a pair whole, where fastai would call it on each of the two."""
    transform = ItemTransform(function)
    transform._retain = False
    return transform


def rgb_image(o: str | Path | bytes | np.ndarray | Image.Image | torch.Tensor) -> PILImage:
    """A path, bytes, PIL image of any mode, uint8 array (H, W) or (H, W, 1, 3 or 4), or uint8 `TensorImage` (3, H, W)
    → 32x32 RGB `PILImage`.
    """
    if isinstance(o, np.ndarray) and o.ndim == 3 and o.shape[2] == 1:
        o = o[..., 0]
    if isinstance(o, str | Path | bytes):
        o = Image.open(io.BytesIO(o) if isinstance(o, bytes) else o)  # fastai's conversion turns 16-bit images white
    return PILImage.create(to_rgb(o if isinstance(o, Image.Image) else PILImage.create(o)))


def get_dls(
    source: str | Path | ImageTable = "cifar10",
    bs: int = 512,
    seed: int = 0,
    workers: int | None = None,
    valid: str = "test",
    device: str | torch.device | None = None,
    valid_pct: float = 0.1,
    flips: str = "random",
    **augmentation,
) -> DataLoaders:
    """Training and validation loaders of (N, 3, 32, 32) normalised floats and N labels.

    `source` is anything that `images.sources.load_images` reads. `valid` "test" validates on the test set, "holdout" on
    a fraction `valid_pct` of each class of the training set, chosen by `seed`. `workers` is the number of loader
    processes (default: for a GPU one a core, at most 8 in each process of a run, which share the machine's cores; 0
    where the CPU trains). `flips` "alternating" flips every image in every other epoch, unless `flip` is 0.
    `augmentation` goes to `aug.train_transforms`. Raises InputError for a value out of range, and for unusable images.
    """
    for name, value, known in (("valid", valid, VALID), ("flips", flips, FLIPS)):
        if value not in known:
            raise InputError(f"{name} is {value!r}: it must be one of {', '.join(known)}")
    for name, value, least in (("bs", bs, 2), ("seed", seed, 0), ("workers", 0 if workers is None else workers, 0)):
        if value < least or value >= 2**32:
            raise InputError(f"{name} is {value}: it must be at least {least} and below 2**32")
    if workers is not None and workers > (most := max(32, 4 * num_cpus())):
        raise InputError(f"workers is {workers}: each is a process; at most {most} make sense here")
    if not 0 < valid_pct < 1:
        raise InputError(f"valid_pct is {valid_pct}: it must be above 0 and below 1")
    carry_our_code()  # for whoever exports a learner of their own with these loaders
    device = default_device() if device is None else torch.device(device)
    if workers is None:
        cores = num_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if device.type == "cpu" else min(8, max(1, cores))
    table = load_images(source)
    train, held_out = _split(table, valid, valid_pct, seed)
    if bs > len(train):
        raise InputError(f"bs is {bs}, but there are {len(train)} training images; use --bs {len(train)} or less")
    mean, std = table.train_stats()
    if min(std) == 0:
        raise InputError(f"{table.name}: a colour channel has one value in all images; there is nothing to learn from")
    table = replace(table, stats=(mean, std))  # else a view of the training images alone would compute its own
    augmentation = {"fill": [round(255 * m) for m in mean], **augmentation}
    alternating = flips == "alternating" and augmentation.get("flip", 1) > 0
    if alternating:
        augmentation["flip"] = 0  # `KeyedAugment` flips before all else, and not by chance
    block = DataBlock(
        blocks=(
            TransformBlock(type_tfms=rgb_image, item_tfms=ToTensor, batch_tfms=IntToFloatTensor),
            CategoryBlock(vocab=list(table.classes), sort=False),
        ),
        get_x=whole(picture),
        get_y=whole(label),
        splitter=lambda _: (train, held_out),
        item_tfms=Augment(KeyedAugment(train_transforms(**augmentation), seed, alternating)),
        batch_tfms=Normalize.from_stats(mean, std, cuda=False),
        dl_type=KeyedDL,
    )
    train_kwargs = {"num_workers": workers, "seed": seed, "persistent_workers": True}
    valid_kwargs = {"num_workers": 0}  # a validation batch is a copy out of the table, cheaper than a worker
    return block.dataloaders(table, bs=bs, device=device, dl_kwargs=[train_kwargs, valid_kwargs])


def _split(table: ImageTable, valid: str, valid_pct: float, seed: int) -> tuple[list[int], list[int]]:
    """The rows to train on, and those to validate on."""
    if valid == "test":
        return np.flatnonzero(table.is_train).tolist(), np.flatnonzero(~table.is_train).tolist()
    held_out = []
    for label, name in enumerate(table.classes):
        rows = np.flatnonzero(table.is_train & (table.labels == label))
        if len(rows) < 2:
            raise InputError(f"{table.name}: class {name!r} has one training image; a hold-out needs at least two")
        n = min(max(1, round(valid_pct * len(rows))), len(rows) - 1)
        held_out.append(np.random.default_rng([seed, label]).permutation(rows)[:n])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.flatnonzero(table.is_train), held_out).tolist(), held_out.tolist()
