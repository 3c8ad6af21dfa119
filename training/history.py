"""The history of a run: a line for every epoch, `history.csv`, the best weights, and on a CPU a time estimate."""

from math import isfinite
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import TrackerCallback
from fastai.learner import Learner, get_model
from fastai.torch_core import rank_distrib

from files import complete, write_csv
from training.distributed import total


def save_weights(learn: Learner, name: str, weights: dict | None = None) -> Path:
    """`learn.save` to `models/NAME.pth`, complete or not at all; `learn.load(NAME)` reads it.

    weights: in place of the network's own.
    """
    path = learn.path / learn.model_dir / f"{name}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete(path) as beside, beside.open("wb") as file:  # torch, given a path, hides why it cannot write there
        torch.save(weights or get_model(learn.model).state_dict(), file)
    return path


def say(learn: Learner, line: str) -> None:
    """Print a line, above fastai's progress bar if there is one."""
    (learn.progress.mbar.write if hasattr(learn, "progress") else print)(line)


class Forecast(Callback):
    """Prints, after the first batches on a CPU, how long the training will take."""

    warm_up, least = 2, 5  # batches to leave out, as they are slower; then the least number of batches, and of seconds

    def before_fit(self):
        self.times = []

    def after_batch(self):
        if not self.training or self.times is None or torch.device(self.dls.device).type != "cpu":
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
    """Writes `history.csv` and prints a line after every epoch; keeps the best weights.

    `write_best`, and the end of the fit, write them to `models/best.pth`. Training loss and accuracy are means over the
    epoch's augmented images, of all processes; they stay on the device until the epoch ends. Training stops after an
    epoch whose loss is not finite.
    """

    def __init__(self):
        super().__init__(monitor="accuracy", comp=np.greater)
        self.history, self.best_epoch, self.best_weights = [], None, None
        self.sums, self.unfinished, self.failure = [], (0.0, []), None

    def after_fit(self):
        super().after_fit()
        self.failure = self._failure()
        self.write_best()

    def write_best(self) -> None:
        """Write the best weights, if they are better than those written last."""
        if self.best_weights is not None:
            save_weights(self.learn, "best", self.best_weights)
            self.best_weights = None

    def _failure(self) -> str | None:
        """Where the training loss stopped being finite; None if it did not."""
        if not self.sums or torch.isfinite(losses := torch.stack(self.sums)[:, 0]).all():
            return None
        batch = int(torch.isfinite(losses).int().argmin())
        loss, lr = float(losses[batch]), self.recorder.lrs[batch - len(losses)]
        return f"the training loss became {loss} in epoch {self.epoch + 1}, batch {batch + 1}, learning rate {lr:.3g}"

    def state_dict(self) -> dict:
        """The epochs that are done, and the sums of the one under way."""
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
            # These are the sums of all processes, and rank 0 keeps them: the number of processes may be another now.
            self.unfinished = seconds, list((sums if rank_distrib() == 0 else 0 * sums).to(self.dls.device))

    def before_train(self):
        seconds, self.sums = self.unfinished
        self.started, self.unfinished = perf_counter() - seconds, (0.0, [])

    def after_batch(self):
        if self.training:
            with torch.no_grad():
                hits = (self.pred.argmax(1) == self.y).float().mean()
                self.sums.append(torch.stack([self.loss, hits, torch.ones_like(hits)]) * len(self.y))

    def after_epoch(self):
        if not self.recorder.values[-1]:
            return  # an epoch that fastai skips, as a resumed run has done it before
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
            self.best_weights = {name: t.detach().clone() for name, t in get_model(self.model).state_dict().items()}
        say(
            self.learn,
            f"epoch {row['epoch']:>3}/{self.n_epoch}   train loss {row['train_loss']:.4f}, accuracy "
            f"{row['train_accuracy']:7.2%}   valid loss {row['valid_loss']:.4f}, accuracy "
            f"{row['valid_accuracy']:7.2%}   lr {row['lr']:.2e}   {row['seconds']:.1f} s",
        )
        if not isfinite(loss):
            raise CancelFitException  # `train_fastai` reports it: fastai would reword an error raised here
        self.sums = []
