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
import shlex
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

from errors import InputError, Stopped, run_command
from files import locked, write_json
from options import check_compiler, command_line, defaults, get_device, recipe_of, resumed, set_deterministic
from recipes import RECIPES, Recipe, get_recipe, recipe_table

if TYPE_CHECKING:
    import torch
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

# torch and fastai take seconds to import. The functions below do so themselves, so that --help and a mistyped option
# answer at once.


def get_learner(
    dls: "DataLoaders", recipe: str | Recipe = "fast", norm: str = "batch", precision: str = "auto", **kwargs
) -> "Learner":
    """A plain fastai `Learner`: the recipe's network, loss and optimiser, channels-last, in mixed precision.

    `precision` is "fp32", "bf16", "fp16", or "auto" for the fastest that the device has. `kwargs` go to `Learner`;
    callbacks among them come on top of these. Raises InputError for an unknown recipe, and for a precision that the
    device lacks, ValueError for an unknown norm.
    """
    from functools import partial

    import fastai.callback.hook  # gives every Learner its summary
    import fastai.callback.schedule  # noqa: F401  lr_find and fit_one_cycle
    import torch
    from fastai.callback.channelslast import ChannelsLast
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
    from precision import MixedPrecision, choose_precision

    carry_our_code()
    recipe = get_recipe(recipe)
    model = CustomResNet(len(dls.vocab), recipe.width, norm, recipe.logit_scale).to(dls.device)
    lazy = {Recorder: LazyRecorder, ProgressCallback: LazyProgress}
    cbs = [*(lazy.get(cb, cb) for cb in defaults.callbacks), ChannelsLast()]
    cbs.append(MixedPrecision(choose_precision(precision, dls.device)))
    if recipe.cutmix:
        cbs.append(CutMix(recipe.cutmix))
    if dls.device.type == "cuda":
        # Batches have one shape: cuDNN tries its ways once and keeps the best, which is not always the same one.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
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


def new_learner(options: SimpleNamespace, settings: Recipe, device: "torch.device") -> "Learner":
    """The learner that the command trains with these options, its weights drawn from the seed."""
    from functools import partial

    from fastai.torch_core import set_seed

    from data import get_dls
    from distributed import in_turns
    from sources import load_images

    images = in_turns(partial(load_images, settings.data))
    dls = get_dls(
        images, settings.bs, options.seed, options.workers, options.valid, device,
        pad=settings.pad, flip=settings.flip, cutout=settings.cutout,
    )  # fmt: skip
    set_seed(options.seed)
    return get_learner(dls, settings, options.norm, options.precision)


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
    precision: Annotated[str, {"choices": ["auto", "fp32", "bf16", "fp16"]}] = "auto",  # Of the training; auto is the fastest that the device has, and what is measured at the end is in fp32
    out: str = None,  # Run folder, new or empty [runs/NNN-recipe]
    resume: str = None,  # Go on with the run in this folder; auto: with the one in --out, if it has been started
    max_minutes: float = None,  # Stop after so many minutes of training, with a checkpoint to go on from
    log: Annotated[str, {"choices": ["tensorboard", "wandb"]}] = None,  # Log every batch there, too
    tta: bool = False,  # At the end test on each image together with its mirror image, too
    sync_bn: bool = False,  # Batch norm over all processes' images, on GPUs
    compile: bool = False,  # Compile the network with torch.compile: about a minute more before the first step
    deterministic: bool = False,  # On CUDA, too, the same weights for the same seed; on a CPU that is always so
    lr_find_only: bool = False,  # Stop after the range test
    no_lr_find: bool = False,  # Train without a range test
    no_pictures: bool = False,  # Leave out the pictures and the README of the run folder
    list_recipes: bool = False,  # Print all recipes and stop
) -> dict | None:  # fmt: skip
    """Train a custom ResNet with fastai and albumentations: CIFAR-10 by default, or images of your own."""
    given = dict(locals())
    if list_recipes:
        print(recipe_table())
        return None
    if not resume:
        recipe_of(given)  # says what is wrong at once: the next line takes seconds

    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # fastai's import, nothing to do here

    from distributed import joined, on_rank0

    with joined():
        run = None
        if resume:
            run, given = on_rank0(resumed, main, given)
        options = SimpleNamespace(**given)
        settings = recipe_of(given)
        if options.runs == 1:
            return _train(options, settings, run)
        results = []
        for number in range(options.seed, options.seed + options.runs):
            print(f"{number - options.seed + 1} of {options.runs} runs\n")
            folder = options.out and f"{options.out}/seed-{number}"
            results.append(main(**{**given, "runs": 1, "seed": number, "out": folder}))
            gc.collect()  # a Learner is full of cycles; with it go its memory on the device and its loaders' processes
            print()
        if None not in results:  # as with all but one of several processes
            from pictures import runs_table

            print(f"accuracy on the validation set, in %\n\n{runs_table(results)}")
        return None


