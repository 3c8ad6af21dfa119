"""Train a custom ResNet with fastai and albumentations, from images to an exported learner.

    python train_fastai.py --recipe demo      handwritten digits, about a minute on two CPU cores, no download
    python train_fastai.py                    CIFAR-10, 24 epochs; wants a GPU

In a notebook:

    from data import get_dls
    from train_fastai import get_learner
    learn = get_learner(get_dls("digits", bs=64, flip=0), "demo")
    learn.lr_find()
    learn.fit_one_cycle(12, 0.1)
"""

import gc
import inspect
import shlex
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict, fields
from math import isfinite
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

from errors import InputError, run_command
from recipes import RECIPES, Recipe, get_recipe, recipe_table

if TYPE_CHECKING:
    import torch
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

# torch and fastai take seconds to import. The functions below do so themselves, so that --help and a mistyped option
# answer at once.


def get_learner(dls: "DataLoaders", recipe: str | Recipe = "fast", norm: str = "batch", **kwargs) -> "Learner":
    """A plain fastai `Learner`: the recipe's network, loss and optimiser, channels-last, on CUDA in mixed precision.

    `kwargs` go to `Learner`; callbacks among them come on top of these. Raises InputError for an unknown recipe,
    ValueError for an unknown norm.
    """
    from functools import partial

    import fastai.callback.hook  # gives every Learner its summary
    import fastai.callback.schedule  # noqa: F401  lr_find and fit_one_cycle
    import torch
    from fastai.callback.channelslast import ChannelsLast
    from fastai.callback.fp16 import AMPMode, MixedPrecision
    from fastai.callback.mixup import CutMix
    from fastai.callback.progress import ProgressCallback
    from fastai.learner import Learner, Recorder
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from fastai.optimizer import OptimWrapper
    from fastcore.basics import defaults
    from fastcore.foundation import L

    from callbacks import LazyProgress, LazyRecorder
    from export import carry_our_code
    from model import CustomResNet

    carry_our_code()
    recipe = get_recipe(recipe)
    model = CustomResNet(len(dls.vocab), recipe.width, norm, recipe.logit_scale).to(dls.device)
    lazy = {Recorder: LazyRecorder, ProgressCallback: LazyProgress}
    cbs = [*(lazy.get(cb, cb) for cb in defaults.callbacks), ChannelsLast()]
    if recipe.cutmix:
        cbs.append(CutMix(recipe.cutmix))
    if dls.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # batches have one shape: cuDNN tries its ways once, keeps the best
        # Volta and Turing only emulate bf16. Compute capability 8.0, Ampere, has it.
        has_bf16 = torch.cuda.get_device_capability(dls.device) >= (8, 0)
        cbs.append(MixedPrecision(AMPMode.BF16 if has_bf16 else AMPMode.FP16))
    settings = {
        "loss_func": CrossEntropyLossFlat(label_smoothing=recipe.label_smoothing),
        # fastai's own SGD has no Nesterov momentum
        "opt_func": partial(OptimWrapper, opt=torch.optim.SGD, momentum=recipe.momentum, nesterov=recipe.nesterov),
        "lr": recipe.lr,
        "wd": recipe.wd,
        "moms": (recipe.momentum,) * 3,  # constant, where fastai's default cycles it against the learning rate
        "metrics": accuracy,
        "cbs": [*cbs, *L(kwargs.pop("cbs", None))],
        "default_cbs": False,
    }
    return Learner(dls, model, **{**settings, **kwargs})


