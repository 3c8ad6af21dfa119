"""Training settings as data: a `Recipe` is twenty settings, one of them a schedule; `RECIPES` holds the named ones.

A schedule is a value too, one that knows how to fit a learner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import cos, pi
from typing import TYPE_CHECKING

from errors import InputError

if TYPE_CHECKING:
    from fastai.callback.core import Callback
    from fastai.learner import Learner

# --help imports this file, and fastai takes seconds to import, so the two methods that need it import it themselves.


class Curve:
    """A learning rate that is a function of the training progress."""

    def lr(self, peak: float, position: float) -> float:
        """The learning rate at `position`, the training progress from 0 to 1."""
        raise NotImplementedError

    def fit(self, learn: "Learner", epochs: int, peak: float, cbs: "Sequence[Callback]" = (), start: int = 0) -> None:
        """Train `learn`, from epoch `start` on."""
        from fastai.callback.schedule import ParamScheduler

        learn.fit(epochs, peak, cbs=[ParamScheduler({"lr": partial(self.lr, peak)}), *cbs], start_epoch=start)


@dataclass(frozen=True)
class OneCycle(Curve):
    """fastai's `fit_one_cycle`: cosine from peak / 25 up to the peak at `pct_start`, then down to peak / div_final."""

    pct_start: float
    div_final: float = 1e5

    def __repr__(self) -> str:  # without a default `div_final`, as older runs wrote it, so that they can be resumed
        return f"OneCycle(pct_start={self.pct_start}{'' if self.div_final == 1e5 else f', div_final={self.div_final}'})"

    def fit(self, learn: "Learner", epochs: int, peak: float, cbs: "Sequence[Callback]" = (), start: int = 0) -> None:
        options = {"pct_start": self.pct_start, "div_final": self.div_final}
        learn.fit_one_cycle(epochs, peak, **options, cbs=cbs, start_epoch=start)

    def lr(self, peak: float, position: float) -> float:
        rising = position < self.pct_start
        within = position / self.pct_start if rising else (position - self.pct_start) / (1 - self.pct_start)
        start, end = (peak / 25, peak) if rising else (peak, peak / self.div_final)
        return start + (end - start) * (1 - cos(pi * within)) / 2


@dataclass(frozen=True)
class Linear(Curve):
    """Piecewise linear through `knots`: pairs of the training progress, 0 to 1, and a fraction of the peak."""

    knots: tuple[tuple[float, float], ...]

    def lr(self, peak: float, position: float) -> float:
        for (x, y), (next_x, next_y) in pairwise(self.knots):
            if position < next_x:
                return peak * (y + (next_y - y) * (position - x) / (next_x - x))
        return peak * self.knots[-1][1]


@dataclass(frozen=True)
class Cyclic(Curve):
    """Linearly up from `base` (a fraction of the peak) to the peak and back, `cycles` times.

    The amplitude is constant ("triangular"), halves with every cycle ("triangular2"), or decays exponentially to the
    fraction `final` ("exp_range": the paper's gamma to the power of the number of iterations; as in torch, `base` does
    not decay).
    Source: Smith, "Cyclical Learning Rates for Training Neural Networks" (2017), section 3.1.
    """

    mode: str
    cycles: int
    base: float
    final: float = 1.0

    def lr(self, peak: float, position: float) -> float:
        cycle, within = divmod(position * self.cycles, 1)
        shrunk = {"triangular": 1, "triangular2": 0.5**cycle, "exp_range": self.final**position}[self.mode]
        return peak * (self.base + (1 - self.base) * shrunk * (1 - abs(2 * within - 1)))


@dataclass(frozen=True)
class Plateau:
    """Constant at the peak, divided by `factor` when the validation loss has not improved for `patience` epochs."""

    factor: float
    patience: int

    def fit(self, learn: "Learner", epochs: int, peak: float, cbs: "Sequence[Callback]" = (), start: int = 0) -> None:
        """Train `learn`, from epoch `start` on."""
        from training.callbacks import ReduceLR

        reduce = ReduceLR("valid_loss", patience=self.patience, factor=self.factor)
        learn.fit(epochs, peak, cbs=[reduce, *cbs], start_epoch=start)


