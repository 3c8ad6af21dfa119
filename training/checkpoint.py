"""Stop and resume: checkpoints between epochs and at every stop, from which training continues bit for bit."""

import os
import zipfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.learner import get_model
from fastai.torch_core import get_random_states, num_distrib, rank_distrib, set_random_states
from torch import nn

from errors import InputError
from files import complete, to_disk
from training.distributed import highest
from training.history import RunLog
from training.run import CHECKPOINTS

NAME, BEFORE = CHECKPOINTS
FORMAT = 5  # changes with what is in the file
EVERY = 10  # seconds between two checkpoints; to write one and flush it to the disk takes a tenth of a second
STOPS = {1: ("after --max-minutes", 0), 129: ("by SIGHUP", 129), 130: ("by Ctrl-C", 130), 143: ("by SIGTERM", 143)}
KEYS = {"format", "epoch", "batch", "pct_train", "model", "opt", "scaler", "callbacks", "random", "loader"}


class Checkpoint(Callback):
    """Writes `checkpoint.pth`, keeps the one before, and resumes from `state`, which `load_checkpoint` returned.

    It writes one after an epoch if ten seconds have passed since the last, at a stop, and after the last epoch; the
    best weights in `log` are written before it.

    After `ask_to_stop`, which a signal handler may call, or after `max_minutes`, training ends after the current batch,
    with a checkpoint; `stopped` then says where, and `code` is the exit code. Several processes all end after the same
    batch, whichever of them was asked.

    A checkpoint has weights, optimiser, gradient scaler, random generators, the loader's place in the epoch, and the
    state of every callback with a `state_dict`: on a CPU, a resumed run equals an uninterrupted one bit for bit.
    """

    order = 90  # after all callbacks whose state it keeps

    def __init__(self, log: RunLog, state: dict | None = None, max_minutes: float | None = None):
        self.log, self.state, self.requested, self.code, self.stopped = log, state, 0, 0, None
        self.deadline = None if max_minutes is None else perf_counter() + 60 * max_minutes

    def ask_to_stop(self, code: int) -> None:
        """Stop after the current batch; `code` is one of `STOPS`."""
        self.requested = code

    def __str__(self) -> str:
        if self.state is None:
            return ""
        return f", from epoch {self.state['epoch'] + 1}, batch {self.state['batch'] + 1} on"

    @property
    def first_epoch(self) -> int:
        """The epoch to start with, from 0."""
        return self.state["epoch"] if self.state else 0

    def before_fit(self):
        self.written = perf_counter()
        if self.state is None:
            return
        get_model(self.model).load_state_dict(self.state["model"])
        self.opt.load_state_dict(self.state["opt"])
        if self.state["scaler"] is not None:
            self.learn.scaler.load_state_dict(self.state["scaler"])
        for name, cb in self._kept_callbacks().items():
            if name in self.state["callbacks"]:  # else the caller has added it since
                cb.load_state_dict(self.state["callbacks"][name])
        _restore_generators(self.state["random"])
        self.dls.train.begin_at(*self.state["loader"])

    def before_train(self):
        self.skipped = self.batch = self.state["batch"] if self.state and self.epoch == self.first_epoch else 0
        if self.skipped:
            self.learn.pct_train = self.state["pct_train"]
        if self.state and self.epoch == self.first_epoch:
            self.learn.train_iter = self.epoch * len(self.dls.train) + self.batch  # the step number in logs

    def after_batch(self):
        if self.training:
            self.batch = self.skipped + self.iter + 1
        if not self.requested and self.deadline is not None and perf_counter() > self.deadline:
            self.requested = 1
        if not self.training and num_distrib() > 1:
            return  # the number of validation batches can differ between processes
        code = highest(self.requested)
        if code and not torch.isfinite(self.loss):
            raise CancelFitException  # no checkpoint: it could not be resumed
        if code:
            why, self.code = STOPS[code]
            self.stopped = f"{why} in epoch {self.epoch + 1}, after {self.batch} of {len(self.dls.train)} batches"
            self._save(self.epoch, self.batch)
            raise CancelFitException

    def after_epoch(self):
        if self.epoch < self.first_epoch:
            return  # done before the stop
        last = self.epoch + 1 == self.n_epoch
        if highest(int(last or perf_counter() - self.written >= EVERY)):
            self._save(self.epoch + 1, 0)

    def after_fit(self):
        if not self.stopped and not self.log.failure and (code := highest(self.requested)) > 1:
            why, self.code = STOPS[code]  # asked after the last batch
            self.stopped = f"{why} after the last epoch"

    def _kept_callbacks(self) -> dict[str, Callback]:
        """Those with a `state_dict`, by the name of their class and their number among those of that class."""
        kept = {}
        for cb in self.learn.cbs:
            # Looked up in the class, as fastai looks up a callback's missing attributes in the learner.
            if hasattr(type(cb), "state_dict"):
                kept[f"{type(cb).__name__} {sum(type(cb) is type(other) for other in kept.values())}"] = cb
        return kept

    def _save(self, epoch: int, batch: int) -> None:
        states = get_random_states()
        name, keys, *rest = states["numpy_state"]
        scaler = getattr(self.learn, "scaler", None)
        train = self.dls.train
        state = {
            "format": FORMAT,
            "epoch": epoch,
            "batch": batch,
            "pct_train": float(self.pct_train),
            "model": get_model(self.model).state_dict(),
            "opt": _without_numpy(self.opt.state_dict()),
            "scaler": scaler and scaler.state_dict(),
            "callbacks": {name: cb.state_dict() for name, cb in self._kept_callbacks().items()},
            "random": {**states, "numpy_state": (name, keys.tolist(), *rest)},
            "loader": (train.epoch, batch) if batch else (train.epoch + 1, 0),
        }
        self.written = perf_counter()
        if rank_distrib():
            return
        self.log.write_best()
        path = self.path / NAME
        with complete(path) as beside:
            with beside.open("wb") as file:  # torch, given a path, hides why it cannot write there
                torch.save(state, file)
            to_disk(beside)
            if path.exists():
                os.replace(path, self.path / BEFORE)  # to resume from until the new one has its name


