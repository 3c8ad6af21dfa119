"""The learner: the recipe's network, loss and optimiser in fastai's `Learner`."""

from functools import partial

import fastai.callback.hook  # gives every Learner its summary
import fastai.callback.schedule  # noqa: F401  lr_find and fit_one_cycle
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import default_device, set_seed
from fastcore.basics import defaults
from fastcore.foundation import L

from data import get_dls
from images.sources import load_images
from model import CustomResNet
from options import Options
from recipes import Recipe, get_recipe
from trained.learner_file import carry_our_code
from training.averaging import WeightAverage
from training.callbacks import LazyCutMix, LazyProgress, LazyRecorder
from training.distributed import in_turns
from training.events import StepLearner
from training.optimizer import SGD, body_and_head, norm_biases_apart, norms
from training.precision import MixedPrecision, choose_precision
from training.whitening import Whitening, whitening_matrix


def get_learner(
    dls: DataLoaders, recipe: str | Recipe = "fast", norm: str = "batch", precision: str = "auto", **kwargs
) -> Learner:
    """A fastai `Learner`: the recipe's network, loss and optimiser, channels-last, in mixed precision.

    `precision` is "fp32", "bf16", "fp16", or "auto" for the fastest that the device has. `kwargs` go to `Learner`;
    callbacks in them are added to the recipe's. Raises InputError for an unknown recipe, for one with whitening on
    loaders that are not from `get_dls`, and for a precision that the device lacks, ValueError for an unknown norm.
    """
    carry_our_code()
    recipe = get_recipe(recipe)
    device = torch.device(getattr(dls, "device", None) or default_device())
    model = CustomResNet(len(dls.vocab), recipe.width, norm, recipe.logit_scale).to(device)
    lazy = {Recorder: LazyRecorder, ProgressCallback: LazyProgress}
    cbs = [*(lazy.get(cb, cb) for cb in defaults.callbacks), ChannelsLast()]
    precision = choose_precision(precision, device)
    cbs.append(MixedPrecision(precision))
    if device.type == "cuda":
        # All batches have one shape, so cuDNN times its algorithms once. The winner can differ from run to run.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    settings = {
        "loss_func": CrossEntropyLossFlat(label_smoothing=recipe.label_smoothing),
        "lr": recipe.lr,
        "wd": recipe.wd,
        "moms": (recipe.momentum,) * 3,  # constant, where fastai's default cycles it against the learning rate
        "metrics": accuracy,
        "cbs": [*cbs, *recipe_callbacks(recipe, dls, model), *L(kwargs.pop("cbs", None))],
        "default_cbs": False,
    }
    return StepLearner(dls, model, **{**settings, **optimizer(recipe, model, precision), **kwargs})


def recipe_callbacks(recipe: Recipe, dls: DataLoaders, model: CustomResNet) -> list[Callback]:
    """The callbacks of the recipe's tricks. `model` must be new: whitening changes its initial weights."""
    cbs = []
    if recipe.cutmix:
        cbs.append(LazyCutMix(recipe.cutmix))
    if recipe.whiten:
        cbs.append(Whitening(whitening_matrix(dls, recipe.whiten)))
        cbs[-1].start(model.body[0])
    if recipe.ema:
        cbs.append(WeightAverage(recipe.ema))
    return cbs


def optimizer(recipe: Recipe, model: CustomResNet, precision: str) -> dict:
    """The recipe's optimiser and parameter groups, as `Learner`'s arguments `opt_func` and `splitter`."""
    opt_func = partial(SGD, momentum=recipe.momentum, nesterov=recipe.nesterov)
    if recipe.muon:
        opt_func = partial(opt_func, muon=recipe.muon, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    elif next(model.parameters()).device.type == "cuda":
        opt_func = partial(opt_func, fused=True)
    if recipe.norm_bias_lr == 1:
        return {"opt_func": opt_func, "splitter": body_and_head}
    for norm in norms(model):
        norm.weight.requires_grad_(False)  # the next convolution can scale as well, and the biases can learn fast
    return {"opt_func": partial(opt_func, lr_scales=(recipe.norm_bias_lr, 1.0, 1.0)), "splitter": norm_biases_apart}


def new_learner(options: Options, device: torch.device) -> Learner:
    """The learner that the command trains with these options on `device`, its weights drawn from the seed."""
    settings = options.settings()
    images = in_turns(partial(load_images, settings.data))
    dls = get_dls(
        images, settings.bs, options.seed, options.workers, options.valid, device, options.valid_pct, settings.flips,
        pad=settings.pad, flip=settings.flip, cutout=settings.cutout,
    )  # fmt: skip
    set_seed(options.seed)
    return get_learner(dls, settings, options.norm, options.precision)
