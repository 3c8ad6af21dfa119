"""The loader: whole batches of an `ImageTable`, augmented with keyed randomness, with or without worker processes."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, starmap

import numpy as np
import torch
from fastai.data.core import TfmdDL
from fastai.data.transforms import ToTensor
from fastai.torch_core import TensorCategory, TensorImage, to_detach, to_device
from fastai.vision.core import PILImage
from fasttransform import Transform

from images.table import ImageTable
from workers import Key, Workers

APART = 2**32  # epochs from here on are never trained on
HOOKS = ("create_item", "do_batch", "create_batch", "retain")  # functions that fastai lets a user replace


class Augment(Transform):
    """Augmentation of training images as a fastai item transform; `KeyedDL` gives its `pipeline` whole batches instead.

    pipeline: uint8 (n, 32, 32, 3), an epoch, n positions in it and n rows of the table → the same shape.
    key: (epoch, position, row) of the current item. Other loaders set none, and the key is then drawn at random.
    """

    split_idx = 0

    def __init__(self, pipeline: Callable[[np.ndarray, int, Sequence[int], Sequence[int]], np.ndarray]):
        self.pipeline, self.key = pipeline, None

    def encodes(self, image: PILImage):
        epoch, position, row = self.key or (random.getrandbits(32) for _ in range(3))
        return PILImage.create(self.pipeline(np.asarray(image)[None], epoch, [position], [row])[0])


class Batches:
    """Builds a loader's batches by key: an epoch, positions in it, and the rows of the `ImageTable` at these."""

    def __init__(self, loader: "KeyedDL"):
        self.dataset, self.seed, self.steps = loader.dataset, loader.seed or 0, _steps(loader)
        self.augments = [t for t in self.steps if isinstance(t, Augment) and t.split_idx == self.dataset.split_idx]
        self.by_item = None
        if not all(isinstance(t, Augment | ToTensor) for t in self.steps):
            with _generators_kept():  # a new loader draws its seed from Python's generator
                self.by_item = TfmdDL.new(loader, cls=TfmdDL, num_workers=0)
            self.by_item.before_iter()  # tells its pipelines whether these are training images, by split_idx

    def suits(self, loader: "KeyedDL") -> bool:
        """Whether the loader still has the transforms and functions that this was made with."""
        return self.steps == _steps(loader)

    def build(self, epoch: int, positions: range, rows: np.ndarray) -> tuple:
        """uint8 (n, 3, 32, 32) and n labels as fastai's tensors, or what the user's item transforms make of them."""
        if self.by_item is not None:
            with _generators_kept():
                items = [self._item(epoch, *place) for place in zip(positions, rows.tolist(), strict=True)]
            return self.by_item.do_batch([item for item in items if item is not None])  # a transform may skip an item
        images, *labels = self.dataset.items.batch(rows)[: len(self.dataset.tls)]  # a test set has no labels
        for augment in self.augments:
            images = augment.pipeline(images, epoch, positions, rows)
        return _typed(torch.from_numpy(images), *labels)

    def _item(self, epoch: int, position: int, row: int) -> tuple | None:
        random.seed(f"{self.seed} {epoch} {position}")  # so that other transforms' draws are keyed, too
        np.random.seed(random.getrandbits(32))
        torch.default_generator.manual_seed(random.getrandbits(32))
        with _keyed(self.augments, epoch, position, row):
            return self.by_item.do_item(row)


