"""Several processes train one network: torch's `DistributedDataParallel`, with our loader's way to deal out a batch.

`torchrun` or `accelerate launch` starts the processes and numbers them, their ranks. Each has its share of every batch;
gradients are averaged over all. Rank 0 alone prints, and reads and writes the run's folder.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import num_distrib, rank_distrib
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import InputError


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher has started, if it has, for as long as this lasts; silence all but rank 0.

    Raises InputError where they cannot be joined.
    """
    if num_distrib() <= 1 or dist.is_initialized():
        yield
        return
    try:  # what stays on the CPU goes through gloo, so that no process waits for its GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as e:
        raise InputError(f"WORLD_SIZE is {num_distrib()}, but the processes do not find each other: {e}") from e
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank_distrib() else nullcontext():
            yield
    finally:
        dist.destroy_process_group()


def on_rank0(func: Callable, *args) -> Any:
    """What `func(*args)` returns on rank 0, where alone it is called, or its InputError or OSError; all wait for it."""
    if num_distrib() <= 1:
        return func(*args)
    answer = [None, None]
    if rank_distrib() == 0:
        try:
            answer[0] = func(*args)
        except (InputError, OSError) as e:
            answer[1] = e
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[1]:
        raise answer[1]
    return answer[0]


def is_rank0() -> bool:
    """Whether this is the process that writes and prints; the others help with the training, and no more."""
    return rank_distrib() == 0


def in_turns(func: Callable) -> Any:
    """What `func()` returns here. Rank 0 calls it first, then the first process of each machine, then the others.

    So what it keeps on a disk is made once, be the disk shared or not. An InputError of one ends all.
    """
    if num_distrib() <= 1:
        return func()
    own_turn = 0 if rank_distrib() == 0 else 1 if int(os.environ["LOCAL_RANK"]) == 0 else 2
    error = None
    for turn in range(3):
        if turn == own_turn:
            try:
                result = func()
            except InputError as e:
                error = e
        failed = total(torch.tensor(error is not None, dtype=torch.uint8))  # nobody gets past this before all are here
        if failed:
            raise error or InputError("another process of this training has failed, its own error is above")
    return result


@contextmanager
def own_folder(run: Path) -> Iterator[Path]:
    """`run` for rank 0; for others a folder that goes away, for what fastai writes in every process."""
    if rank_distrib() == 0:
        yield run
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def total(t: Tensor) -> Tensor:
    """The sum of `t` over all processes."""
    if num_distrib() > 1:
        t = t.clone()
        dist.all_reduce(t)
    return t


def highest(number: int) -> int:
    """The highest number that any process names; each waits for all."""
    if num_distrib() <= 1:
        return number
    named = torch.tensor(number)
    dist.all_reduce(named, dist.ReduceOp.MAX)
    return int(named)


def same_buffers(model: nn.Module) -> None:
    """Give all processes rank 0's buffers: batch norm's statistics."""
    for buffer in model.buffers() if num_distrib() > 1 else ():
        dist.broadcast(buffer, 0)


class AllRanks(Callback):
    """Wraps the network in torch's `DistributedDataParallel`, deals out the batches, and adds up what is measured.

    fastai's `DistributedTrainer` has Accelerate do the first, which does more than that where its environment variables
    say so: mixed precision of its own, in a wrapper that no file can hold.
    """

    order = 11  # that of fastai's

    def __init__(self, sync_bn: bool):
        self.sync_bn = sync_bn

    def before_fit(self):
        self.norms = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        network = nn.SyncBatchNorm.convert_sync_batchnorm(self.model) if self.sync_bn else self.model
        self.learn.model = self.wrapped = DistributedDataParallel(network)
        self.wrapped.broadcast_buffers = False  # those of batch norm, at every forward pass
        for dl in self.dls.loaders:
            dl.deal(rank_distrib(), num_distrib())

    def after_backward(self):
        # What ends a training early has to be the same everywhere. All have just waited for each other's gradients.
        self.learn.loss = total(self.loss.detach()) / num_distrib()

    def before_validate(self):
        # Without the wrapper, as no two processes need have the same number of batches to test on
        self.learn.model = self.wrapped.module
        same_buffers(self.model)

    def after_validate(self):
        self.learn.model = self.wrapped
        for metric in [self.recorder.loss, *self.learn.metrics]:
            sums = [torch.as_tensor(s, device=self.dls.device) for s in (metric.total, metric.count)]
            metric.total, metric.count = total(torch.stack([s.float().as_subclass(Tensor) for s in sums]))

    def after_fit(self):
        self.learn.model = self.wrapped.module
        for name, norm in self.norms if self.sync_bn else ():
            self.model.set_submodule(name, norm)  # the network as it was: their weights are the same tensors
        for dl in self.dls.loaders:
            dl.deal(0, 1)


@contextmanager
def all_ranks(learn: Learner, sync_bn: bool = False) -> Iterator[None]:
    """Within this, `learn` trains in all processes as one; losses and metrics are those of all.

    Batch norm is each process's own, as of a smaller batch, unless `sync_bn`, which torch has for GPUs alone. After a
    training rank 0's statistics count.
    """
    if num_distrib() <= 1:
        yield
        return
    with learn.added_cbs(AllRanks(sync_bn)):
        yield