Schedule = OneCycle | Linear | Cyclic | Plateau


FLIPS = ("random", "alternating")


@dataclass(frozen=True)
class Recipe:
    """The settings that a recipe fixes: data, network, augmentation, optimiser and schedule.

    Raises InputError for a value out of range.
    """

    data: str  # the data set it is meant for
    epochs: int
    bs: int  # images a batch
    lr: float  # the schedule's peak
    schedule: Schedule
    momentum: float
    nesterov: bool
    wd: float  # weight decay, on every parameter but those that Muon trains
    label_smoothing: float
    logit_scale: float
    width: int  # channels of the first stage
    flip: float  # probability of a horizontal flip
    flips: str  # "random", or "alternating" from epoch to epoch
    pad: int  # pixels of reflection around the image before the random crop
    cutout: int  # side of the square hole in pixels, 0 for none
    cutmix: float  # alpha of the Beta distribution of fastai's CutMix, 0 for none
    whiten: float  # epsilon of the whitening of the first convolution, 0 for none
    norm_bias_lr: float  # multiple of the learning rate for norm biases; unless it is 1, norm scales stay 1
    ema: float  # decay per step of the moving average of the weights, 0 for no average
    muon: float  # Muon's rate for convolutions, as a multiple of the learning rate, 0 for SGD

    def __post_init__(self):
        for name, least, most in (
            ("epochs", 1, 10_000), ("bs", 2, 1_000_000), ("lr", 0, 1_000), ("momentum", 0, 1), ("wd", 0, 1),
            ("label_smoothing", 0, 1), ("logit_scale", 0, 1_000), ("width", 1, 4096),
            ("flip", 0, 1), ("pad", 0, 31), ("cutout", 0, 32), ("cutmix", 0, 1_000),
            ("whiten", 0, 1), ("norm_bias_lr", 0, 1_000), ("ema", 0, 0.9999), ("muon", 0, 1_000),
        ):  # fmt: skip
            value = getattr(self, name)
            above_0 = name in ("lr", "momentum", "logit_scale", "norm_bias_lr")  # Nesterov needs a momentum
            if not least <= value <= most or (above_0 and value == 0):
                word = "above" if above_0 else "from"
                raise InputError(f"{name} is {value}: it must be {word} {least} and at most {most}")
        if 0 < self.cutmix < 0.01:  # torch's Beta sampler underflows to 0.5, and refuses an alpha that rounds to 0
            raise InputError(f"cutmix is {self.cutmix}: it must be 0, or at least 0.01")
        if self.flips not in FLIPS:
            raise InputError(f"flips is {self.flips!r}: it must be one of {', '.join(FLIPS)}")


