"""Worker processes that build a loader's batches ahead of time."""

import os
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from math import prod
from typing import Protocol

import numpy as np
import torch
from fastcore.basics import noop
from torch.utils.data import DataLoader, Dataset

from errors import InputError
from images.decoding import SIZE
from interrupts import NAMES

AHEAD = 2  # batches that a worker process has ready or under way
# A forked process has copies of its parent's iterators. They are kept here for good: torch would stop the parent's
# workers when a copy is deleted.
COPIES = []
warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores, if asked for

Key = tuple[int, range, np.ndarray]  # of a batch: an epoch, positions in it, rows of the table


class Builder(Protocol):
    """Builds a batch from its key: uint8 (n, 3, 32, 32) and n labels, or anything if `by_item` is not None."""

    by_item: object

    def build(self, epoch: int, positions: range, rows: np.ndarray) -> tuple: ...


class SharedBatches(Dataset):
    """Batches whose pixels are written to shared memory, into the buffer whose number comes with the key.

    Allocating and mapping shared memory for every batch, as torch does, costs more than filling it.
    """

    def __init__(self, builder: Builder, buffers: torch.Tensor):
        self.builder, self.buffers = builder, buffers

    def __getitem__(self, request: tuple[int, Key]) -> tuple:
        buffer, key = request
        batch = x, *labels = self.builder.build(*key)
        if self.builder.by_item is not None:
            return batch
        self.buffers[buffer, : len(x)] = x.permute(0, 2, 3, 1)
        return buffer, len(x), *(y.numpy() for y in labels)


class Workers:
    """`n` processes that build batches of at most `size` images. They end when this object is garbage."""

    def __init__(self, builder: Builder, n: int, size: int, timeout: float):
        self.builder, self.begun, self.busy = builder, None, False
        self.buffers = _shared(AHEAD * n + 1, size, SIZE, SIZE, 3)  # one more, for the batch that is being read
        options = {"num_workers": n, "prefetch_factor": AHEAD, "persistent_workers": True, "timeout": timeout}
        options |= {"collate_fn": noop, "worker_init_fn": partial(begin_worker, os.getpid())}
        options["generator"] = torch.Generator()  # the workers' seeds must not come from the training's generator
        if sys.platform == "linux":  # from Python 3.14 on, others would be the default, which copy all images
            options["multiprocessing_context"] = "fork"
        # `begin` puts an epoch's keys into the sampler, a list.
        self.loader = DataLoader(SharedBatches(builder, self.buffers), batch_size=None, sampler=[], **options)
        # Garbage collection alone would close the queues first, and then wait five seconds for each process. The
        # finalizer keeps the iterator whole until this object goes; nothing that it holds refers to this object.
        weakref.finalize(self, _stop, iter(self.loader), os.getpid())

    @property
    def size(self) -> int:
        """The largest batch that fits into a buffer."""
        return self.buffers.shape[1]

    def begin(self, keys: list[Key]) -> None:
        """Let the processes start on these batches; `take` then yields them."""
        self.loader.sampler[:] = zip(cycle(range(len(self.buffers))), keys)
        self.begun = keys, iter(self.loader)

    def take(self, keys: list[Key]) -> Iterator[tuple]:
        """The batches of these keys: uint8 (n, 32, 32, 3), valid until the next one is taken, and n labels.

        If the builder goes item by item, whatever it builds.
        """
        if self.begun is None or not _equal(self.begun[0], keys):
            self.begin(keys)
        (_, running), self.begun, self.busy = self.begun, None, True
        try:
            for batch in running:
                if self.builder.by_item is None:
                    buffer, n, *labels = batch
                    batch = self.buffers[buffer, :n], *labels
                yield batch
        finally:
            self.busy = False


def _equal(keys: list[Key], others: list[Key]) -> bool:
    """Whether two lists of keys are the same."""
    pairs = zip(keys, others, strict=False)
    return len(keys) == len(others) and all(a[:2] == b[:2] and np.array_equal(a[2], b[2]) for a, b in pairs)


def _shared(*shape: int) -> torch.Tensor:
    """A uint8 tensor of this shape in shared memory. Raises InputError if there is not enough."""
    try:
        return torch.empty(shape, dtype=torch.uint8).share_memory_()
    except RuntimeError as e:
        if "shared memory" not in str(e):
            raise
        need = f"the loader's processes share {prod(shape) / 1e6:,.0f} MB, for which /dev/shm has no room"
        raise InputError(f"{need}; give a container more (docker run --shm-size 1g), or pass fewer --workers") from e


def begin_worker(owner: int, worker: int):
    """Start of a worker process: ignore signals, which are for the training process, and end together with that."""
    for number in NAMES:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()


def _end_with(owner: int):
    """End this process when its parent has ended. torch's own check misses a parent that ends very early."""
    while os.getppid() == owner:
        time.sleep(1)
    os._exit(1)


def _stop(running: Iterator, owner: int):
    """End the processes of torch's iterator, unless it is a copy in a forked process."""
    if os.getpid() == owner:
        running._shutdown_workers()
    else:
        COPIES.append(running)
