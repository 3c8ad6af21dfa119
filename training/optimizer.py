"""torch's SGD in fastai's clothes: its hyper-parameters can be set from wherever fastai sets them, group by group.

Muon is one for the convolutions.
"""

from collections.abc import Iterator, MutableMapping
from functools import partial

import torch
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from torch import Tensor, nn

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


def orthogonal(matrix: Tensor) -> Tensor:
    """(m, n) with m <= n → the same singular vectors, with singular values from 0.7 to 1.2, those next to 0 apart.

    Five steps of a Newton-Schulz iteration whose polynomial is steep at 0. Source: Jordan, "Muon: An optimizer for
    hidden layers in neural networks" (2024).
    """
    x = matrix / (matrix.norm() + 1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon(torch.optim.SGD):
    """torch's SGD, but for the weights of convolutions, the one that reads the image apart.

    Their momentum is made orthogonal, so that a step changes each direction of a layer as much as any other, and they
    keep the norm that such a step has: the norm layer behind them makes their scale immaterial, and weight decay with
    it. torch's Muon takes matrices alone. `scale` multiplies their learning rate, and `dtype` is what is computed in.
    """

    dtype = torch.float32

    def __init__(self, params, scale: float, dtype: torch.dtype, **kwargs):
        super().__init__(params, **kwargs)
        self.dtype = dtype
        for group in self.param_groups:
            group["muon"] = scale

    @torch.no_grad()
    def step(self, closure=None):
        convs = [(group, p) for group in self.param_groups for p in group["params"] if p.ndim == 4 and p.shape[1] > 3]
        grads = [p.grad for _, p in convs]
        for group, p in convs:
            if p.grad is not None:  # it is not frozen
                self._step(p, group["lr"] * group["muon"], group["momentum"], group["nesterov"])
                p.grad = None  # so that SGD passes it by
        loss = super().step(closure)
        for (_, p), grad in zip(convs, grads, strict=True):
            p.grad = grad
        return loss

    def _step(self, p: Tensor, lr: float, momentum: float, nesterov: bool) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean = state["momentum_buffer"].mul_(momentum).add_(p.grad)
        update = p.grad + momentum * mean if nesterov else mean
        p.mul_(len(p) ** 0.5 / p.norm())
        p.sub_(lr * orthogonal(update.flatten(1).to(self.dtype)).view_as(p))


class SGD(OptimWrapper):
    """torch's SGD, which has the Nesterov momentum that fastai's lacks and takes all parameters at once.

    fastai's own wrapper hands out copies of the hyper-parameters, so that what a callback writes there is lost, and
    among them torch's switches, which no log takes for numbers. `fused` has a device take a step in one go; `muon`, if
    it is not 0, has convolutions take Muon's steps, at so many times the learning rate, computed in `dtype`.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float,
        nesterov: bool,
        lr_scales: tuple[float, ...] = (),
        fused: bool = False,
        muon: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        opt = partial(Muon, scale=muon, dtype=dtype) if muon else torch.optim.SGD
        super().__init__(params, opt, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused or None)
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
