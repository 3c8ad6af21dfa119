"""The run folder: its number, its files, and the callback that writes down what happened in every epoch."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import TrackerCallback
from fastai.learner import Learner, save_model
from fastai.torch_core import num_distrib, rank_distrib

from distributed import total
from errors import InputError
from files import complete, write_csv

PACKAGES = ("fastai", "torch", "torchvision", "albumentations", "fastcore", "numpy", "pillow")


def check_out(out: str | None) -> None:
    """Raise InputError if `out` cannot become a run folder; looked at before the work starts."""
    if out is None:
        return
    path = Path(out)
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"--out {out}: the folder is not empty; name a new or an empty one")
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {out}: this is a file; name a new or an empty folder")


def new_run_folder(recipe: str, out: str | None = None, parent: str = "runs") -> Path:
    """Make `out`, or the next free `runs/NNN-recipe`. Raises InputError where that cannot be, or `out` holds files."""
    check_out(out)
    try:
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            return Path(out)
        Path(parent).mkdir(exist_ok=True)
        while True:
            taken = [int(p.name.split("-")[0]) for p in Path(parent).iterdir() if p.name.split("-")[0].isdigit()]
            folder = Path(parent) / f"{max(taken, default=0) + 1:03}-{recipe}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # another run took the number in the meantime
                continue
    except OSError as e:
        raise InputError(f"{e.filename}: the run folder cannot be made here ({e.strerror}); pass --out PATH") from e


def describe(learn: Learner, asked: dict) -> dict:
    """What goes into `config.json`: what was asked for, on what data, device and versions."""
    device, table = learn.dls.device, learn.dls.train_ds.items
    cpu = f"{processor()}, {os.cpu_count()} cores"
    return {
        **asked,
        "source": table.name,
        "fingerprint": table.fingerprint(),
        "classes": list(table.classes),
        "images": {"train": len(learn.dls.train_ds), "valid": len(learn.dls.valid_ds)},
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "processes": max(1, num_distrib()),
        "workers": learn.dls.train.fake_l.num_workers,
        **code_version(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def processor() -> str:
    """Its name, or its architecture where that is all one can know."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def code_version() -> dict:
    """The git commit that this code is at, and whether no tracked file differs from it; None where git knows none."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or an archive of the code instead of a clone
        return {"commit": None, "clean": None}
    return {"commit": said.removesuffix("-dirty"), "clean": not said.endswith("-dirty")}


def finished(run: Path) -> dict | None:
    """What is in the `result.json` of a run that has ended, None for any other."""
    path = run / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def check_same(run: Path, config: dict, names: Iterable[str]) -> None:
    """Raise InputError where `run` was started with another value for one of `names`: it cannot be gone on with."""
    before = json.loads((run / "config.json").read_text())
    for name in names:
        if before.get(name) != config[name]:
            what = "the images are others" if name == "fingerprint" else f"{name} is {config[name]}"
            raise InputError(f"--resume {run}: {what}, but it was started with {before.get(name)}; start anew")


def print_config(config: dict) -> None:
    """One line a setting."""
    for name, value in config.items():
        if name == "arguments":  # the same again
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = " ".join(value[:20]) + (f" … ({len(value)})" if len(value) > 20 else "")
        print(f"{name:<15} {value}")


def save_weights(learn: Learner, name: str) -> Path:
    """`learn.save` to `models/NAME.pth`, complete or not at all; `learn.load(NAME)` reads it."""
    path = learn.path / learn.model_dir / f"{name}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete(path) as beside, beside.open("wb") as file:  # torch, given a path, hides why it cannot write there
        save_model(file, learn.model, opt=None, with_opt=False)
    return path


def say(learn: Learner, line: str) -> None:
    """Print it, above fastai's bar if there is one."""
    (learn.progress.mbar.write if hasattr(learn, "progress") else print)(line)


class Forecast(Callback):
    """Says on a CPU, where it can be hours, how long the training will take: after its first batches."""

    warm_up, least = 2, 5  # batches that are slower than the others; then at least so many more, and seconds

    def before_fit(self):
        self.times = []

    def after_batch(self):
        if not self.training or self.times is None or self.dls.device.type != "cpu":
            return
        self.times.append(perf_counter())
        seconds, batches = self.times[-1] - self.times[0], len(self.times) - 1
        if seconds < self.least or batches < self.warm_up + self.least:
            return
        seconds = (self.times[-1] - self.times[self.warm_up]) / (batches - self.warm_up)
        images = len(self.dls.train_ds) + len(self.dls.valid_ds) / 3  # a forward pass is a third of a step
        left = seconds * images / self.dls.train.bs * self.n_epoch * (1 - self.pct_train)
        if left > 60:
            time = f"{left / 60:.0f} minutes" if left < 7200 else f"{left / 3600:.1f} hours"
            say(self.learn, f"time         about {time} at this speed, {self.dls.train.bs / seconds:,.0f} images/s")
        self.times = None


