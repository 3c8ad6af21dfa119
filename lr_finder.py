"""The learning-rate range test: fastai's `lr_find`, with nothing disturbed and its suggestions kept.

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

import torch
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.learner import Learner
from fastai.torch_core import get_random_states, set_random_states

from run import write_csv, write_json

METHODS = ("valley", "slide", "minimum", "steep")
DEFAULT = "valley"


@dataclass(frozen=True)
class RangeTest:
    """Learning rates tried, the smoothed training loss at each, and what each method suggests (None: no answer)."""

    lrs: list[float]
    losses: list[float]
    suggestions: dict[str, float | None]

    @property
    def suggestion(self) -> float | None:
        """The default method's learning rate."""
        return self.suggestions[DEFAULT]

    def loss_at(self, lr: float) -> float:
        """The loss at the tried learning rate that is nearest to `lr`."""
        return min(zip(self.lrs, self.losses, strict=True), key=lambda point: abs(point[0] - lr))[1]

    def __str__(self) -> str:
        return ", ".join(f"{name} {lr:.2g}" if lr else f"{name} none" for name, lr in self.suggestions.items())

    @classmethod
    def load(cls, folder: Path) -> "RangeTest | None":
        """What `save` wrote there, if it did."""
        try:
            suggestions = json.loads((folder / "lr_find.json").read_text())["suggestions"]
            rows = csv.DictReader((folder / "lr_find.csv").read_text().splitlines())
        except FileNotFoundError:
            return None
        points = [(float(row["lr"]), float(row["loss"])) for row in rows]
        return cls([lr for lr, _ in points], [loss for _, loss in points], suggestions)

    def save(self, folder: Path, chosen: float | None) -> None:
        """Write the curve to `lr_find.csv`; the suggestions, and the peak that training uses, to `lr_find.json`."""
        write_csv(folder / "lr_find.csv", ("lr", "loss"), zip(self.lrs, self.losses, strict=True))
        write_json(folder / "lr_find.json", {"suggestions": self.suggestions, "default": DEFAULT, "chosen": chosen})


@contextmanager
def undisturbed(learn: Learner) -> Iterator[None]:
    """On leaving, weights, batch-norm statistics, optimiser and every random generator are as they were on entering."""
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
    """Train for at most `steps` batches while the learning rate grows from `start_lr` to `end_lr`, then undo it all.

    Ends early when the loss diverges or is no longer finite. Works with any number of batches in the loader.
    """
    with undisturbed(learn), learn.added_cbs(TerminateOnNaNCallback()):
        learn.lr_find(start_lr=start_lr, end_lr=end_lr, num_it=steps, show_plot=False, suggest_funcs=None)
        lrs, losses = list(learn.recorder.lrs), [float(loss) for loss in learn.recorder.losses]
    keep = [i for i, loss in enumerate(losses) if isfinite(loss)]
    lrs, losses = [lrs[i] for i in keep], [losses[i] for i in keep]
    # fastai's own cut: the first tenth is the smoothed loss warming up, the last five points are the divergence.
    cut = slice(steps // 10, -5)
    return RangeTest(lrs, losses, {name: _suggest(name, lrs[cut], losses[cut], steps) for name in METHODS})


def _suggest(name: str, lrs: list[float], losses: list[float], steps: int) -> float | None:
    """One of fastai's suggestions, or None where the curve is too short for it."""
    try:
        lr, _ = getattr(SuggestionMethod, name.capitalize())(torch.tensor(lrs), torch.tensor(losses), steps)
    except (IndexError, ValueError, RuntimeError):
        return None
    return float(lr) if isfinite(lr) and lr > 0 else None
