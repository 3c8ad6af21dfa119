"""The network: a 9-layer residual network for 32x32 images, a plain `nn.Module` that needs torch alone.

The layout is that of David Page's `cifar10-fast` network (https://myrtle.ai/learn/how-to-train-your-resnet/, part 4),
pooled before the norm, as in his part 8, and with a bias in the classifier: 6,573,130 parameters at the defaults.
"""

from math import gcd

import torch
from torch import Tensor, nn

IMAGE_SHAPE = (3, 32, 32)
# "layer" is a LayerNorm over channels and space, in torch a GroupNorm of one group. 32 groups as in the paper (Wu and
# He, "Group Normalization", 2018); for narrow layers gcd takes the largest power of two that divides the channels.
NORMS = {
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "group": lambda channels: nn.GroupNorm(gcd(32, channels), channels),
}


def conv_norm_relu(c_in: int, c_out: int, norm: str, pool: bool = False) -> list[nn.Module]:
    """3x3 convolution, optional 2x2 max-pool, norm, ReLU. Pooling before the norm saves three quarters of its work."""
    conv = nn.Conv2d(c_in, c_out, kernel_size=3, padding=1, bias=False)
    return [conv, *([nn.MaxPool2d(2)] if pool else []), NORMS[norm](c_out), nn.ReLU(inplace=True)]


class ModifiedResBlock(nn.Module):
    """(N, c_in, H, W) → (N, c_out, H/2, W/2): x + res(x), where x = ReLU(norm(pool(conv(input)))) halves the image."""

    def __init__(self, c_in: int, c_out: int, norm: str):
        super().__init__()
        self.stem = nn.Sequential(*conv_norm_relu(c_in, c_out, norm, pool=True))
        self.res = nn.Sequential(*conv_norm_relu(c_out, c_out, norm), *conv_norm_relu(c_out, c_out, norm))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.res(x)


class CustomResNet(nn.Module):
    """(N, 3, 32, 32) float → (N, num_classes) logits.

    `width` is the number of channels of the first stage; `norm` is "batch", "layer" or "group"; the logits are
    multiplied by `logit_scale`. Raises ValueError for a wrong argument or input shape.
    """

    def __init__(self, num_classes: int = 10, width: int = 64, norm: str = "batch", logit_scale: float = 1.0):
        super().__init__()
        for name, value, least in (("num_classes", num_classes, 2), ("width", width, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least {least}")
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}: it must be one of {', '.join(map(repr, NORMS))}")
        self.logit_scale = logit_scale
        self.body = nn.Sequential(
            *conv_norm_relu(3, width, norm),
            ModifiedResBlock(width, 2 * width, norm),
            *conv_norm_relu(2 * width, 4 * width, norm, pool=True),
            ModifiedResBlock(4 * width, 8 * width, norm),
        )
        self.pool = nn.MaxPool2d(4)
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != IMAGE_SHAPE or not torch.is_floating_point(x):
            raise ValueError(f"input is {tuple(x.shape)} {x.dtype}: it must be (N, 3, 32, 32) of a float type")
        return self.classify(self.body(x))

    def classify(self, features: Tensor) -> Tensor:
        """The body's output, (N, 8 * width, 4, 4) → logits (N, num_classes)."""
        return self.head(self.pool(features).flatten(1)) * self.logit_scale
