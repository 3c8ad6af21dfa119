"""The options of the command: checked, taken from the run that is gone on with, written out again as a command."""

import inspect
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from errors import InputError
from recipes import Recipe, get_recipe

if TYPE_CHECKING:
    import torch


def defaults(func: Callable) -> dict:
    """The default value of each argument."""
    return {name: parameter.default for name, parameter in inspect.signature(func).parameters.items()}


def recipe_of(given: dict) -> Recipe:
    """The recipe with the options that go over it. Raises InputError for one out of range, or two that contradict."""
    options = SimpleNamespace(**given)
    if options.no_lr_find and (options.lr_find_only or options.lr == "auto"):
        other = "--lr-find-only" if options.lr_find_only else "--lr auto"
        raise InputError(f"--no-lr-find contradicts {other}; drop one of them")
    if options.runs < 1 or (options.runs > 1 and options.lr_find_only):
        why = "--lr-find-only does not train" if options.runs > 1 else "it must be at least 1"
        raise InputError(f"--runs is {options.runs}: {why}")
    if options.log and find_spec(options.log) is None:
        raise InputError(f"--log {options.log}: the package is not installed; pip install {options.log}")
    if options.max_minutes is not None and not options.max_minutes > 0:
        raise InputError(f"--max-minutes is {options.max_minutes}: it must be above 0")
    changes = {field.name: given[field.name] for field in fields(Recipe) if field.name in given}
    settings = get_recipe(options.recipe, **changes | {"lr": _learning_rate(options.lr)})
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if rest := settings.bs % processes:
        near = f"{settings.bs - rest} or {settings.bs - rest + processes}" if settings.bs > rest else processes
        raise InputError(f"--bs is {settings.bs}, of all {processes} processes together: pass a multiple, {near}")
    if options.tta and settings.flip == 0:
        raise InputError("--tta: flip is 0, so that the network never learns from mirror images; leave it out")
    return settings


def _learning_rate(lr: str | None) -> float | None:
    """The number in `--lr`; None where the recipe or the range test says it."""
    if lr in (None, "auto"):
        return None
    try:
        return float(lr)
    except ValueError:
        raise InputError(f"--lr is {lr!r}: it must be a number or auto") from None


def resumed(func: Callable, given: dict) -> tuple[Path | None, dict]:
    """The run to go on with and the arguments that it was started with; None and `given` where there is none yet.

    Raises InputError where an option says something else than the run was started with.
    """
    run = Path(given["resume"])
    if given["resume"] == "auto":
        if not given["out"]:
            raise InputError("--resume auto: pass --out RUN too, the folder to start in or to go on in")
        run = Path(given["out"])
        if given["runs"] > 1 or not (run / "config.json").exists():
            return None, given
    elif given["out"]:
        raise InputError(f"--out {given['out']}: a resumed run goes on in its own folder; leave it out")
    try:
        config = json.loads((run / "config.json").read_text())
        started = config["arguments"]
        if started.keys() != given.keys():
            raise KeyError
    except OSError as e:
        raise InputError(f"--resume {run}: there is no run to go on with, no config.json ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{run}/config.json: not that of a run of this version of the project") from None
    # What changes nothing in what is learned
    free = ("resume", "out", "runs", "device", "workers", "max_minutes", "log", "no_pictures")
    now = {name: value for name, value in given.items() if value != defaults(func)[name]}
    for name, value in now.items():
        if name not in free and str(value) not in (str(started.get(name)), str(config.get(name))):
            was = config.get(name, started.get(name))
            why = "; the learning rates of all epochs depend on it" if name == "epochs" else ""
            raise InputError(f"--{name.replace('_', '-')} {value}: {run} was started with {was}{why}; leave it out")
    kept = {"precision": config.get("precision", "fp32")}  # whatever is the fastest where it goes on
    return run, {**started, **kept, **{name: value for name, value in now.items() if name in free}}


def command_line(func: Callable, given: dict, processes: int = 1, **changes) -> str:
    """The command line that calls `func` with `given` and `changes`; what has its default value is left out."""
    words = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
    words.append("train_fastai.py")
    for name, default in defaults(func).items():
        value, option = {**given, **changes}[name], "--" + name.replace("_", "-")
        if value != default:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def get_device(name: str) -> "torch.device":
    """The torch device of that name, checked for being there; "auto" is the best one there is.

    Each of several processes on a machine has a GPU of its own, or all train on the CPU.
    """
    import torch

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        there, mine = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if name == "auto":
            name = "cuda" if there else "cpu"
        if name not in ("cpu", "cuda"):
            raise InputError(f"--device {name}: several processes take auto, cpu, or cuda, which is a GPU for each")
        if name == "cuda" and mine >= there:
            raise InputError(f"--device cuda: process {mine + 1} of this machine has no GPU, as there are {there}; "
                             "start as many processes as there are GPUs, or pass --device cpu")  # fmt: skip
        if name == "cuda":
            torch.cuda.set_device(mine)

    if name == "auto":  # as fastai's `default_device`, whose import takes longer than torch's
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):  # an unknown name, and a known one that this torch or machine lacks
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        there += ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(f"--device {name}: no such device here; this machine has {', '.join(there)}") from None
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def set_deterministic(on: bool, device: "torch.device") -> None:
    """Have torch use nothing that can give two results. On a CPU a training has no such thing.

    Raises InputError for a device on which torch cannot.
    """
    import torch

    if on and device.type == "mps":
        raise InputError("--deterministic: torch has no deterministic max-pooling on mps; leave it out")
    on = on and device.type == "cuda"
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in a changing order
    if on != torch.are_deterministic_algorithms_enabled():  # the next line imports for more than a second
        torch.use_deterministic_algorithms(on)


def check_compiler(device: "torch.device") -> None:
    """Raise InputError where torch.compile has no compiler for `device`."""
    import torch

    try:
        torch.compile(torch.exp)(torch.ones(1, device=device))
    except RuntimeError as e:
        raise InputError(f"--compile: torch.compile does not work here; leave it out ({str(e).splitlines()[0]})") from e
