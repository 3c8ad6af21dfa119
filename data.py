"""How images become fastai `DataLoaders`: a `DataBlock` over an `ImageTable`, and a loader of whole batches."""

import io
import os
import signal
import weakref
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import fastai.vision.data  # noqa: F401  tells show_batch how to draw images
import numpy as np
import torch
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import AttrGetter, IntToFloatTensor, Normalize, ToTensor
from fastai.torch_core import TensorCategory, TensorImage, default_device, to_detach, to_device
from fastai.vision.core import PILImage
from PIL import Image
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from aug import KeyedAugment, train_transforms
from errors import InputError
from images.decoding import SIZE, to_rgb
from images.sources import load_images
from images.table import ImageTable

VALID = ("test", "holdout")
HOLDOUT = 0.1  # of each class of the training set


def rgb_image(o: str | Path | bytes | np.ndarray | Image.Image) -> PILImage:
    """A path, bytes, PIL image of any mode or uint8 array (H, W) or (H, W, 1, 3 or 4) → 32x32 RGB `PILImage`."""
    if isinstance(o, np.ndarray) and o.ndim == 3 and o.shape[2] == 1:
        o = o[..., 0]
    if isinstance(o, str | Path | bytes):
        o = Image.open(io.BytesIO(o) if isinstance(o, bytes) else o)  # fastai would make RGB of it, and 16 bits white
    return PILImage.create(to_rgb(o if isinstance(o, Image.Image) else PILImage.create(o)))


class _Workers(_MultiProcessingDataLoaderIter):
    """Worker processes that only their owner stops: a forked process has a copy of this too, and drops it some time."""

    def __init__(self, loader):
        self.owner = os.getpid()
        super().__init__(loader)

    def _shutdown_workers(self):
        if os.getpid() == self.owner:
            super()._shutdown_workers()


class KeyedDL(TfmdDL):
    """A `TfmdDL` that builds a whole uint8 batch of an `ImageTable` in one go; floats are made on the device.

    With a `seed`, order and augmentation depend on (seed, epoch, position) alone. `epoch` counts how often the loader
    has been iterated; set it to repeat an epoch. With `keep_workers`, which needs a seed and a table, the worker
    processes live as long as the loader: what is changed in it after the first epoch does not reach them. Items from
    elsewhere (`test_dl`, `predict`) take fastai's usual way through the item transforms, which the table's images,
    decoded to size beforehand, do not need.
    """

    def __init__(
        self,
        dataset,
        *args,
        seed: int | None = None,
        augment: "KeyedAugment | None" = None,
        keep_workers: bool = False,
        **kwargs,
    ):
        self.seed, self.augment, self.keep_workers, self._workers = seed, augment, keep_workers, None
        self._rooms = None
        # The epoch; the epoch and batch to begin at; which share of the batches is this process's, of how many. Workers
        # that are kept read them here.
        self._place = torch.tensor([-1, -1, 0, 0, 1]).share_memory_()
        super().__init__(dataset, *args, persistent_workers=keep_workers, **kwargs)
        # torch draws a seed for its workers whenever it starts some: not from the generator that training draws from.
        self.fake_l.generator = torch.Generator()

    @property
    def epoch(self) -> int:
        return int(self._place[0])

    @epoch.setter
    def epoch(self, epoch: int):
        self._place[0] = epoch

    def begin_at(self, epoch: int, batch: int):
        """Iterate over `epoch` next, and leave out what comes before `batch`."""
        self._place[:3] = torch.tensor([epoch - 1, epoch, batch])

    def deal(self, rank: int, size: int):
        """Take share `rank` of every batch, of `size` shares; the others are for other processes.

        No image is in two shares or in none; where a batch has fewer images than there are shares, some go without.
        """
        self._place[3:] = torch.tensor([rank, size])

    def __getstate__(self):
        return {**self.__dict__, "_workers": None}

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is None:  # the same images with other settings; another data set is not augmented
            kwargs = {"seed": self.seed, "augment": self.augment, **kwargs}
        return super().new(dataset, cls, **kwargs)

    def wif(self):
        """fastai's hook, called in every worker as it starts: a stop is for the process that trains to hear."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def before_iter(self):
        super().before_iter()
        self.epoch += 1

    def __iter__(self):
        if not (self.keep_workers and self.fake_l.num_workers):
            yield from super().__iter__()
            return
        # What fastai's loader does, but for starting new workers every time
        self.before_iter()
        if self._workers is None:
            # Shared memory for the batches that a worker has ready or under way, and for the one that is being taken.
            # To make and map some for every batch, as torch does, costs more than to fill it.
            rooms = (self.fake_l.num_workers, self.fake_l.prefetch_factor + 1)
            self._rooms = torch.empty((*rooms, self.bs, SIZE, SIZE, 3), dtype=torch.uint8).share_memory_()
            self.fake_l.pin_memory = False  # torch would pin what the workers send; it is pinned below
            self._workers = _Workers(self.fake_l)
            # They stop when the loader goes. Garbage collection alone would close their queues first and then wait five
            # seconds for each; a finalizer has them whole, if they do not hold the loader in turn.
            self._workers._dataset = self._workers._collate_fn = None
            weakref.finalize(self, self._workers._shutdown_workers)
        else:
            self._workers._reset(self.fake_l)
        for room, n, *labels in self._workers:
            batch = _typed(self._rooms[room][:n], *labels)
            batch = tuple(t.pin_memory() if self.pin_memory else t.clone() for t in batch)  # the room is filled again
            yield self.after_batch(to_device(batch, self.device, non_blocking=self.pin_memory))
        self.after_iter()

    def sample(self):
        if not isinstance(self.dataset.items, ImageTable):
            return super().sample()
        # A kept worker finds the order of the epoch for itself, as it is keyed; another one is fastai's, drawn before.
        indices = self._DataLoader__idxs if self.seed is None else self.get_idxs()
        return (indices[position] for batch in self._batches() for position in batch)

    def _batches(self) -> Iterator[range]:
        """Where the images of this worker's batches stand in the epoch: fastai deals them to the workers in turn."""
        epoch, begun, batch, rank, size = self._place.tolist()
        first = batch if epoch == begun else 0
        for start in range((first + self.offs) * self.bs, self.n, self.num_workers * self.bs):
            n = min(self.bs, self.n - start)
            share = range(start + n * rank // size, start + n * (rank + 1) // size)
            if share and not (self.drop_last and n < self.bs):
                yield share

    def get_idxs(self):
        if self.seed is None:
            return super().get_idxs()
        # As an array: fastai's lists of numbers take five times the room, in every process.
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.n) if self.shuffle else np.arange(self.n)

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        """fastai's hook: the metrics' sums (single numbers) stay on the device, so that no batch waits for it.

        Nor for other processes: `distributed.all_ranks` adds them up at the end.
        """
        return to_detach(b, cpu and getattr(b, "ndim", None) != 0, gather=False)

    def show_results(self, *args, **kwargs):
        import fastai.vision.learner  # noqa: F401  tells fastai how to draw images with predictions; takes seconds

        return super().show_results(*args, **kwargs)

    def create_batches(self, samps) -> Iterator[tuple]:
        table = self.dataset.items
        if not isinstance(table, ImageTable):
            yield from super().create_batches(samps)
            return
        rooms = cycle(range(self._rooms.shape[1])) if self.keep_workers and get_worker_info() else None
        for positions in self._batches():
            indices = list(islice(samps, len(positions)))
            images, *labels = table.batch(indices)[: len(self.dataset.tls)]  # a test set has no labels
            if self.augment is not None:
                images = self.augment(images, self.epoch, positions)
            x = torch.from_numpy(images)
            if rooms:
                room = self.offs, next(rooms)
                self._rooms[room][: len(x)] = x
                yield room, len(x), *labels
            else:
                yield _typed(x, *labels)


