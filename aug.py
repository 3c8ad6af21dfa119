"""Augmentation with albumentations, and the rule for its randomness.

How a sample is augmented depends only on (seed, epoch, position in the epoch), and with alternating flips on which
image it is: not on the number of workers, and not on earlier draws. An `A.Compose` by itself draws from a generator
made when it was built. fastai forks its workers from the same parent in every epoch, so all of them would repeat the
same draws, epoch after epoch.
"""

import os
import random
from collections.abc import Sequence

import numpy as np

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the package index for a newer version
import albumentations as A
import cv2

cv2.setNumThreads(0)  # images this small are done before another thread has started; forked workers inherit this


class Cutout(A.ImageOnlyTransform):
    """Fill one `size` x `size` square, at a uniformly random place inside the image, with `fill` (RGB, 0..255).

    Equal in distribution to `A.CoarseDropout` with one hole of that size, which also draws the number of holes and
    their sizes and takes several times as long. Source: DeVries and Taylor, "Cutout" (2017), section 3, where a square
    may stick out of the image; Page's cifar10-fast has it inside.
    """

    def __init__(self, size: int = 8, fill: Sequence[int] = (125, 123, 114), p: float = 1.0):
        super().__init__(p=p)
        self.size, self.fill = size, tuple(int(v) for v in fill)

    def get_params_dependent_on_data(self, params, data):
        height, width = params["shape"][:2]
        y, x = self.py_random.randint(0, height - self.size), self.py_random.randint(0, width - self.size)
        return {"rows": slice(y, y + self.size), "columns": slice(x, x + self.size)}

    def apply(self, img, rows, columns, **params):
        img = img.copy()
        img[rows, columns] = self.fill
        return img


def train_transforms(
    size: int = 32, pad: int = 4, flip: float = 0.5, cutout: int = 8, fill: Sequence[int] = (125, 123, 114)
) -> A.Compose:
    """Pad by `pad` reflected pixels, crop `size` x `size` at random, flip with probability `flip`, and fill one
    `cutout` x `cutout` square with `fill` (RGB, 0..255); 0 for no square. uint8 (size, size, 3) → the same.

    Source of pad, crop and flip: He et al., "Deep Residual Learning" (2015), section 4.2; of the reflection: Page's
    cifar10-fast.
    """
    steps = [
        A.PadIfNeeded(size + 2 * pad, size + 2 * pad, border_mode=cv2.BORDER_REFLECT_101),
        A.RandomCrop(size, size),
        A.HorizontalFlip(p=flip),
    ]
    return A.Compose([*steps, Cutout(cutout, fill)] if cutout else steps)


class BitRandom(random.Random):
    """Python's random numbers, drawn from a numpy bit generator instead of a generator of its own."""

    def __init__(self, bits: np.random.BitGenerator):
        self._bits, self._raw = bits, bits.random_raw
        super().__init__()

    def __reduce__(self):
        return BitRandom, (self._bits,)

    def seed(self, *_):
        """Does nothing: the bit generator is seeded instead."""

    def random(self) -> float:
        return (self._raw() >> 11) * 2.0**-53

    def getrandbits(self, k: int) -> int:
        value = 0
        for _ in range(0, k, 64):
            value = value << 64 | self._raw()
        return value >> (-k % 64)


_AUGMENTATION, _PARITY = 0, 1  # the purposes that have random streams of their own


class KeyedAugment:
    """An albumentations pipeline with keyed randomness: the same (seed, epoch, position) gives the same result.

    With `alternating`, an image is flipped in every other epoch, so that any two epochs in a row show both of its
    orientations. Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), section 3.6.
    """

    def __init__(self, transforms: A.Compose, seed: int = 0, alternating: bool = False):
        self.alternating = alternating
        first = next(iter(transforms.transforms), None)
        self.pad = None
        if isinstance(first, A.PadIfNeeded) and first.position != "random" and first.p == transforms.p == 1:
            # Padding is the same for every image; albumentations takes a quarter of the time for a whole batch at once.
            self.pad, transforms = first, A.Compose(transforms.transforms[1:])
        self.transforms = transforms
        self._bits = np.random.Philox(key=[seed, 0])
        self._start = self._bits.state
        self.transforms.set_random_state(np.random.Generator(self._bits), BitRandom(self._bits))

    def __call__(
        self, images: np.ndarray, epoch: int, positions: Sequence[int], rows: Sequence[int] = ()
    ) -> np.ndarray:
        """Augment uint8 (n, H, W, 3) images that stand at `positions` of `epoch`; a new array of the same shape.

        rows: each image's number, by which alternating flips know it.
        """
        out = np.empty_like(images)
        if self.alternating:
            turned = [self._stream(0, row, _PARITY).random_raw() + epoch & 1 for row in rows]
            images = np.where(np.array(turned, bool)[:, None, None, None], images[:, :, ::-1], images)
        if self.pad is not None:
            images = self.pad(images=images)["images"]
        for i, position in enumerate(positions):
            self._stream(epoch, position, _AUGMENTATION)
            out[i] = self.transforms(image=images[i])["image"]
        return out

    def _stream(self, epoch: int, place: int, purpose: int) -> np.random.BitGenerator:
        """The bit generator, at the start of the stream for (epoch, place, purpose).

        Philox is counter-based: its whole state is a key and a counter, so moving to a stream costs 1 µs, where seeding
        a generator costs 7 to 20. The counter's first word counts the draws within a stream.
        """
        self._start["state"]["counter"][:] = (0, place, epoch, purpose)
        self._bits.state = self._start
        return self._bits