def _without_numpy(state: dict) -> dict:
    """The optimiser's state without the numpy scalars of fastai's schedules, which torch's safe loader refuses."""
    for group in state["param_groups"]:
        group.update({name: value.item() for name, value in group.items() if isinstance(value, np.generic)})
    return state


def _restore_generators(saved: dict) -> None:
    """Restore the random generators, but not cuDNN's flags, which fastai stores with them: those are the device's."""
    own, (name, keys, *rest) = get_random_states(), saved["numpy_state"]
    states = {**own, **{key: saved[key] for key in ("random_state", "torch_state")}}
    states["numpy_state"] = name, np.array(keys, dtype=np.uint32), *rest
    states["torch_cuda_state"] = saved["torch_cuda_state"][: len(own["torch_cuda_state"])]  # perhaps fewer GPUs now
    set_random_states(**states)


def load_checkpoint(run: Path, model: nn.Module) -> dict | None:
    """The state in the run's last checkpoint, None if there is none yet.

    Raises InputError if it is damaged, or belongs to another network than `model`.
    """
    for name, remedy in ((NAME, f"delete it to resume from the one before, {run / BEFORE}"), (BEFORE, "start anew")):
        path = run / name
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
                if bad := archive.testzip():
                    raise ValueError(f"wrong checksum of {bad}")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise  # a fault of the disk, perhaps a temporary one
        except Exception as e:  # a damaged file can make torch.load raise anything
            remedy = remedy if name == BEFORE or (run / BEFORE).exists() else "delete it to start anew"
            raise InputError(f"{path}: damaged, {remedy} ({f'{type(e).__name__} {e}'.splitlines()[0][:80]})") from e
        if not isinstance(state, dict) or state.get("format") != FORMAT or state.keys() != KEYS:
            raise InputError(f"{path}: not a checkpoint of this version of the project")
        if _shapes(state["model"]) != _shapes(model.state_dict()):
            raise InputError(f"{path}: the checkpoint of another network")
        return state
    return None


def _shapes(weights: dict) -> dict:
    return {name: getattr(weight, "shape", None) for name, weight in weights.items()}
