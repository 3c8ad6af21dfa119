"""Descriptions of a run, for `config.json` and for the terminal: settings, data, device, code, versions, result."""

import platform
import re
import shlex
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.learner import Learner
from fastai.torch_core import num_distrib
from fastcore.basics import num_cpus

from names import printable
from options import Options
from recipes import RECIPES
from training.run import Run

CHOSEN = ("norm", "seed", "valid", "valid_pct", "sync_bn", "compile", "deterministic")
FEW = 10  # batches an epoch
PACKAGES = ("fastai", "torch", "torchvision", "albumentations", "fastcore", "numpy", "pillow")


def describe(learn: Learner, options: Options) -> dict:
    """The content of `config.json`: settings, data, device, versions of code and packages, and the options."""
    device, table, settings = learn.dls.device, learn.dls.train_ds.items, options.settings()
    return {
        "recipe": options.recipe,
        **asdict(settings),
        "lr": options.lr if options.lr == "auto" else settings.lr,
        "schedule": str(settings.schedule),
        "precision": learn.autocast.precision,
        **{name: getattr(options, name) for name in CHOSEN},
        "source": table.name,
        "fingerprint": table.fingerprint(),
        "classes": list(table.classes),
        "images": {"train": len(learn.dls.train_ds), "valid": len(learn.dls.valid_ds)},
        "parameters": sum(p.numel() for p in learn.model.parameters()),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "processes": max(1, num_distrib()),
        "workers": learn.dls.train.fake_l.num_workers,
        **code_version(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
    }


def keep_threads(before: dict, device: torch.device) -> None:
    """Use as many threads as the run was started with, or print a line if there are too few cores for that.

    before: its `config.json`. The rounding of sums depends on the number of threads.
    """
    threads, cores = before.get("threads"), num_cpus()
    if (
        device.type != "cpu"
        or threads in (None, torch.get_num_threads())
        or before.get("processes") != max(1, num_distrib())
    ):
        return
    if threads <= cores:
        torch.set_num_threads(threads)
    else:
        print(f"threads      {torch.get_num_threads()}, not {threads} as at the start: the end will differ a little")


def processor() -> str:
    """The CPU's name, or its architecture if nothing more is known, and its number of cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {num_cpus()} cores"


def code_version() -> dict:
    """The code's git commit, whether the tracked files are unchanged, and the web address of its origin.

    Each is None if git does not know.
    """
    said = git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    if said is None:
        return {"commit": None, "clean": None, "repository": None}
    cloned = re.sub(r"^git@([^:/]+):", r"https://\1/", git("config", "--get", "remote.origin.url") or "")
    web = re.fullmatch(r"https?://(?:[^@/]+@)?(.+?)(?:\.git)?/?", cloned)
    repository = web and f"https://{web[1]}"
    return {"commit": said.removesuffix("-dirty"), "clean": not said.endswith("-dirty"), "repository": repository}


def git(*words: str) -> str | None:
    """The output of a git command in this project's folder; None if it fails, as it does outside of a clone."""
    words = ["git", "-C", str(Path(__file__).parents[1]), *words]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def few_batches(learn: Learner, options: Options) -> str | None:
    """A warning for an epoch of so few batches that training cannot recover from its high learning rates; else None.

    It names a smaller batch, and a learning rate scaled down with it. Source: Goyal et al., "Accurate, Large Minibatch
    SGD" (2017), section 2.1.
    """
    batches, settings, recipe = len(learn.dls.train), options.settings(), RECIPES[options.recipe]
    bs = min(settings.bs, max(4, len(learn.dls.train_ds) // FEW))
    lr = float(f"{recipe.lr * bs / recipe.bs:.1g}")
    if batches >= FEW or options.lr == "auto" or settings.lr <= lr:
        return None
    n = f"{batches} batch{'es' * (batches > 1)}"
    return f"an epoch has {n}, few for a peak learning rate of {settings.lr:g}; pass --bs {bs} --lr {lr:g}"


def print_config(config: dict) -> None:
    """Print one line for each setting."""
    for name, value in config.items():
        if name == "options":  # the settings once more
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = " ".join(value[:20]) + (f" … ({len(value)})" if len(value) > 20 else "")
        print(printable(f"{name:<15} {value}"))


def print_result(run: Run, options: Options, result: dict) -> None:
    """Print the accuracies, and commands for what to do next."""
    held_out = f"{options.valid_pct:.0%} of the training set" if options.valid == "holdout" else "here the test set"
    names = ("README.md", "history.csv", "result.json", "model.pkl", "model.safetensors")
    files = ", ".join(name for name in names if (run / name).is_file())  # a full disk can have kept some out
    again = {"seed": options.seed + 1, "out": None, "resume": None, "max_minutes": None}
    print(f"\nlast epoch   {result['last_accuracy']:.2%} accuracy on the validation set, {held_out}")
    if options.tta:
        print(f"with TTA     {result['tta_accuracy']:.2%}, averaged over each image and its mirror image")
    optimistic = result["best_accuracy"] > result["last_accuracy"]
    chosen = f" in epoch {result['best_epoch']}"
    chosen += ", chosen on the validation set, so a little too good to quote" if optimistic else ""
    print(f"""\
best epoch   {result["best_accuracy"]:.2%}{", the last one" if result["best_epoch"] == result["epochs"] else chosen}
run folder   {printable(str(run))}: {files} from the last epoch, models/last.pth, models/best.pth

use it       python predict.py {printable(shlex.quote(str(run)))} IMAGE.png
again        {options.command(result["processes"], **again)}""")