def main(
    data: str = None,  # cifar10, digits, a folder or archive of train/<class>/ and test/<class>/ images, or CIFAR-10's python version [the recipe's]
    recipe: Annotated[str, {"choices": list(RECIPES)}] = "fast",  # Named settings, see recipes.py
    epochs: int = None,  # Passes over the training images [the recipe's]
    lr: str = None,  # Peak learning rate, or auto for the range test's suggestion [the recipe's]
    bs: int = None,  # Images a batch [the recipe's]
    width: int = None,  # Channels of the network's first stage [the recipe's]
    momentum: float = None,  # Of SGD [the recipe's]
    wd: float = None,  # Weight decay [the recipe's]
    label_smoothing: float = None,  # Part of the target that is spread over all classes [the recipe's]
    logit_scale: float = None,  # What the network's output is multiplied by [the recipe's]
    flip: float = None,  # Probability of a horizontal flip [the recipe's]
    pad: int = None,  # Pixels of reflection around an image before the random crop [the recipe's]
    cutout: int = None,  # Side of the square hole in pixels, 0 for none [the recipe's]
    cutmix: float = None,  # Alpha of CutMix's Beta distribution, 0 for none [the recipe's]
    norm: Annotated[str, {"choices": ["batch", "layer", "group"]}] = "batch",  # Normalisation layers
    seed: int = 0,  # Of the weights, the order of the images and their augmentation
    runs: int = 1,  # Seeds to train one after the other, from --seed on
    workers: int = None,  # Loader processes [one a core up to 8 for a GPU, 0 on a CPU]
    valid: Annotated[str, {"choices": ["test", "holdout"]}] = "test",  # Validate on the test set, or on a tenth of the training set
    device: str = "auto",  # auto, cpu, cuda, cuda:1 or mps
    out: str = None,  # Run folder, new or empty [runs/NNN-recipe]
    tta: bool = False,  # At the end test on each image together with its mirror image, too
    compile: bool = False,  # Compile the network with torch.compile: about a minute more before the first step
    lr_find_only: bool = False,  # Stop after the range test
    no_lr_find: bool = False,  # Train without a range test
    list_recipes: bool = False,  # Print all recipes and stop
) -> dict | None:  # fmt: skip
    """Train a custom ResNet with fastai and albumentations: CIFAR-10 by default, or images of your own."""
    given = dict(locals())
    if list_recipes:
        print(recipe_table())
        return None
    if no_lr_find and (lr_find_only or lr == "auto"):
        other = "--lr-find-only" if lr_find_only else "--lr auto"
        raise InputError(f"--no-lr-find contradicts {other}; drop one of them")
    if runs < 1 or (runs > 1 and lr_find_only):
        why = "--lr-find-only does not train" if runs > 1 else "it must be at least 1"
        raise InputError(f"--runs is {runs}: {why}")
    changes = {field.name: given[field.name] for field in fields(Recipe) if field.name in given}
    settings = get_recipe(recipe, **changes | {"lr": _learning_rate(lr)})
    if tta and settings.flip == 0:
        raise InputError("--tta: flip is 0, so that the network never learns from mirror images; leave it out")

    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # fastai's import, nothing to do here
    from fastai.torch_core import set_seed

    from callbacks import tta_accuracy
    from data import get_dls
    from export import export
    from lr_finder import range_test, undisturbed
    from report import runs_table, save_augmentations, save_history, save_lr_find
    from run import RunLog, check_out, new_run_folder, print_config, save_weights, write_config, write_json

    check_out(out)
    if runs > 1:
        results = []
        for number in range(seed, seed + runs):
            print(f"{number - seed + 1} of {runs} runs\n")
            folder = out and f"{out}/seed-{number}"
            results.append(main(**{**given, "runs": 1, "seed": number, "out": folder}))
            gc.collect()  # a Learner is full of cycles; with it go its memory on the device and its loaders' processes
            print()
        print(f"accuracy on the validation set, in %\n\n{runs_table(results)}")
        return None
    started = perf_counter()
    device = get_device(device)
    if compile:
        _check_compiler(device)
    dls = get_dls(
        settings.data, settings.bs, seed, workers, valid, device,
        pad=settings.pad, flip=settings.flip, cutout=settings.cutout,
    )  # fmt: skip
    set_seed(seed)
    learn = get_learner(dls, settings, norm)
    run = learn.path = new_run_folder(recipe, out)
    asked = {
        "recipe": recipe,
        **asdict(settings),
        "schedule": str(settings.schedule),
        "norm": norm,
        "seed": seed,
        "valid": valid,
        "compile": compile,
    }
    config = write_config(run, learn, asked | {"lr": lr if lr == "auto" else settings.lr})
    print_config(config)

    # In a file or a pipe a progress bar is a heap of carriage returns. RunLog writes what fastai's own log leaves out.
    with nullcontext() if sys.stdout.isatty() else learn.no_bar(), learn.no_logging():
        with undisturbed(learn):
            print(f"\n{learn.summary()}\n")
        save_augmentations(dls, run / "augmentations.png")
        if compile:
            learn.model.compile()

        peak, test = settings.lr, None
        if not no_lr_find:
            test = range_test(learn)
            peak = test.suggestion if lr == "auto" else peak
            chosen = None if lr_find_only else peak
            test.save(run, chosen)
            save_lr_find(test, run / "lr_find.png", chosen)
            print(f"range test   {test}")
            if lr_find_only:
                again = _command(given, lr="LR", lr_find_only=False, out=None)
                print(f"see          {run / 'lr_find.png'}\ntrain        {again}")
                return None
            if peak is None:
                raise InputError("--lr auto: the range test's curve is too short for a suggestion; pass --lr NUMBER")

        log = RunLog()
        print(f"training     {settings.epochs} epochs, peak learning rate {peak:.3g}")
        learn.fit(settings.epochs, peak, cbs=[*settings.schedule.callbacks(peak), log])

    last, best = log.history[-1], log.history[(log.best_epoch or 1) - 1]
    if not isfinite(last["train_loss"]):
        why = f"the training loss became {last['train_loss']} in epoch {last['epoch']}"
        raise InputError(
            f"{why}: a peak learning rate of {peak:.3g} is too high here, lower --lr; {run} keeps the history"
        )
    save_weights(learn, "last")
    save_history(log.history, run, f"{dls.train_ds.items.name}, recipe {recipe}, width {settings.width}, seed {seed}")
    export(learn, run / "export.pkl")
    with learn.no_bar():
        averaged = tta_accuracy(learn) if tta else None
    result = {
        **config,
        "peak_lr": peak,
        "suggestions": test and test.suggestions,
        "last_accuracy": last["valid_accuracy"],
        "tta_accuracy": averaged and round(averaged, 6),
        "best_accuracy": best["valid_accuracy"],
        "best_epoch": best["epoch"],
        "seconds": round(perf_counter() - started, 2),
        "history": log.history,
    }
    write_json(run / "result.json", result)
    mirrored = f"with TTA     {averaged:.2%}, averaged over each image and its mirror image\n" if tta else ""
    held_out = "a tenth of the training set" if valid == "holdout" else "here the test set"
    print(f"""
last epoch   {last["valid_accuracy"]:.2%} accuracy on the validation set, {held_out}
{mirrored}best epoch   {best["valid_accuracy"]:.2%} in epoch {best["epoch"]}, chosen on the validation set, so a little too good to quote
run folder   {run}: the pictures, history.csv, result.json, models/last.pth, models/best.pth, and export.pkl from the last epoch

use it       python -c "from fastai.learner import load_learner; print(load_learner('{run}/export.pkl').predict('IMAGE.png'))"
again        {_command(given, seed=seed + 1, out=None)}""")
    return result  # for a caller in Python


