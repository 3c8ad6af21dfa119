"""A trained network as a function of pixels, and Grad-CAM, which shows where in an image its answer comes from."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from images.decoding import SIZE

if TYPE_CHECKING:
    from fastai.learner import Learner


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within this, a GPU computes fp32 convolutions in full; torch's default there is TF32, good to three digits."""
    cudnn = import_module("torch.backends.cudnn")  # a usual import could not be pickled into an exported learner
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


class Classifier(nn.Module):
    """A network with its normalisation: decoded images, uint8 (N, 32, 32, 3) → logits (N, classes).

    mean, std: of each channel, in the range 0..1. Raises ValueError for another shape or type.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        device = next(network.parameters()).device
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, device=device).view(3, 1, 1))

    def normalized(self, images: Tensor) -> Tensor:
        """The network's input, float (N, 3, 32, 32)."""
        if tuple(images.shape[1:]) != (SIZE, SIZE, 3) or images.dtype != torch.uint8:
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}: they must be (N, {SIZE}, {SIZE}, 3) uint8"
            )
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalized(images))


def classifier_of(learn: "Learner") -> Classifier:
    """The learner's network, in evaluation mode, with its loader's normalisation. Shares the weights."""
    normalize = learn.dls.valid.after_batch.normalize
    return Classifier(learn.model.eval(), *(t.flatten().tolist() for t in (normalize.mean, normalize.std)))


def grad_cam(classifier: Classifier, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Heat maps (n, 32, 32), 0 to 1: where uint8 (n, 32, 32, 3) `images` are evidence for `classes` (n,).

    Computed from the body's output, 4x4, and interpolated. Source: Selvaraju et al., "Grad-CAM" (2017), section 3.
    """
    network, device = classifier.network, classifier.mean.device
    x = classifier.normalized(torch.from_numpy(images).to(device))
    with torch.enable_grad():
        activations = network.body(x)
        scores = network.classify(activations).gather(1, torch.from_numpy(classes).to(device)[:, None])
        (gradients,) = torch.autograd.grad(scores.sum(), activations)
    maps = F.relu((gradients.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True)).detach()
    maps = F.interpolate(maps, size=x.shape[2:], mode="bilinear")[:, 0]
    return (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()


def example_images() -> Tensor:
    """Images to trace the network with."""
    return torch.zeros(2, 32, 32, 3, dtype=torch.uint8)  # torch would take a batch size of one for a constant
