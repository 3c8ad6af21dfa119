"""The command's options as one dataclass: for the command line, for `config.json`, and for resuming a run."""

import json
import os
import shlex
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from errors import InputError
from names import printable
from recipes import FLIPS, RECIPES, Recipe, get_recipe

# Options that do not change what is learned, so that a resumed run may set them differently
FREE = ("resume", "out", "runs", "device", "workers", "max_minutes", "log", "no_pictures")


@dataclass(frozen=True)
class Options:
    """Train a custom ResNet with fastai and albumentations: CIFAR-10 by default, or images of your own."""

    data: str = None  # cifar10, digits, a folder or archive of images, or CIFAR-10's python version [the recipe's]
    recipe: Annotated[str, {"choices": list(RECIPES)}] = "fast"  # Named settings, see recipes.py
    epochs: int = None  # Passes over the training images [the recipe's]
    lr: str = None  # Peak learning rate, or auto for the range test's suggestion [the recipe's]
    bs: int = None  # Batch size, of all processes together [the recipe's]
    width: int = None  # Channels of the network's first stage [the recipe's]
    momentum: float = None  # Momentum of SGD and of Muon [the recipe's]
    wd: float = None  # Weight decay [the recipe's]
    label_smoothing: float = None  # Part of the target to spread over all classes, 0 for none [the recipe's]
    logit_scale: float = None  # Factor for the network's output [the recipe's]
    flip: float = None  # Probability of a horizontal flip [the recipe's]
    flips: Annotated[str, {"choices": list(FLIPS)}] = None  # Flip at random, or alternating by epoch [the recipe's]
    pad: int = None  # Pixels of reflection around an image before the random crop [the recipe's]
    cutout: int = None  # Side of the square hole in pixels, 0 for none [the recipe's]
    cutmix: float = None  # Alpha of CutMix's Beta distribution, 0 for none [the recipe's]
    whiten: float = None  # Epsilon of the whitening of the first convolution, 0 for none [the recipe's]
    norm_bias_lr: float = None  # Multiple of the learning rate for norm biases; unless 1, scales stay 1 [the recipe's]
    ema: float = None  # Decay per step of the moving average of the weights, 0 for none [the recipe's]
    muon: float = None  # Muon's rate for convolutions as a multiple of the learning rate, 0 for SGD [the recipe's]
    norm: Annotated[str, {"choices": ["batch", "layer", "group"]}] = "batch"  # Normalisation layers
    seed: int = 0  # Random seed of the weights, the order of the images and their augmentation
    runs: int = 1  # Number of seeds to train one after the other, from --seed on
    workers: int = None  # Loader processes [one a core up to 8 for a GPU, 0 on a CPU]
    valid: Annotated[str, {"choices": ["test", "holdout"]}] = "test"  # Validate on the test set, or on held-out images
    valid_pct: float = 0.1  # Part of each class that --valid holdout holds out
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    precision: Annotated[str, {"choices": ["auto", "fp32", "bf16", "fp16"]}] = "auto"  # For training; auto: the fastest
    out: str = None  # Run folder, new or empty [runs/NNN-recipe]
    resume: str = None  # Resume the run in this folder; auto: the one in --out, if it has been started
    max_minutes: float = None  # Stop after this many minutes of training, with a checkpoint to resume from
    log: Annotated[str, {"choices": ["tensorboard", "wandb"]}] = None  # Also log every batch there
    tta: bool = False  # At the end, also report the accuracy with logits averaged over each image and its mirror image
    sync_bn: bool = False  # Batch norm over the images of all processes, on GPUs
    compile: bool = False  # Compile the network with torch.compile: takes time before the first step
    deterministic: bool = False  # The same weights for the same seed on CUDA, too; on a CPU that is always so
    lr_find_only: bool = False  # Stop after the range test
    no_lr_find: bool = False  # Train without a range test
    no_pictures: bool = False  # Leave out the pictures and the README of the run folder
    list_recipes: bool = False  # Print all recipes and stop

    def __post_init__(self):
        if self.resume == "":  # an unset shell variable
            raise InputError("--resume '': name the folder of a run, or pass auto")
        if self.resume not in (None, "auto") and self.runs != 1:
            every = "leave it out, or pass --resume auto with the --out of all seeds"
            raise InputError(f"--runs {self.runs}: --resume {self.resume} resumes one run; {every}")
        if not self.resume and not self.list_recipes:
            self.settings()  # checks them now, as what comes next takes seconds

    def settings(self) -> Recipe:
        """The recipe with the options that override it. Raises InputError for wrong or contradictory values."""
        if self.no_lr_find and (self.lr_find_only or self.lr == "auto"):
            other = "--lr-find-only" if self.lr_find_only else "--lr auto"
            raise InputError(f"--no-lr-find contradicts {other}; drop one of them")
        if self.runs < 1 or (self.runs > 1 and self.lr_find_only):
            why = "--lr-find-only does not train" if self.runs > 1 else "it must be at least 1"
            raise InputError(f"--runs is {self.runs}: {why}")
        if self.log and find_spec(self.log) is None:
            raise InputError(f"--log {self.log}: the package is not installed; pip install {self.log}")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise InputError(f"--max-minutes is {self.max_minutes}: it must be above 0")
        if self.valid == "test" and self.valid_pct != Options.valid_pct:
            raise InputError("--valid-pct: with --valid test nothing is held out; pass --valid holdout too")
        given = {field.name: getattr(self, field.name) for field in fields(Recipe) if hasattr(self, field.name)}
        settings = get_recipe(self.recipe, **given | {"lr": self._learning_rate()})
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if rest := settings.bs % processes:
            near = f"{settings.bs - rest} or {settings.bs - rest + processes}" if settings.bs > rest else processes
            why = f"it must be a multiple of the number of processes, {processes}"
            raise InputError(f"--bs is {settings.bs}: {why}; pass {near}")
        if self.tta and settings.flip == 0:
            raise InputError("--tta: flip is 0, so that the network never learns from mirror images; leave it out")
        return settings

    def _learning_rate(self) -> float | None:
        """The number in `lr`; None if it comes from the recipe or the range test."""
        if self.lr in (None, "auto"):
            return None
        try:
            return float(self.lr)
        except ValueError:
            raise InputError(f"--lr is {self.lr!r}: it must be a number or auto") from None

    def given(self) -> dict:
        """The options that differ from their defaults."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) != field.default}

    def command(self, processes: int = 1, **changes) -> str:
        """The command line for `self` with `changes`, to be shown; defaults are left out."""
        words = ["python"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes)]
        words.append("train_fastai.py")
        for name, value in {**asdict(self), **changes}.items():
            option = "--" + name.replace("_", "-")
            if value != getattr(Options, name):
                words += [option] if value is True else [option, str(value)]
        return printable(shlex.join(words))

    def resumed(self) -> tuple[Path | None, "Options"]:
        """The run to resume and the options it was started with; None and `self` if there is none yet.

        Raises InputError if an option that is not at its default contradicts what the run was started with.
        """
        if not self.resume:
            return None, self
        run = Path(self.resume)
        if self.resume == "auto":
            if not self.out:
                raise InputError("--resume auto: pass --out RUN too, the folder to start or to resume in")
            run = Path(self.out)
            if not os.path.exists(run / "config.json"):
                return None, replace(self, resume=None)
        elif self.out:
            raise InputError(f"--out {self.out}: a resumed run stays in its own folder; leave it out")
        config, started = read_config(run)
        given = self.given()
        for name, value in given.items():
            if name not in FREE and str(value) not in (str(getattr(started, name)), str(config.get(name))):
                was = config.get(name, getattr(started, name))
                why = "; the learning rates of all epochs depend on it" if name == "epochs" else ""
                raise InputError(f"--{name.replace('_', '-')} {value}: {run} was started with {was}{why}; leave it out")
        free = {name: value for name, value in given.items() if name in FREE}
        # The precision stays that of the start, even where another one is the fastest.
        return run, replace(started, precision=config["precision"], **free)


def check_types(saved: dict) -> None:
    """Raise TypeError or ValueError for a value that the command line could not have given."""
    for name, hint in get_type_hints(Options, include_extras=True).items():
        value, default = saved.get(name, getattr(Options, name)), getattr(Options, name)
        kind, *more = get_args(hint) or (hint,)  # of `str | None`, and of Annotated[str, {"choices": …}]
        if value is default:
            continue
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise TypeError(name)
        if more and isinstance(more[0], dict) and value not in more[0]["choices"]:
            raise ValueError(name)


def read_config(run: Path) -> tuple[dict, Options]:
    """The content of the run's `config.json`, and the options in it; missing ones get their defaults.

    Raises InputError if it is missing, damaged, or from a later version with options that this one lacks.
    """
    try:
        config = json.loads((run / "config.json").read_text())
        saved, known = config["options"], {field.name for field in fields(Options)}
        if unknown := sorted(saved.keys() - known):
            raise InputError(f"{run}/config.json: of a later version of the project, with {', '.join(unknown)}")
        check_types(saved)
        return {"precision": "fp32", **config}, Options(**saved)
    except OSError as e:
        raise InputError(f"{run}: not the folder of a run, no config.json ({e.strerror})") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{run}/config.json: not that of a run of this version of the project") from None