def _train(options: SimpleNamespace, settings: Recipe, run: Path | None) -> dict | None:
    """Train in a new folder, or go on in that of `run`; returns what is in its `result.json`."""
    from callbacks import logged, tta_accuracy
    from checkpoint import Checkpoint, faults_explained, load_checkpoint, remove_checkpoints, signals
    from distributed import all_ranks, on_rank0, own_folder, rank_distrib
    from evaluation import evaluate
    from export import export, save_safetensors
    from lr_finder import RangeTest, range_test, undisturbed
    from pictures import save_augmentations, save_lr_find
    from report import write_report
    from run import (
        Forecast,
        RunLog,
        check_out,
        check_same,
        describe,
        finished,
        new_run_folder,
        print_config,
        save_weights,
    )

    started = perf_counter()
    if run is None:
        on_rank0(check_out, options.out)
    elif result := on_rank0(finished, run):
        print(f"finished     {run}: {result['last_accuracy']:.2%} accuracy after {result['epochs']} epochs")
        return result
    device = get_device(options.device)
    set_deterministic(options.deterministic, device)
    if options.sync_bn and device.type != "cuda":
        raise InputError("--sync-bn: torch has batch norm over several processes for GPUs alone; leave it out")
    if options.compile:
        check_compiler(device)
    learn = new_learner(options, settings, device)
    asked = {
        "recipe": options.recipe,
        **asdict(settings),
        "lr": options.lr if options.lr == "auto" else settings.lr,
        "schedule": str(settings.schedule),
        "precision": learn.mixed_precision.precision,
        **{name: getattr(options, name) for name in ("norm", "seed", "valid", "sync_bn", "compile", "deterministic")},
    }
    config = describe(learn, asked) | {
        "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    }
    if run is None:
        run = on_rank0(new_run_folder, options.recipe, options.out)
    else:
        on_rank0(check_same, run, config, [*asked, "fingerprint"])
    first = rank_distrib() == 0  # the others help with the training, and no more
    draw = first and not options.no_pictures

    # In a file or a pipe a progress bar is a heap of carriage returns. RunLog writes what fastai's own log leaves out.
    quiet = nullcontext() if sys.stdout.isatty() else learn.no_bar()
    with (
        own_folder(run) as run,
        locked(run),
        faults_explained(run, settings.bs),
        quiet,
        learn.no_logging(),
    ):
        learn.path = run
        write_json(run / "config.json", config)
        print_config(config)
        with undisturbed(learn):
            print(f"\n{learn.summary()}\n")
        if draw:
            save_augmentations(learn.dls, run / "augmentations.png")
        if options.compile:
            learn.model.compile()

        peak, test = settings.lr, None
        if not options.no_lr_find:
            with all_ranks(learn, options.sync_bn):
                test = on_rank0(RangeTest.load, run) or range_test(learn)
            peak = test.suggestion if options.lr == "auto" else peak
            chosen = None if options.lr_find_only else peak
            test.save(run, chosen)
            if draw:
                save_lr_find(test, run / "lr_find.png", chosen)
            print(f"range test   {test}")
            if options.lr_find_only:
                again = command_line(main, vars(options), config["processes"], lr="LR", lr_find_only=False, out=None)
                print(
                    f"see          {run / ('lr_find.csv' if options.no_pictures else 'lr_find.png')}\ntrain        {again}"
                )
                return None
            if peak is None:
                raise InputError("--lr auto: the range test's curve is too short for a suggestion; pass --lr NUMBER")

        state = on_rank0(load_checkpoint, run, learn.model)
        log, checkpoint = RunLog(), Checkpoint(state, options.max_minutes)
        print(f"training     {settings.epochs} epochs, peak learning rate {peak:.3g}{checkpoint}")
        cbs = [*settings.schedule.callbacks(peak), log, Forecast(), checkpoint]
        logger = logged(options.log if first else None, run, config)
        with all_ranks(learn, options.sync_bn), signals(checkpoint.ask_to_stop), logger as loggers:
            learn.fit(settings.epochs, peak, cbs=cbs + loggers, start_epoch=checkpoint.first_epoch)
        if checkpoint.stopped:
            again = command_line(main, defaults(main), config["processes"], resume=str(run))
            raise Stopped(f"stopped {checkpoint.stopped}; go on with: {again}", checkpoint.code)

        if log.failure:
            raise InputError(
                f"{log.failure}: a peak learning rate of {peak:.3g} is too high here, lower --lr; {run} keeps the history"
            )
        if not first:
            return None
        best = log.history[(log.best_epoch or 1) - 1]
        save_weights(learn, "last")
        export(learn, run / "export.pkl")
        with learn.no_bar():
            averaged = tta_accuracy(learn) if options.tta else None
        evaluation = evaluate(learn)
        last = round(float(evaluation.right.mean()), 6)
        result = {
            **config,
            "peak_lr": peak,
            "suggestions": test and test.suggestions,
            "last_accuracy": last,
            "tta_accuracy": averaged and round(averaged, 6),
            "calibration_error": round(evaluation.calibration_error(), 6),
            "best_accuracy": last if best is log.history[-1] else best["valid_accuracy"],
            "best_epoch": best["epoch"],
            "seconds": round(perf_counter() - started, 2),
            "history": log.history,
        }
        save_safetensors(learn, run / "model.safetensors", result)
        if draw:
            write_report(learn, result, evaluation)
        write_json(run / "result.json", result)
        remove_checkpoints(run)
    mirrored = f"with TTA     {averaged:.2%}, averaged over each image and its mirror image\n" if options.tta else ""
    shown = "" if options.no_pictures else "README.md with all pictures, "
    held_out = "a tenth of the training set" if options.valid == "holdout" else "here the test set"
    print(f"""
last epoch   {last:.2%} accuracy on the validation set, {held_out}
{mirrored}best epoch   {result["best_accuracy"]:.2%} in epoch {best["epoch"]}, chosen on the validation set, so a little too good to quote
run folder   {run}: {shown}history.csv, result.json, export.pkl and model.safetensors from the last epoch, models/last.pth, models/best.pth

use it       python predict.py {shlex.quote(str(run))} IMAGE.png
again        {command_line(main, vars(options), config["processes"], seed=options.seed + 1, out=None, resume=None, max_minutes=None)}""")
    return result


if __name__ == "__main__":
    run_command(main)