class RunLog(TrackerCallback):
    """Writes `history.csv` and the best weights after every epoch, and one line an epoch, above fastai's bar if any.

    The training loss and accuracy are means over the epoch's augmented images, those of all processes; they stay on the
    device until it ends.
    Training stops after an epoch whose loss is not finite.
    """

    def __init__(self):
        super().__init__(monitor="accuracy", comp=np.greater)
        self.history, self.best_epoch = [], None
        self.sums, self.begun, self.failure = [], (0.0, []), None

    def after_fit(self):
        super().after_fit()
        self.failure = self._failure()

    def _failure(self) -> str | None:
        """Where the training loss was no longer finite."""
        if not self.sums or torch.isfinite(losses := torch.stack(self.sums)[:, 0]).all():
            return None
        batch = int(torch.isfinite(losses).int().argmin())
        loss, lr = float(losses[batch]), self.recorder.lrs[batch - len(losses)]
        return f"the training loss became {loss} in epoch {self.epoch + 1}, batch {batch + 1}, learning rate {lr:.3g}"

    def state_dict(self) -> dict:
        """Epochs that are done, and the sums of the one that has been begun."""
        done = {"history": self.history, "best": self.best, "best_epoch": self.best_epoch}
        if not self.sums:
            return done
        return done | {"begun": (perf_counter() - self.started, self._totals().cpu())}

    def _totals(self) -> torch.Tensor:
        """Loss, hits and number of images for each batch of this epoch, (batches, 3)."""
        return total(torch.stack(self.sums).as_subclass(torch.Tensor))

    def load_state_dict(self, state: dict):
        self.history, self.best, self.best_epoch = state["history"], state["best"], state["best_epoch"]
        if "begun" in state:
            seconds, sums = state["begun"]
            # Rank 0 goes on with what all have done; the number of processes may be another one now.
            self.begun = seconds, list((sums if rank_distrib() == 0 else 0 * sums).to(self.dls.device))

    def before_train(self):
        seconds, self.sums = self.begun
        self.started, self.begun = perf_counter() - seconds, (0.0, [])

    def after_batch(self):
        if self.training:
            with torch.no_grad():
                hits = (self.pred.argmax(1) == self.y).float().mean()
                self.sums.append(torch.stack([self.loss, hits, torch.ones_like(hits)]) * len(self.y))

    def after_epoch(self):
        if not self.recorder.values[-1]:
            return  # an epoch that fastai skips, as it was done before a stop
        super().after_epoch()
        *sums, images = self._totals().cpu().double().sum(0).tolist()
        loss, accuracy = (s / images for s in sums)
        valid = dict(zip(self.recorder.metric_names[1:], self.recorder.values[-1], strict=False))
        row = {
            "epoch": self.epoch + 1,
            "train_loss": round(loss, 6),
            "train_accuracy": round(accuracy, 6),
            "valid_loss": round(valid["valid_loss"], 6),
            "valid_accuracy": round(valid["accuracy"], 6),
            "lr": float(f"{self.opt.hypers[-1]['lr']:.6g}"),
            "seconds": round(perf_counter() - self.started, 2),
        }
        self.history.append(row)
        write_csv(self.path / "history.csv", row, (past.values() for past in self.history))
        if self.new_best:
            self.best_epoch = row["epoch"]
            save_weights(self.learn, "best")
        say(
            self.learn,
            f"epoch {row['epoch']:>3}/{self.n_epoch}   train loss {row['train_loss']:.4f}, accuracy "
            f"{row['train_accuracy']:7.2%}   valid loss {row['valid_loss']:.4f}, accuracy "
            f"{row['valid_accuracy']:7.2%}   lr {row['lr']:.2e}   {row['seconds']:.1f} s",
        )
        if not isfinite(loss):
            raise CancelFitException  # `train_fastai` says why: fastai wraps an error raised here in its own words
        self.sums = []
