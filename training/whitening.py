"""A first convolution that sees whitened patches: the directions of a 3x3 patch, as alike as they are, weigh the same.

Source: Page, "How to Train Your ResNet" (2019), part 8, "bag of tricks".
"""

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from torch import Tensor, nn
from torch.nn import functional as F

from errors import InputError
from images.table import ImageTable

IMAGES = 5000  # of the training set, at the least


def whitening_matrix(dls: DataLoaders, eps: float) -> Tensor:
    """(27, 27): what makes of the normalised training images' 3x3 patches uncorrelated numbers of variance one.

    Those of a variance below `eps` stay smaller: they are mostly noise. Raises InputError for loaders that are not
    those of `get_dls`.
    """
    table = getattr(dls.train_ds, "items", None)
    if not isinstance(table, ImageTable):
        raise InputError("whiten: the images must come from get_dls; pass its loaders, or get_recipe(NAME, whiten=0)")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in table.train_stats())
    rows = range(0, len(table), max(1, len(table) // IMAGES))  # of all classes: a table has one after the other
    covariance = torch.zeros(27, 27, dtype=torch.float64)
    for start in range(0, len(rows), 500):
        pixels, _ = table.batch(list(rows[start : start + 500]))
        patches = F.unfold((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std, 3)  # (n, 27, 900)
        covariance += (patches @ patches.mT).sum(0).double() / (len(rows) * patches.shape[2])
    variances, directions = torch.linalg.eigh(covariance)
    return ((variances.clamp(min=0) + eps) ** -0.5 * directions).T.float()


class Whitening(Callback):
    """Trains the first convolution as one over whitened patches, W = C `matrix` with C as what is learned.

    The network stays as it is: a step of SGD in C is one in W whose gradient has been multiplied by matrix^T matrix,
    and weight decay and momentum are the same in both. `start` makes of the initial C the initial W.
    """

    order = 5  # before the gradient scaler's step

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    def start(self, conv: nn.Conv2d) -> None:
        """Take the weights (c, 3, 3, 3) for C."""
        with torch.no_grad():
            conv.weight.copy_(self._times(conv.weight, self.matrix))

    def before_fit(self):
        self.conv = next(m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        self.metric = (self.matrix.T @ self.matrix).to(self.dls.device)

    def before_step(self):
        grad = self.conv.weight.grad
        if grad is not None:  # it is not frozen
            grad.copy_(self._times(grad, self.metric))

    @staticmethod
    def _times(weight: Tensor, matrix: Tensor) -> Tensor:
        return (weight.flatten(1) @ matrix.to(weight.device)).view(weight.shape)
