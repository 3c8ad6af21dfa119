"""Augmentation with albumentations, and the rule for its randomness.

What happens to a sample depends only on (seed, epoch, position in the epoch): not on the number of workers, and not on
what was drawn before. An `A.Compose` left alone draws from a generator made when it was built. fastai's workers are
forked from the same parent every epoch, so they would all repeat the same draws, in every epoch.
"""

import os
import random
from collections.abc import Sequence

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the package index for a newer version
import albumentations as A
import cv2


def train_transforms(
    size: int = 32, pad: int = 4, flip: float = 0.5, cutout: int = 8, fill: Sequence[int] = (125, 123, 114)
) -> A.Compose:
    """Reflect `pad` pixels and crop `size`x`size` at random, flip with probability `flip`, then blank out one `cutout`
    x `cutout` square with `fill` (RGB, 0..255). uint8 (size, size, 3) → the same. `cutout` 0 leaves the square out.

    Sources: He et al., "Deep Residual Learning" (2015), section 4.2; DeVries and Taylor, "Cutout" (2017), section 3.
    """
    steps = [
        A.PadIfNeeded(size + 2 * pad, size + 2 * pad, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(size, size),
        A.HorizontalFlip(p=flip),
    ]
    if cutout:
        side = (cutout, cutout)
        fill = tuple(int(v) for v in fill)
        steps.append(A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=fill, p=1))
    return A.Compose(steps)


class KeyedAugment:
    """An albumentations pipeline whose randomness is keyed: the same (seed, epoch, position), the same result."""

    def __init__(self, transforms: A.Compose, seed: int = 0):
        self.transforms, self.seed = transforms, seed
        self._bits = np.random.Philox(key=0)
        self._start = self._bits.state
        self._numpy, self._python = np.random.Generator(self._bits), random.Random()
        self.transforms.set_random_state(self._numpy, self._python)

    def _set_key(self, epoch: int, position: int) -> None:
        # Philox is a counter-based generator: key and counter are its whole state, so that jumping to a sample's own
        # stream costs 2 µs, where a new generator costs 10 to 20. The counter's first word counts a stream's draws.
        self._start["state"]["key"][0] = self.seed
        self._start["state"]["counter"][:] = (0, position, epoch, 0)
        self._bits.state = self._start
        self._python.seed((self.seed << 64) | (epoch << 32) | position)

    def __call__(self, images: np.ndarray, epoch: int, positions: Sequence[int]) -> np.ndarray:
        """Augment uint8 (n, H, W, 3) images that stand at `positions` of `epoch`; a new array of the same shape."""
        out = np.empty_like(images)
        for i, position in enumerate(positions):
            self._set_key(epoch, position)
            out[i] = self.transforms(image=images[i])["image"]
        return out
