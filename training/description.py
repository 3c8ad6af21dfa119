"""What a run is, for `config.json` and for the reader: settings, data, device, code, versions; and what it came to."""

import os
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

from names import printable
from options import Options
from recipes import RECIPES
from training.run import Run

CHOSEN = ("norm", "seed", "valid", "valid_pct", "sync_bn", "compile", "deterministic")
FEW = 10  # batches an epoch
PACKAGES = ("fastai", "torch", "torchvision", "albumentations", "fastcore", "numpy", "pillow")


def describe(learn: Learner, options: Options) -> dict:
    """What goes into `config.json`: the options, what came of them, on what data, device, code and versions."""
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
    """Compute with as many threads as the run was started with; say so where there are not as many cores.

    before: its `config.json`. Sums are rounded by how many threads share them.
    """
    threads, cores = before.get("threads"), len(os.sched_getaffinity(0))
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
    """The name of the CPU, or its architecture where that is all there is, and its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {os.cpu_count()} cores"


def code_version() -> dict:
    """The git commit that this code is at, whether no tracked file differs from it, and the address that it was cloned
    from, as a browser takes it; None where git knows none.
    """
    said = git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    if said is None:
        return {"commit": None, "clean": None, "repository": None}
    cloned = re.sub(r"^git@([^:/]+):", r"https://\1/", git("config", "--get", "remote.origin.url") or "")
    web = re.fullmatch(r"https?://(?:[^@/]+@)?(.+?)(?:\.git)?/?", cloned)
    repository = web and f"https://{web[1]}"
    return {"commit": said.removesuffix("-dirty"), "clean": not said.endswith("-dirty"), "repository": repository}


def git(*words: str) -> str | None:
    """What git says of this code; None where it says nothing, as with an archive of the code instead of a clone."""
    words = ["git", "-C", str(Path(__file__).parents[1]), *words]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def few_batches(learn: Learner, options: Options) -> str | None:
    """What to say, and what to pass instead, where an epoch has so few batches that a high learning rate destroys more
    than the rest of the epochs can mend; else None.

    The learning rate is as much lower than the recipe's as the batch is smaller. Source: Goyal et al., "Accurate, Large
    Minibatch SGD" (2017), section 2.1.
    """
    batches, settings, recipe = len(learn.dls.train), options.settings(), RECIPES[options.recipe]
    bs = min(settings.bs, max(4, len(learn.dls.train_ds) // FEW))
    lr = float(f"{recipe.lr * bs / recipe.bs:.1g}")
    if batches >= FEW or options.lr == "auto" or settings.lr <= lr:
        return None
    n = f"{batches} batch{'es' * (batches > 1)}"
    return f"an epoch has {n}, few for a peak learning rate of {settings.lr:g}; pass --bs {bs} --lr {lr:g}"


def print_config(config: dict) -> None:
    """One line a setting."""
    for name, value in config.items():
        if name == "options":  # the same again
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = " ".join(value[:20]) + (f" … ({len(value)})" if len(value) > 20 else "")
        print(printable(f"{name:<15} {value}"))


def print_result(run: Run, options: Options, result: dict) -> None:
    """The figures, and what to do next."""
    held_out = f"{options.valid_pct:.0%} of the training set" if options.valid == "holdout" else "here the test set"
    shown = "README.md with all pictures, " if (run / "README.md").exists() else ""
    files = f"{shown}history.csv, result.json, model.pkl and model.safetensors"
    again = {"seed": options.seed + 1, "out": None, "resume": None, "max_minutes": None}
    print(f"\nlast epoch   {result['last_accuracy']:.2%} accuracy on the validation set, {held_out}")
    if options.tta:
        print(f"with TTA     {result['tta_accuracy']:.2%}, averaged over each image and its mirror image")
    chosen = f" in epoch {result['best_epoch']}, chosen on the validation set, so a little too good to quote"
    print(f"""\
best epoch   {result["best_accuracy"]:.2%}{", the last one" if result["best_epoch"] == result["epochs"] else chosen}
run folder   {printable(str(run))}: {files} from the last epoch, models/last.pth, models/best.pth

use it       python predict.py {printable(shlex.quote(str(run)))} IMAGE.png
again        {options.command(result["processes"], **again)}""")
