"""The learning-rate range test: fastai's `lr_find` without side effects, with its suggestions and one of our own.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.3.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.learner import Learner
from fastai.torch_core import distrib_barrier, get_random_states, rank_distrib, set_random_states

from errors import InputError
from files import write_csv, write_json
from training.optimizer import Muon

METHODS = ("edge", "valley", "slide", "minimum", "steep")  # all but the first are fastai's
WINDOW = 4  # batches
SECONDS = 10  # between two lines that say how far the test is


@dataclass(frozen=True)
class RangeTest:
    """The learning rates tried, the loss of the batch at each, fastai's smoothed loss, and each method's suggestion.

    A suggestion is None if the method has none.
    """

    lrs: list[float]
    batch_losses: list[float]
    losses: list[float]
    suggestions: dict[str, float | None]

    @property
    def default(self) -> str:
        """The name of the method whose suggestion is used."""
        return default_method(self.suggestions)

    @property
    def suggestion(self) -> float | None:
        """The learning rate that the default method suggests; None if it has none."""
        return self.suggestions[self.default]

    def loss_at(self, lr: float) -> float:
        """The smoothed loss at the tried learning rate nearest to `lr`."""
        return min(zip(self.lrs, self.losses, strict=True), key=lambda point: abs(point[0] - lr))[1]

    def __str__(self) -> str:
        return ", ".join(f"{name} {lr:.2g}" if lr else f"{name} none" for name, lr in self.suggestions.items())

    @classmethod
    def load(cls, folder: Path) -> "RangeTest | None":
        """The test that `save` wrote there; None if there is none. Raises InputError if it is damaged."""
        path = folder / "lr_find.json"
        try:
            suggestions = json.loads(path.read_text())["suggestions"]
            if suggestions.keys() != set(METHODS):
                raise ValueError
            path = folder / "lr_find.csv"
            rows = list(csv.DictReader(path.read_text().splitlines(), strict=True))
            points = [[float(row[name]) for name in ("lr", "batch_loss", "loss")] for row in rows]
            if not points and any(suggestions.values()):
                raise ValueError
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as e:
            raise InputError(f"{path}: damaged; delete it, and the range test is made once more") from e
        return cls(*(map(list, zip(*points, strict=True)) if points else ([], [], [])), suggestions)

    def save(self, folder: Path, chosen: float | None) -> None:
        """Write the curve to `lr_find.csv`; the suggestions, and the peak that training uses, to `lr_find.json`."""
        points = zip(self.lrs, self.batch_losses, self.losses, strict=True)
        write_csv(folder / "lr_find.csv", ("lr", "batch_loss", "loss"), points)
        content = {"suggestions": self.suggestions, "default": self.default, "chosen": chosen}
        write_json(folder / "lr_find.json", content)


class BatchLosses(Callback):
    """Keeps the loss of every batch, where fastai's recorder keeps a mean over some fifty.

    Without a progress bar, prints now and then how far the test is.
    """

    order = -10  # before the callbacks that end the test

    def __init__(self, steps: int):
        self.steps, self.losses, self.said = steps, [], perf_counter()

    def after_batch(self):
        self.losses.append(self.loss.detach())
        if not hasattr(self.learn, "progress") and perf_counter() - self.said > SECONDS:
            print(f"range test   batch {len(self.losses)} of at most {self.steps}")
            self.said = perf_counter()


def default_method(suggestions: dict[str, float | None]) -> str:
    """The method whose suggestion is used: "edge" if it has one, else "minimum"."""
    return "edge" if suggestions["edge"] else "minimum"


def edge(lrs: list[float], batch_losses: list[float]) -> float | None:
    """Half the learning rate at which training becomes unstable, None if it does not.

    It is unstable when the loss, averaged over four batches, has risen by half of what it had fallen. fastai's rules
    look at a smoothed loss that hides such a rise; `results/README.md` compares the suggestions.
    """
    losses = np.nan_to_num(np.array(batch_losses, dtype=float), nan=np.inf)
    if len(losses) < 2 * WINDOW:
        return None
    means = np.convolve(losses, np.full(WINDOW, 1 / WINDOW), "valid")
    start, lowest = means[0], np.minimum.accumulate(means)
    unstable = (means - lowest > (start - lowest) / 2) & (lowest < 0.9 * start)  # a smaller fall could be noise
    return float(lrs[WINDOW - 1 :][unstable.argmax()]) / 2 if unstable.any() else None


@contextmanager
def undisturbed(learn: Learner) -> Iterator[None]:
    """After this, weights, batch-norm statistics, optimiser and all random generators are as they were before it."""
    loaders = [(dl, dl.rng.getstate(), getattr(dl, "epoch", None)) for dl in learn.dls.loaders]
    states, model = get_random_states(), deepcopy(learn.model.state_dict())
    opt = None if learn.opt is None else deepcopy(learn.opt.state_dict())
    try:
        yield
    finally:
        learn.model.load_state_dict(model)
        if opt is None:
            learn.opt = None
        else:
            learn.opt.load_state_dict(opt)
        for dl, rng, epoch in loaders:
            dl.rng.setstate(rng)
            if epoch is not None:
                dl.epoch = epoch
        set_random_states(**states)


def range_test(learn: Learner, start_lr: float = 1e-5, end_lr: float = 10, steps: int = 100) -> RangeTest:
    """Train for at most `steps` batches while the learning rate grows from `start_lr` to `end_lr`, then undo it.

    Ends early if the loss diverges or is not finite. Works with any number of batches in the loader.
    """
    batches = BatchLosses(steps)
    print(f"range test   at most {steps} batches, from a learning rate of {start_lr:g} to {end_lr:g}")
    with undisturbed(learn), learn.added_cbs([TerminateOnNaNCallback(), batches]):
        learn.lr_find(start_lr=start_lr, end_lr=end_lr, num_it=steps, show_plot=False, suggest_funcs=None)
        if rank_distrib():
            distrib_barrier()  # for rank 0, which waits in `learn.load`
        lrs, losses = list(learn.recorder.lrs), [float(loss) for loss in learn.recorder.losses]
        batch_losses = [float(loss) for loss in batches.losses[: len(lrs)]]
        muon = isinstance(getattr(learn.opt, "opt", None), Muon)
    # Muon's steps are stable far beyond the best learning rate, so that an edge would say nothing about it.
    suggestions = {"edge": None if muon else edge(lrs, batch_losses)}
    keep = [i for i, loss in enumerate(losses) if isfinite(loss)]
    lrs, batch_losses, losses = ([values[i] for i in keep] for values in (lrs, batch_losses, losses))
    # fastai's own cut: in the first tenth the smoothed loss warms up, in the last five points it diverges.
    cut = slice(steps // 10, -5)
    suggestions |= {name: _suggest(name, lrs[cut], losses[cut], steps) for name in METHODS[1:]}
    return RangeTest(lrs, batch_losses, losses, suggestions)


def _suggest(name: str, lrs: list[float], losses: list[float], steps: int) -> float | None:
    """One of fastai's suggestions, None if the curve is too short for it."""
    try:
        lr, _ = getattr(SuggestionMethod, name.capitalize())(torch.tensor(lrs), torch.tensor(losses), steps)
    except (IndexError, ValueError, RuntimeError):
        return None
    return float(lr) if isfinite(lr) and lr > 0 else None
