"""A trained model from any file: its header, and its logits for uint8 pixels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from errors import InputError
from trained.classifier import without_tf32


@dataclass(frozen=True)
class Model:
    """A trained model. header: the file's metadata, at least `classes`; logits: uint8 (n, 32, 32, 3) → (n, classes)."""

    header: dict
    logits: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of_torch(cls, classifier: nn.Module, header: dict, device: torch.device) -> "Model":
        """`classifier` as a model, moved to `device`."""
        classifier.to(device, memory_format=torch.channels_last)  # the layout of the pixels

        @torch.inference_mode()
        @without_tf32()
        def logits(images: np.ndarray) -> np.ndarray:
            return classifier(torch.from_numpy(images).to(device)).cpu().numpy()

        return cls(header, logits)

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        return self.header["classes"]

    def probabilities(self, images: np.ndarray, tta: bool = False) -> np.ndarray:
        """uint8 (n, 32, 32, 3) → float (n, classes); with `tta`, logits are averaged with those of the mirror image.

        Raises InputError if the network's output is not a finite number for each class.
        """
        logits = self.logits(images)
        if tta:
            logits = (logits + self.logits(np.ascontiguousarray(images[:, :, ::-1]))) / 2
        if np.shape(logits) != (len(images), len(self.classes)) or not np.isfinite(logits).all():
            raise InputError("the network's answer is not a finite number for each class; pass another file of it")
        return F.softmax(torch.from_numpy(logits), 1).numpy()


def cpu_only(path: Path, device: str) -> None:
    """Raise InputError for a device other than the CPU."""
    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: a {path.suffix} file runs on the CPU; pass the run's model.safetensors")