def _command(given: dict, **changes) -> str:
    """The command line for the arguments of `main` in `given`, with `changes`; what has its default value is left out."""
    words = ["python", "train_fastai.py"]
    for name, parameter in inspect.signature(main).parameters.items():
        value, option = {**given, **changes}[name], "--" + name.replace("_", "-")
        if value != parameter.default:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def _learning_rate(lr: str | None) -> float | None:
    """The number in `--lr`; None where the recipe or the range test says it."""
    if lr in (None, "auto"):
        return None
    try:
        return float(lr)
    except ValueError:
        raise InputError(f"--lr is {lr!r}: it must be a number or auto") from None


def get_device(name: str) -> "torch.device":
    """The torch device of that name, checked for being there; "auto" is the best one there is."""
    import torch
    from fastai.torch_core import default_device

    if name == "auto":
        return default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # an unknown name, and a known one that this torch or machine lacks
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(f"--device {name}: no such device here; this machine has {', '.join(there)}") from None
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def _check_compiler(device: "torch.device") -> None:
    """Raise InputError where torch.compile has no compiler for `device`."""
    import torch

    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except RuntimeError as e:
        raise InputError(f"--compile: torch.compile does not work here; leave it out ({str(e).splitlines()[0]})") from e


if __name__ == "__main__":
    run_command(main)
