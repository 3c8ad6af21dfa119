"""torch's SGD in fastai's clothes: its hyper-parameters can be set from wherever fastai sets them, group by group."""

from collections.abc import Iterator, MutableMapping

import torch
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from torch import nn

NAMES = {"lr": "lr", "mom": "momentum", "wd": "weight_decay"}  # fastai's, torch's


class Hypers(MutableMapping):
    """One parameter group's `lr`, `mom` and `wd`, read and written where torch keeps them.

    A group's `lr_scale` multiplies its learning rate and divides its weight decay; here both are without it, so that
    one number suits all groups.
    """

    def __init__(self, group: dict):
        self.group = group
        scale = group.get("lr_scale", 1.0)
        self.scales = {"lr": scale, "mom": 1.0, "wd": 1 / scale}

    def __getitem__(self, name: str) -> float:
        return self.group[NAMES[name]] / self.scales[name]

    def __setitem__(self, name: str, value: float) -> None:
        self.group[NAMES[name]] = value * self.scales[name]

    def __delitem__(self, name: str) -> None:
        raise TypeError("a hyper-parameter cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


class SGD(OptimWrapper):
    """torch's SGD, which has the Nesterov momentum that fastai's lacks and takes all parameters at once.

    fastai's own wrapper hands out copies of the hyper-parameters, so that what a callback writes there is lost, and
    among them torch's switches, which no log takes for numbers. `fused` has a device take a step in one go.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float,
        nesterov: bool,
        lr_scales: tuple[float, ...] = (),
        fused: bool = False,
    ):
        super().__init__(params, torch.optim.SGD, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused or None)
        for group, scale in zip(self.opt.param_groups, lr_scales, strict=bool(lr_scales)):
            group["lr_scale"] = scale

    @property
    def hypers(self) -> list[Hypers]:
        return [Hypers(group) for group in self.opt.param_groups]

    def _set_hyper(self, name, values):
        for hypers, value in zip(self.hypers, values, strict=True):
            hypers[name] = value


def norms(model: nn.Module) -> list[nn.Module]:
    """The normalisation layers."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """fastai's splitter for `freeze` and for rates that differ: all that comes before the classifier, and that."""
    return [params(model.body), params(model.head)]


def norm_biases_apart(model: nn.Module) -> list[list[nn.Parameter]]:
    """`body_and_head`, with the biases of norms as a group before them, and the scales of norms in none."""
    biases = [norm.bias for norm in norms(model)]
    apart = {id(p) for norm in norms(model) for p in (norm.bias, norm.weight)}
    return [biases, *([p for p in group if id(p) not in apart] for group in body_and_head(model))]