class KeyedDL(TfmdDL):
    """A `TfmdDL` that builds whole uint8 batches of an `ImageTable`, and makes floats of them on the device.

    With a `seed`, order and augmentation depend on (seed, epoch, position) alone. `epoch` counts how often the loader
    has been iterated; set it to repeat an epoch. With transforms or functions of the user's own it builds batches item
    by item, as fastai does, with the same keys. Items that are not an `ImageTable` (`test_dl`, `predict`) go fastai's
    usual way.
    """

    def __init__(self, dataset, *args, seed: int | None = None, **kwargs):
        self.seed, self.epoch, self._workers, self.looks = seed, -1, None, 0
        self.first, self.share = (-1, 0), (0, 1)  # (epoch, batch) to begin at; (which, of how many) of every batch
        super().__init__(dataset, *args, **kwargs)
        if seed is None:  # every new loader, as `tta` makes for each of its draws, augments differently
            self.epoch = self.rng.getrandbits(32)

    def begin_at(self, epoch: int, batch: int):
        """Iterate over `epoch` next, starting at `batch`."""
        self.epoch, self.first = epoch - 1, (epoch, batch)

    def deal(self, rank: int, size: int):
        """Take share `rank` of `size` of every batch, one share for each process.

        Every image is in exactly one share; if a batch has fewer images than there are shares, some are empty.
        """
        self.share = rank, size

    @property
    def share_size(self) -> int:
        """The largest number of images in this process's share of a batch."""
        return -(-self.bs // self.share[1])

    def __getstate__(self):
        return {**self.__dict__, "_workers": None}

    def new(self, dataset=None, cls=None, **kwargs):
        if dataset is None and issubclass(cls or KeyedDL, KeyedDL):  # other classes take no seed
            # Given an order, as by `get_preds`, it is not for training: then every pass draws anew.
            kwargs = {"seed": None if "get_idxs" in kwargs else self.seed, **kwargs}
        elif dataset is not None and not len(dataset):  # of `learn.export`: the file should not need the augmentation
            kwargs = {"after_item": [t for t in self.after_item.fs if not isinstance(t, Augment)], **kwargs}
        return super().new(dataset, cls, **kwargs)

    def one_batch(self):
        """A batch to look at, of an epoch that is never trained on: looking changes nothing about the training."""
        epoch, self.epoch, self.looks = self.epoch, APART + self.looks, self.looks + 1
        try:
            return super().one_batch()
        finally:
            self.epoch = epoch

    def do_item(self, s):
        # Items that are not in an `ImageTable` come here; of these, only `tta`'s are augmented.
        with _keyed(self.after_item.fs, max(self.epoch, 0), s or 0, s or 0):
            return super().do_item(s)

    def before_iter(self):
        super().before_iter()
        self.epoch += 1
        # Pinned memory needs a GPU, and a loader from a file may have come to a machine without one.
        on_gpu = self.device is not None and torch.device(self.device).type == "cuda"
        self.pin_memory = self.fake_l.pin_memory = on_gpu

    def __iter__(self):
        if not isinstance(getattr(self.dataset, "items", None), ImageTable):
            yield from super().__iter__()
            return
        self.randomize()
        self.before_iter()
        in_workers = self.fake_l.num_workers > 0
        for batch in self._from_workers() if in_workers else starmap(Batches(self).build, self._keys(self.epoch)):
            if self.pin_memory:
                batch = tuple(t.pin_memory() for t in batch)
            yield self.after_batch(to_device(batch, self.device, non_blocking=self.pin_memory))
        self.after_iter()

    def _from_workers(self) -> Iterator[tuple]:
        workers = self._workers
        if workers is None or workers.busy or not workers.builder.suits(self) or self.share_size > workers.size:
            # The old processes stop before new ones start, unless another iteration is still using them.
            self._workers = workers = None
            workers = Workers(Batches(self), self.fake_l.num_workers, self.share_size, self.timeout)
            if self.fake_l.persistent_workers:
                self._workers = workers
        for batch in workers.take(self._keys(self.epoch)):
            if workers.builder.by_item is None:
                x, *labels = batch
                batch = _typed(x if self.pin_memory else x.clone(), *labels)  # pinning copies, too
            yield batch
        if workers is self._workers and self.seed is not None:
            workers.begin(self._keys(self.epoch + 1))  # most likely needed next; validation leaves the time for it

    def _keys(self, epoch: int) -> list[Key]:
        """The key of every batch of `epoch`, or of this process's share of each."""
        keys, (first_epoch, first), (rank, size) = [], self.first, self.share
        order = self.get_idxs() if epoch == self.epoch else self._order(epoch)
        if not isinstance(order, np.ndarray):  # fastai's; that for `show_batch(unique=True)` is endless
            order = np.fromiter(order if hasattr(order, "__len__") else islice(order, self.n), int)
        for start in range(first * self.bs if epoch == first_epoch else 0, len(order), self.bs):
            n = min(self.bs, len(order) - start)
            share = range(start + n * rank // size, start + n * (rank + 1) // size)
            if share and not (self.drop_last and n < self.bs):
                keys.append((epoch, share, order[share.start : share.stop]))
        return keys

    def get_idxs(self):
        own = self.seed is None or "shuffle_fn" in vars(self)
        return super().get_idxs() if own else self._order(max(self.epoch, 0))

    def _order(self, epoch: int) -> np.ndarray:
        # An array, as a list of numbers takes five times the memory, in every process.
        return np.random.default_rng([self.seed, epoch]).permutation(self.n) if self.shuffle else np.arange(self.n)

    def to_detach(self, b, cpu: bool = True, gather: bool = True):
        """fastai's hook: the metrics' sums (scalars) stay on the device, so that no batch waits for it.

        Nor does a batch wait for other processes: `training.distributed.all_ranks` adds the sums up after validation.
        """
        return to_detach(b, cpu and getattr(b, "ndim", None) != 0, gather=False)

    def show_results(self, *args, **kwargs):
        import fastai.vision.learner  # noqa: F401  registers how to draw predictions; takes two seconds to import

        return super().show_results(*args, **kwargs)


def _steps(loader: KeyedDL) -> list[Callable]:
    """The transforms of items, and what else a user has put on the way from a row to a batch."""
    return [*loader.after_item.fs, *loader.before_batch.fs, *(vars(loader)[n] for n in HOOKS if n in vars(loader))]


def _typed(x: torch.Tensor, *labels: np.ndarray) -> tuple:
    """uint8 (n, H, W, C) and n labels → fastai's tensors; the images become a view of shape (n, C, H, W)."""
    return TensorImage(x.permute(0, 3, 1, 2)), *(TensorCategory(torch.from_numpy(y)) for y in labels)


@contextmanager
def _keyed(transforms: Sequence[Transform], *key: int) -> Iterator[None]:
    """Within this, the augmentations among `transforms` use this key."""
    augments = [t for t in transforms if isinstance(t, Augment)]
    for t in augments:
        t.key = key
    try:
        yield
    finally:
        for t in augments:
            t.key = None


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Within this, draws from the generators of Python, numpy and torch's CPU leave no trace: they are restored."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True):
            restore(state)
