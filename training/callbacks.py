"""Callbacks: a recorder, a progress bar and CutMix that do not wait for a GPU, the plateau schedule, logging, TTA.

A GPU works through a queue: reading a loss waits for everything queued before it, and leaves the queue empty. fastai's
recorder and progress bar read one at every batch. Ours record and show the same without that.
"""

import sys
from pathlib import Path

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.learner import AvgSmoothLoss, Learner, Recorder
from fastai.metrics import accuracy
from fastai.torch_core import to_detach
from fastcore.basics import noop

from errors import InputError
from training.precision import full_precision


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed training loss, kept on the device."""

    def accumulate(self, learn):
        self.count += 1
        loss = to_detach(learn.loss.mean(), cpu=False, gather=False)
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class LazyRecorder(Recorder):
    """fastai's `Recorder`, but the losses of an epoch leave the device together, when its training part ends."""

    name = "recorder"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.smooth_loss, self.fetched = SmoothLoss(self.smooth_loss.beta), 0

    def before_fit(self):
        super().before_fit()
        self.fetched = 0
        if type(getattr(self.learn, "progress", None)) is ProgressCallback:
            # fastai's `no_bar` puts its own bar back; a plain assignment would go through a callback's checks
            object.__setattr__(self.learn.progress, "__class__", LazyProgress)

    def after_train(self):
        super().after_train()
        self._fetch()

    def after_fit(self):  # a cancelled epoch has no after_train
        self._fetch()

    def plot_loss(self, *args, **kwargs):
        self._fetch()  # of an interrupted epoch
        return super().plot_loss(*args, **kwargs)

    def _fetch(self):
        if fresh := self.losses[self.fetched :]:
            self.losses[self.fetched :] = torch.stack(fresh).cpu()
            self.fetched = len(self.losses)


class LazyProgress(ProgressCallback):
    """fastai's `ProgressCallback`, but it reads the loss only when it draws the bar, five times a second."""

    name = "progress"

    def after_batch(self):
        self.pbar.update(self.iter + 1)
        if self.pbar.last_v == self.iter + 1 and hasattr(self, "smooth_loss"):
            self.pbar.comment = f"{self.smooth_loss.item():.4f}"

    def after_fit(self):
        super().after_fit()
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)  # removes the half-full bar of a training that was stopped


class LazyCutMix(CutMix):
    """fastai's `CutMix`, with the same draws made on the CPU: reading the square's edges waits for no device."""

    name = "cut_mix"

    def before_batch(self):
        device, (height, width) = self.x.device, self.x.shape[-2:]
        lam, others = self.distrib.sample((1,)), torch.randperm(len(self.y)).to(device, non_blocking=True)
        x1, y1, x2, y2 = self.rand_bbox(width, height, lam)
        self.yb1 = (self.y[others],)
        self.x[..., y1:y2, x1:x2] = self.x[others][..., y1:y2, x1:x2]
        self.lam = torch.full((1,), 1 - (x2 - x1) * (y2 - y1) / (width * height), device=device)
        if not self.stack_y:
            weight = self.lam.view(-1, *[1] * (self.y.ndim - 1))
            self.learn.yb = (torch.lerp(self.yb1[0], self.y, weight),)

    def rand_bbox(self, W: int, H: int, lam: torch.Tensor) -> tuple[int, int, int, int]:
        edges = []
        for side in (W, H):
            half, centre = int(torch.round(side * torch.sqrt(1 - lam))) // 2, int(torch.randint(side, (1,)))
            edges.append((max(0, centre - half), min(side, centre + half)))
        (x1, x2), (y1, y2) = edges
        return x1, y1, x2, y2


class ReduceLR(ReduceLROnPlateau):
    """fastai's `ReduceLROnPlateau`, with a state for the checkpoint."""

    def state_dict(self) -> dict:
        return {"best": self.best, "wait": self.wait}

    def load_state_dict(self, state: dict):
        self.best, self.wait = state["best"], state["wait"]

    def after_epoch(self):
        if self.recorder.values[-1]:  # empty for an epoch that fastai skips, as a resumed run has done it before
            super().after_epoch()


class CompiledTraining(Callback):
    """Compiles the network with torch, for training only: batches of one shape, one graph.

    Validation would need a second graph, its last batch a third, and the final figures in fp32 two more, and compiling
    a graph takes longer than many epochs of validation. On MPS the compiled network is not channels-last: torch
    compiles a convolution's backward pass for other strides there than it gets.
    """

    order = ChannelsLast.order + 1

    def __init__(self, learn: Learner):
        learn.model.compile()

    def before_fit(self):
        if torch.device(self.dls.device).type == "mps":
            self.model.to(memory_format=torch.contiguous_format)

    def before_batch(self):
        if torch.device(self.dls.device).type == "mps":
            self.learn.xb = tuple(x.contiguous() for x in self.xb)

    def before_validate(self):
        torch.compiler.set_stance("force_eager")

    def after_validate(self):
        torch.compiler.set_stance("default")

    after_fit = after_validate  # for a fit that is stopped during validation


class Mirror(Callback):
    """Mirrors every image, left to right."""

    def before_batch(self):
        self.learn.xb = tuple(x.flip(-1) for x in self.xb)


class BatchLog(Callback):
    """Logs the smoothed training loss and the learning rate of every batch, and validation loss and accuracy of every
    epoch, to "tensorboard" or "wandb".

    TensorBoard's files go to `folder`/tensorboard; a run of Weights & Biases gets the folder's name and `config`, or
    with `resume` goes on, if the folder has one. Waits for the device at every batch. Raises InputError if Weights &
    Biases cannot be started.
    """

    order = Recorder.order + 1  # after the recorder has recorded what is logged

    def __init__(self, to: str, folder: Path, config: dict | None = None, resume: bool = False):
        if to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(folder / "tensorboard")
            self.write = lambda values, step: [writer.add_scalar(name, v, step) for name, v in values.items()]
            self.close = writer.close
            return
        import wandb

        before = sorted((folder / "wandb").glob("*run-*")) if resume else []  # the names end in the run's id
        past = {"id": before[-1].name.rpartition("-")[2], "resume": "allow"} if before else {}
        try:
            wandb.init(project="custom-resnet", name=folder.name, dir=folder, config=config, **past)
        except wandb.Error as e:
            raise InputError(f"--log wandb: {e}; log in with wandb login, or set WANDB_MODE=offline") from e
        self.write, self.close = wandb.log, wandb.finish

    def after_batch(self):
        if self.training:
            self.write({"train_loss": float(self.smooth_loss), "lr": self.opt.hypers[-1]["lr"]}, self.train_iter)

    def after_epoch(self):
        values = self.recorder.values[-1]  # empty for an epoch that fastai skips, as a resumed run has done it before
        self.write(dict(zip(self.recorder.metric_names[2:], values[1:], strict=False)), self.train_iter)

    def after_fit(self):
        self.close()


def tta_accuracy(learn: Learner) -> float:
    """Accuracy on the validation set, in fp32, with logits averaged over each image and its mirror image.

    fastai's `tta` averages over random augmentations instead. Source: Page, "How to Train Your ResNet" (2019), part 8.
    """
    with full_precision(learn):
        logits, targets = learn.get_preds(act=noop)
        mirrored, _ = learn.get_preds(act=noop, cbs=Mirror())
    return accuracy(logits + mirrored, targets).item()