def _typed(x: torch.Tensor, *labels: np.ndarray) -> tuple:
    """fastai's tensors for uint8 (n, H, W, C) and n labels: the first is a view, (n, C, H, W)."""
    return TensorImage(x.permute(0, 3, 1, 2)), *(TensorCategory(torch.from_numpy(y)) for y in labels)


def get_dls(
    source: str | Path | ImageTable = "cifar10",
    bs: int = 512,
    seed: int = 0,
    workers: int | None = None,
    valid: str = "test",
    device: str | torch.device | None = None,
    **augmentation,
) -> DataLoaders:
    """Training and validation loaders of (N, 3, 32, 32) normalised floats and N labels.

    `valid` "test" validates on the test set; "holdout" on a tenth of each class of the training set, chosen by `seed`.
    `workers` is the number of loader processes (default: one a core up to 8 for a GPU, 0 where the CPU also trains; the
    processes of one training share a machine's cores),
    `augmentation` goes to `aug.train_transforms`. Sources are those of `sources.load_images`. Raises InputError.
    """
    if valid not in VALID:
        raise InputError(f"valid is {valid!r}: it must be one of {', '.join(VALID)}")
    for name, value, least in (("bs", bs, 2), ("seed", seed, 0), ("workers", 0 if workers is None else workers, 0)):
        if value < least or value >= 2**32:
            raise InputError(f"{name} is {value}: it must be at least {least} and below 2**32")
    device = default_device() if device is None else torch.device(device)
    if workers is None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = 0 if device.type == "cpu" else min(8, max(1, cores))
    table = load_images(source)
    train, held_out = _split(table, valid, seed)
    if bs > len(train):
        raise InputError(f"bs is {bs}, but there are {len(train)} training images; use --bs {len(train)} or less")
    mean, std = table.train_stats()
    if min(std) == 0:
        raise InputError(f"{table.name}: a colour channel has one value in all images; there is nothing to learn from")
    augmentation = {"fill": [round(255 * m) for m in mean], **augmentation}
    block = DataBlock(
        blocks=(
            TransformBlock(type_tfms=rgb_image, item_tfms=ToTensor, batch_tfms=IntToFloatTensor),
            CategoryBlock(vocab=list(table.classes), sort=False),
        ),
        get_x=AttrGetter("image"),
        get_y=AttrGetter("label"),
        splitter=lambda _: (train, held_out),
        batch_tfms=Normalize.from_stats(mean, std, cuda=False),
        dl_type=KeyedDL,
    )
    train_kwargs = {"seed": seed, "augment": KeyedAugment(train_transforms(**augmentation), seed), "keep_workers": True}
    valid_kwargs = {"num_workers": 0}  # a validation batch is a copy out of the table, cheaper than passing it on
    pin = device.type == "cuda"
    dl_kwargs = [{"num_workers": workers, **train_kwargs}, valid_kwargs]
    return block.dataloaders(table, bs=bs, device=device, pin_memory=pin, dl_kwargs=dl_kwargs)


def _split(table: ImageTable, valid: str, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train and to validate on."""
    if valid == "test":
        return np.flatnonzero(table.is_train).tolist(), np.flatnonzero(~table.is_train).tolist()
    held_out = []
    for label, name in enumerate(table.classes):
        rows = np.flatnonzero(table.is_train & (table.labels == label))
        if len(rows) < 2:
            raise InputError(f"{table.name}: class {name!r} has one training image; a hold-out needs at least two")
        held_out.append(np.random.default_rng([seed, label]).permutation(rows)[: max(1, round(HOLDOUT * len(rows)))])
    held_out = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.flatnonzero(table.is_train), held_out).tolist(), held_out.tolist()
