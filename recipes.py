"""Training settings as data: a `Recipe` is a dozen numbers, and a recipe you can name is an entry in `RECIPES`."""

from dataclasses import dataclass, fields, replace
from math import isfinite

from errors import InputError


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum under fastai's one-cycle policy. Raises InputError for a value out of range."""

    data: str  # the data set it is meant for
    epochs: int
    bs: int  # images a batch
    lr: float  # the one-cycle peak
    momentum: float
    wd: float  # weight decay, on every parameter
    label_smoothing: float
    logit_scale: float
    width: int  # channels of the first stage
    pct_start: float  # the part of training that the learning rate rises for
    flip: float  # probability of a horizontal flip
    pad: int  # pixels of reflection around the image before the random crop
    cutout: int  # side of the square hole in pixels, 0 for none

    def __post_init__(self):
        for name, least, most in (
            ("epochs", 1, 10_000), ("bs", 2, 1_000_000), ("lr", 0, 1_000), ("momentum", 0, 1), ("wd", 0, 1),
            ("label_smoothing", 0, 1), ("logit_scale", 0, 1_000), ("width", 1, 4096), ("pct_start", 0, 1),
            ("flip", 0, 1), ("pad", 0, 31), ("cutout", 0, 32),
        ):  # fmt: skip
            value = getattr(self, name)
            above_zero = name in ("lr", "momentum", "logit_scale")  # Nesterov needs a momentum
            if not isfinite(value) or not least <= value <= most or (above_zero and value == 0):
                raise InputError(f"{name} is {value}: it must be {'above' if above_zero else 'from'} {least} "
                                 f"and at most {most}")  # fmt: skip


RECIPES = {
    # Ours for CIFAR-10. The starting point is cifar10-fast's recipe for the same network.
    "fast": Recipe(
        data="cifar10",
        epochs=24,  # the budget in which this network's best public recipe reaches 94 %
        bs=512,  # 97 steps an epoch: few enough to be fast, enough to learn in 24 epochs
        lr=0.4,  # the highest peak that stays stable, thanks to the scaled logits
        momentum=0.9,
        wd=5e-4,
        label_smoothing=0.1,  # the training set is fitted long before the end; this keeps the loss informative
        logit_scale=0.125,  # max-pooled features are large: unscaled, the loss starts at 3.4 instead of ln 10 = 2.3
        width=64,
        pct_start=0.2,  # five epochs of warm-up
        flip=0.5,
        pad=4,
        cutout=8,
    ),
    # Handwritten digits on a laptop in about a minute: the whole job, small.
    "demo": Recipe(
        data="digits",
        epochs=12,
        bs=64,  # 22 steps an epoch from 1,438 images
        lr=0.1,  # smaller batches, smaller steps
        momentum=0.9,
        wd=5e-4,
        label_smoothing=0.1,
        logit_scale=0.125,
        width=16,  # 0.41 M parameters, which a CPU can train
        pct_start=0.2,
        flip=0.0,  # a mirrored 2 is no digit
        pad=4,
        cutout=8,
    ),
}


def get_recipe(recipe: str | Recipe = "fast", **changes) -> Recipe:
    """The recipe of that name (or the one given) with every change that is not None applied. Raises InputError."""
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise InputError(f"there is no recipe {recipe!r}; the recipes are {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    changes = {k: v for k, v in changes.items() if v is not None}
    names = [field.name for field in fields(Recipe)]
    if unknown := sorted(changes.keys() - set(names)):
        raise InputError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(names)}")
    return replace(recipe, **changes)
