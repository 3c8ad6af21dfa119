"""The time of training steps: the bare network, a hand-written loop, our Learner; on a GPU, other loaders as well."""

import os
import tempfile
from contextlib import nullcontext, redirect_stdout
from statistics import median
from time import perf_counter

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastcore.basics import num_cpus
from loaders import transforms_as_documented
from ways import BS, documented, erasing, noise, torchvision_loader

from data import get_dls
from model import CustomResNet
from recipes import get_recipe
from train_fastai import get_learner
from training.callbacks import CompiledTraining
from training.history import RunLog
from training.precision import DTYPES, choose_precision

RECIPE = get_recipe("fast", muon=0.0)  # with torch's SGD, as a hand-written loop would use
BARE, BY_HAND, OURS = "bare network, one batch", "hand-written loop, our loader", "our Learner"
MUON = f"{OURS}, convolutions by Muon"


def by_hand(device: torch.device, width: int, compiled: bool, precision: str):
    """A training step, hand-written for speed: channels-last, autocast, one kernel for SGD, no wait for the loss."""
    torch.backends.cudnn.benchmark = True  # as `get_learner` sets it
    model = CustomResNet(10, width, logit_scale=RECIPE.logit_scale).to(device, memory_format=torch.channels_last)
    if compiled:
        model.compile()
    loss_func = torch.nn.CrossEntropyLoss(label_smoothing=RECIPE.label_smoothing)
    settings = {"momentum": RECIPE.momentum, "weight_decay": RECIPE.wd, "nesterov": True}
    opt = torch.optim.SGD(model.parameters(), 0.01, **settings, fused=device.type == "cuda" or None)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(x, y):
        with torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext():
            loss = loss_func(model(x.as_subclass(torch.Tensor)), y.as_subclass(torch.Tensor))
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        return loss.detach()

    return step


def loop(step, batches, device: torch.device) -> float:
    """Seconds for one epoch of `step` over `batches`."""
    start = perf_counter()
    total = torch.zeros((), device=device)
    for x, y in batches():
        x = x.to(device, non_blocking=True, memory_format=torch.channels_last)
        total += step(x, y.to(device, non_blocking=True))
    total.item()  # waits for the device
    return perf_counter() - start


class Clock(Callback):
    """Measures the seconds of the training part of the last epoch."""

    order = 100  # after the recorder has fetched the losses, for which it waits for the device

    def before_train(self):
        self.start = perf_counter()

    def after_train(self):
        self.seconds = perf_counter() - self.start


def fit(learn: Learner, *cbs) -> tuple[float, float]:
    """Seconds for the training part of an epoch, and for the whole epoch."""
    clock, start = Clock(), perf_counter()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the progress bar is drawn, but not shown
        learn.fit(1, 0.01, cbs=[clock, *cbs])
    return clock.seconds, perf_counter() - start


def steps(
    device: torch.device, width: int, images: int, rounds: int, compiled: bool = False, precision: str = "auto"
) -> list[dict]:
    """Seconds per epoch of `images` images: the first, the median and the fastest of `rounds`. The ways take turns.

    `whole` includes the rest of our Learner's epoch: validation (a fifth of the images on a GPU, two images on a CPU),
    history, best weights.
    """
    gpu, precision = device.type == "cuda", choose_precision(precision, device)
    table, folder = noise(images, images // 5 if gpu else 2), tempfile.TemporaryDirectory()
    one_batch = get_dls(table, workers=0, device=device).train.one_batch()

    def fixed():
        return (one_batch for _ in range(images // BS))

    def hand_written(batches, compiled=False):
        step = by_hand(device, width, compiled, precision)
        return lambda: loop(step, batches, device)

    def ours(compiled=False, muon=0.0):
        dls, recipe = get_dls(table, device=device), get_recipe("fast", width=width, muon=muon)
        learn = get_learner(dls, recipe, precision=precision, path=folder.name)
        if compiled:
            learn.add_cb(CompiledTraining(learn))
        return lambda: fit(learn, RunLog())

    dls = get_dls(table, device=device)
    ways = {BARE: hand_written(fixed), BY_HAND: hand_written(lambda: dls.train), OURS: ours()}
    ways[MUON] = ours(muon=get_recipe("fast").muon)
    if compiled:
        ways |= {f"{BARE}, compiled": hand_written(fixed, True), f"{OURS}, compiled": ours(True)}
    if gpu:
        workers = min(16, num_cpus())  # fastai's default
        plain = torchvision_loader(table, workers, pin=True)
        erased = torchvision_loader(table, workers, erasing(), pin=True)
        usual = documented(table, transforms_as_documented(), workers, device)
        learn = Learner(usual, CustomResNet(width=width), metrics=accuracy, path=folder.name).to_fp16()
        ways |= {
            "peer: hand-written loop, torchvision's loader": hand_written(lambda: plain),
            "peer: the same with RandomErasing": hand_written(lambda: erased),
            "peer: fastai's Learner, its loader as documented": lambda: fit(learn),
        }
    epochs = {name: [] for name in ways}
    for done in range(rounds):
        for name in list(ways)[:: -1 if done % 2 else 1]:  # so that a drift of the machine's speed favours none
            epochs[name].append(ways[name]())
            print(f"round {done + 1}: {name} {np.round(epochs[name][-1], 2)}", flush=True)
    folder.cleanup()
    rows = []
    for name, times in epochs.items():
        trained, whole = zip(*(time if isinstance(time, tuple) else (time, None) for time in times), strict=True)
        row = {"way": name, "first": trained[0], "median": median(trained), "fastest": min(trained)}
        rows.append(row | {"ms per step": 1e3 * min(trained) / (images // BS), "whole": whole[0] and min(whole)})
    return rows


def summary(rows: list[dict]) -> str:
    """The ratios that matter, of the fastest epochs."""
    best = {row["way"]: row["fastest"] for row in rows}
    lines = [
        f"our Learner's steps: {best[OURS] / best[BY_HAND]:.3f} x the hand-written loop's, "
        f"{best[OURS] / best[BARE]:.3f} x the bare network's",
        *(f"{name}: {best[name] / best[OURS]:.2f} x our Learner" for name in best if name.startswith("peer")),
    ]
    if MUON in best:
        lines.append(f"Muon: {best[MUON] / best[OURS]:.3f} x the time of SGD's steps")
    if f"{OURS}, compiled" in best:
        lines.append(f"compiled: {best[OURS] / best[f'{OURS}, compiled']:.2f} x as fast, first epoch left out")
    return "\n".join(lines)