# David Page's cifar10-fast, `dawn.py`, and the starting point of ours. His network pools after the ReLU, and each of
# his learning rates comes a step earlier.
ANCESTOR = Recipe(
    data="cifar10",
    epochs=24,  # its author's, for 94 %
    bs=512,  # keeps a GPU busy, and still gives 97 steps an epoch
    lr=0.4,  # a high peak that stays stable, thanks to the scaled logits
    schedule=Linear(((0, 0), (5 / 24, 1), (1, 0))),  # five epochs of warm-up, then all the way down
    momentum=0.9,  # a step is the sum of about the last ten gradients
    nesterov=True,  # looks ahead, which damps the swings at a high learning rate
    wd=5e-4,  # as in most recipes for CIFAR-10; without it, weights before batch norm grow, which shrinks their steps
    label_smoothing=0.0,
    logit_scale=0.125,  # max-pooled features are large: unscaled, the loss starts at 3 to 4 instead of ln 10 = 2.3
    width=64,  # 6.6 M parameters
    flip=0.5,  # a mirrored photograph is as good
    flips="random",
    pad=4,  # an eighth of the side, as in He et al. (2015)
    cutout=8,  # a quarter of the side: hides a part, seldom the whole object
    cutmix=0.0,
    whiten=0.0,
    norm_bias_lr=1.0,
    ema=0.0,
    muon=0.0,
)
# torch's OneCycleLR with pct_start 0.208, over 24 epochs of 98 batches: that puts the peak at step 0.208 * 2352 - 1 of
# 2352, and the end one step before the last.
TORCH_ONE_CYCLE = Linear(((0, 1 / 256), (488.216 / 2352, 1), (2351 / 2352, 0), (1, 0)))
# The run this project descends from: no weight decay, the logits as they are.
SEED = replace(ANCESTOR, lr=0.1, schedule=TORCH_ONE_CYCLE, nesterov=False, wd=0.0, logit_scale=1.0)
# What Page's "bag of tricks" found for this network, as far as it leaves the layers alone, with Jordan's alternating
# flips and Muon; results/README.md has what each gained there, and here. Page's fast norm biases (`norm_bias_lr` 64,
# with logits x 1/16) are left out: at width 16 they cost 0.7 points, perhaps because he has CELU where we have ReLU.
FAST = replace(
    ANCESTOR,
    # A cosine up to the peak and down to a tenth of it: with averaged weights, the rate need not fall to zero.
    schedule=OneCycle(pct_start=0.2, div_final=10),
    label_smoothing=0.2,  # keeps the network from driving its logits ever further apart
    flips="alternating",  # random flips repeat half the images the same way round in the next epoch
    whiten=0.01,  # neighbouring pixels are correlated; without it the network has to learn that first
    ema=0.99,  # the mean of about the last hundred steps, an epoch
    muon=0.1,  # equal steps in all directions of a layer, not only where its gradients are largest
)

RECIPES = {
    "fast": FAST,
    "ancestor": ANCESTOR,
    "seed": SEED,
    # More than three times as long as `fast`. Any further change must first prove itself at full width on a hold-out.
    "best": replace(FAST, epochs=80),
    # The seed project's other variant: a constant learning rate that falls when the validation loss does not; three
    # epochs tell a stall from the noise of one.
    "plateau": replace(SEED, epochs=40, schedule=Plateau(factor=10, patience=3)),
    # Smith's cyclical learning rates: three cycles of eight epochs, each half of which is four, as in the paper.
    "cyclic": replace(FAST, schedule=Cyclic("triangular", cycles=3, base=0.1)),
    "cyclic2": replace(FAST, schedule=Cyclic("triangular2", cycles=3, base=0.01)),  # ends low, so starts lower
    "cyclic-exp": replace(FAST, schedule=Cyclic("exp_range", cycles=3, base=0.01, final=0.1)),
    # Handwritten digits on a laptop in about a minute: the whole job, small.
    "demo": replace(
        ANCESTOR,
        data="digits",
        schedule=OneCycle(pct_start=0.2),
        label_smoothing=0.1,
        epochs=12,  # the last three change next to nothing
        bs=64,  # 22 steps an epoch from 1,438 images
        lr=0.1,  # smaller batches, smaller steps
        width=16,  # 0.41 M parameters, which a CPU can train
        flip=0.0,  # a mirrored 2 is no digit
    ),
}


def get_recipe(recipe: str | Recipe = "fast", **changes) -> Recipe:
    """The recipe of that name (or the one given) with every change that is not None applied.

    Raises InputError for an unknown name, and for a value out of range.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise InputError(f"there is no recipe {recipe!r}; the recipes are {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    changes = {k: v for k, v in changes.items() if v is not None}
    if unknown := sorted(changes.keys() - vars(recipe).keys()):
        raise InputError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(vars(recipe))}")
    return replace(recipe, **changes)


def recipe_table() -> str:
    """All recipes as a table, one column each, with their schedules below."""

    def cell(value) -> str:
        if isinstance(value, Schedule):
            return type(value).__name__
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = [["", *vars(FAST)], *([name, *map(cell, vars(recipe).values())] for name, recipe in RECIPES.items())]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]
    schedules = [f"{name:<{max(map(len, RECIPES))}}  {recipe.schedule}" for name, recipe in RECIPES.items()]
    return "\n".join([*lines, "", "schedules", *schedules])
