"""Several processes train one network: torch's `DistributedDataParallel`, and our loader, which shards every batch.

`torchrun` or `accelerate launch` starts the processes and gives each its rank. Every process trains on its share of
each batch; gradients are averaged over all. Only rank 0 prints, and reads and writes the run's folder.
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

from errors import InputError, Stopped


@contextmanager
def joined() -> Iterator[None]:
    """Within this, the processes of a launcher, if there is one, form a group, and only rank 0 prints.

    Raises InputError if they cannot reach each other.
    """
    if num_distrib() <= 1 or dist.is_initialized():
        yield
        return
    try:  # tensors on the CPU go through gloo, so that no process waits for its GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as e:
        raise InputError(f"WORLD_SIZE is {num_distrib()}, but the processes do not find each other: {e}") from e
    in_step = False
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank_distrib() else nullcontext():
            yield
        in_step = True
    except (InputError, Stopped) as e:
        in_step = e.__cause__ is None  # all processes raise it; one with a cause explains a fault in this one
        raise
    finally:
        if in_step:  # else NCCL would wait here for a process that is gone, and nothing would be said
            dist.destroy_process_group()


def on_rank0(func: Callable, *args) -> Any:
    """Call `func(*args)` on rank 0 alone; all processes return its result, or raise its InputError or OSError."""
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
    """Whether this is the process that writes and prints."""
    return rank_distrib() == 0


def in_turns(func: Callable) -> Any:
    """Call `func()` in every process: first on rank 0, then in the first process of each machine, then in the others.

    Returns its result. A file that it caches is written once, on a shared disk as well as on each machine's own. An
    InputError in one process ends all.
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
        failed = total(torch.tensor(error is not None, dtype=torch.uint8))  # a barrier, too
        if failed:
            raise error or InputError("another process of this training has failed, its own error is above")
    return result


@contextmanager
def own_folder(run: Path) -> Iterator[Path]:
    """`run` for rank 0, a temporary folder for the others, as fastai writes files in every process."""
    if rank_distrib() == 0:
        yield run
        return
    with TemporaryDirectory() as folder:
        yield Path(folder)


def total(t: Tensor) -> Tensor:
    """The sum of `t` over all processes, for each of them."""
    if num_distrib() > 1:
        t = t.clone()
        dist.all_reduce(t)
    return t


def highest(number: int) -> int:
    """The maximum of `number` over all processes."""
    if num_distrib() <= 1:
        return number
    named = torch.tensor(number)
    dist.all_reduce(named, dist.ReduceOp.MAX)
    return int(named)


def same_buffers(model: nn.Module) -> None:
    """Give all processes rank 0's buffers, the statistics of batch norm."""
    for buffer in model.buffers() if num_distrib() > 1 else ():
        dist.broadcast(buffer, 0)


class AllRanks(Callback):
    """Wraps the network in torch's `DistributedDataParallel`, shards the batches, and adds up losses and metrics.

    fastai's `DistributedTrainer` leaves the first to Accelerate, whose environment variables can make it do more: mixed
    precision of its own, in a wrapper that cannot be pickled.
    """

    order = 11  # as fastai's `DistributedTrainer`

    def __init__(self, sync_bn: bool):
        self.sync_bn = sync_bn

    def before_fit(self):
        self.norms = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        network = nn.SyncBatchNorm.convert_sync_batchnorm(self.model) if self.sync_bn else self.model
        self.learn.model = self.wrapped = DistributedDataParallel(network)
        self.wrapped.broadcast_buffers = False  # it would send batch norm's statistics at every forward pass
        for dl in self.dls.loaders:
            dl.deal(rank_distrib(), num_distrib())

    def after_backward(self):
        # The mean over all processes, so that a loss that is not finite ends them all. They are in step here anyway.
        self.learn.loss = total(self.loss.detach()) / num_distrib()

    def before_validate(self):
        # Without the wrapper, as processes can differ in their number of validation batches
        self.learn.model = self.wrapped.module
        same_buffers(self.model)

    def after_validate(self):
        self.learn.model = self.wrapped
        for metric in [self.recorder.loss, *self.learn.metrics] if hasattr(self, "recorder") else ():
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
    """Within this, `learn` trains one network in all processes; losses and metrics are over all of their images.

    Batch norm normalises within each process's share, unless `sync_bn`, which torch has for GPUs only. Rank 0's
    statistics are the ones that are kept.
    """
    if num_distrib() <= 1:
        yield
        return
    with learn.added_cbs(AllRanks(sync_bn)):
        yield
