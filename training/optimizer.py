"""torch's SGD as a fastai optimiser whose hyper-parameters can be set, group by group, wherever fastai sets them.

Also Muon, for the convolutions.
"""

from collections.abc import Iterator, MutableMapping
from functools import partial

import torch
from fastai.optimizer import OptimWrapper
from fastai.torch_core import params
from fastcore.foundation import L
from torch import Tensor, nn

NAMES = {"lr": "lr", "mom": "momentum", "wd": "weight_decay"}  # fastai's, torch's


class Hypers(MutableMapping):
    """One parameter group's `lr`, `mom` and `wd`, read from and written to torch's parameter group.

    A group's `lr_scale` multiplies its learning rate and divides its weight decay. The values here are without it, so
    that one number fits all groups.
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

    def __repr__(self) -> str:
        return repr(self.copy())

    def copy(self) -> dict[str, float]:
        return dict(self)


def orthogonal(matrix: Tensor) -> Tensor:
    """(m, n) with m <= n → the same singular vectors, with singular values from 0.7 to 1.2, except for those next to 0.

    Five steps of a Newton-Schulz iteration whose polynomial is steep at 0. Source: Jordan, "Muon: An optimizer for
    hidden layers in neural networks" (2024).
    """
    x = matrix / (matrix.norm() + 1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.T
        # addmm, as in torch's own Muon: three kernels an iteration, where operators would start eight.
        update = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, update, x, beta=3.4445)
    return x


class Muon(torch.optim.SGD):
    """Muon for the weights of all convolutions but the one that reads the image, and torch's SGD for all else.

    A convolution's step is its momentum made orthogonal, which changes every direction of the layer equally. Its
    weights are rescaled to a fixed norm before each step instead of decayed: the norm layer behind them cancels their
    scale. `scale` multiplies their learning rate; `dtype` is that of the orthogonalisation. torch's own Muon takes
    matrices only. Source of the fixed norm: Jordan's cifar10-airbench, `airbench94_muon.py`.
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
                p.grad = None  # so that SGD skips it
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
    """torch's SGD, which has the Nesterov momentum that fastai's lacks, and on a GPU updates all parameters at once.

    fastai's own wrapper returns copies of the hyper-parameters, so that a callback's changes are lost, and torch's
    switches among them, which loggers cannot log as numbers. `fused` updates all parameters in one kernel. `muon`, if
    not 0, trains the convolutions by Muon at that multiple of the learning rate, computed in `dtype`.
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
    def hypers(self) -> L:
        return L(map(Hypers, self.opt.param_groups))

    def _set_hyper(self, name, values):
        for hypers, value in zip(self.hypers, values, strict=True):
            hypers[name] = value


def norms(model: nn.Module) -> list[nn.Module]:
    """The normalisation layers."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]


def body_and_head(model: nn.Module) -> list[list[nn.Parameter]]:
    """fastai's splitter, for `freeze` and discriminative learning rates: the body, and the classifier."""
    return [params(model.body), params(model.head)]


def norm_biases_apart(model: nn.Module) -> list[list[nn.Parameter]]:
    """The biases of norms as a group of their own, before `body_and_head` without them; norm scales are in none."""
    biases = [norm.bias for norm in norms(model)]
    apart = {id(p) for norm in norms(model) for p in (norm.bias, norm.weight)}
    return [biases, *([p for p in group if id(p) not in apart] for group in body_and_head(model))]
