"""A first convolution over whitened patches: neighbouring pixels are alike, and whitening decorrelates them.

Source: Page, "How to Train Your ResNet" (2019), part 8, "bag of tricks".
"""

import torch
from fastai.callback import fp16
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch import Tensor, nn
from torch.nn import functional as F

from errors import InputError
from images.table import ImageTable

IMAGES = 5000  # at least as many training images, or all, give the statistics


def whitening_matrix(dls: DataLoaders, eps: float) -> Tensor:
    """The (27, 27) matrix that whitens 3x3 patches of the normalised training images: uncorrelated, with variance one.

    Components with a variance below `eps` stay smaller, as they are mostly noise. Raises InputError for loaders that
    are not from `get_dls`.
    """
    table = getattr(dls.train_ds, "items", None)
    if not isinstance(table, ImageTable):
        raise InputError("whiten: the images must come from get_dls; pass its loaders, or get_recipe(NAME, whiten=0)")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in table.train_stats())
    rows = range(0, len(table), max(1, len(table) // IMAGES))  # evenly spaced, as a table is sorted by class
    covariance = torch.zeros(27, 27, dtype=torch.float64)
    for start in range(0, len(rows), 500):
        pixels, _ = table.batch(list(rows[start : start + 500]))
        patches = F.unfold((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std, 3)  # (n, 27, 900)
        covariance += (patches @ patches.mT).sum(0).double() / (len(rows) * patches.shape[2])
    variances, directions = torch.linalg.eigh(covariance)
    return ((variances.clamp(min=0) + eps) ** -0.5 * directions).T.float()


class Whitening(Callback):
    """Trains the first convolution as one over whitened patches: its weight is W = C `matrix`, and SGD steps in C.

    The network keeps a plain convolution with weight W: a step in C is the step in W with the gradient multiplied by
    matrix^T matrix; weight decay and momentum are the same in both. `start` turns initial weights C into W.
    """

    order = fp16.MixedPrecision.order - 2  # after `GradientAccumulation`, before the gradient scaler's step

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def start(self, conv: nn.Conv2d) -> None:
        """Multiply the weights (c, 3, 3, 3), taken as C, by `matrix`."""
        with torch.no_grad():
            conv.weight.copy_(self._times(conv.weight, self.matrix))

    def before_fit(self):
        self.conv = next(m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        self.metric = (self.matrix.T @ self.matrix).to(self.conv.weight.device)

    def before_step(self):
        grad = self.conv.weight.grad
        if grad is not None:  # unless it is frozen
            grad.copy_(self._times(grad, self.metric))

    @staticmethod
    def _times(weight: Tensor, matrix: Tensor) -> Tensor:
        return (weight.flatten(1) @ matrix.to(weight.device)).view(weight.shape)
