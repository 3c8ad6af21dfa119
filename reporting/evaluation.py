"""Evaluation of the trained network on the validation images: confusions, calibration, the worst mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastai.learner import Learner
from sklearn.metrics import confusion_matrix

from images.table import ImageTable
from training.precision import full_precision

BINS = 15  # of confidence, as in the paper that `calibration` names


@dataclass(frozen=True)
class Evaluation:
    """probabilities: float (n, classes); labels: int (n,); `table[i]` is image i and the name of its class."""

    table: ImageTable
    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each image, (n,)."""
        return self.probabilities.argmax(1)

    @property
    def confidence(self) -> np.ndarray:
        """The probability of that class, (n,)."""
        return self.probabilities.max(1)

    @property
    def right(self) -> np.ndarray:
        """Whether the prediction is right, bool (n,)."""
        return self.predicted == self.labels

    def counts(self) -> np.ndarray:
        """The number of images of each class, and how many of them are predicted right, (2, classes)."""
        n = len(self.table.classes)
        return np.stack([np.bincount(labels, minlength=n) for labels in (self.labels, self.labels[self.right])])

    def most_confused(self, k: int) -> np.ndarray:
        """The `k` classes with the most mistakes, as true or as predicted class, in the table's order."""
        n = len(self.table.classes)
        mistakes = sum(np.bincount(labels[~self.right], minlength=n) for labels in (self.labels, self.predicted))
        return np.sort(np.argsort(-mistakes, kind="stable")[:k])

    def confusion(self, classes: Sequence[int]) -> np.ndarray:
        """The confusion matrix of `classes`: a row for each true class, a column for each predicted one."""
        return confusion_matrix(self.labels, self.predicted, labels=classes)

    def calibration(self) -> list[tuple[float, float, int]]:
        """Mean confidence, accuracy and number of images of each bin of confidence that is not empty.

        Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 2.
        """
        bins = np.clip(np.ceil(self.confidence * BINS), 1, BINS)
        masks = [bins == b for b in range(1, BINS + 1) if (bins == b).any()]
        return [(float(self.confidence[m].mean()), float(self.right[m].mean()), int(m.sum())) for m in masks]

    def calibration_error(self) -> float:
        """The expected calibration error: the mean gap of confidence and accuracy, 0 to 1. Source: as `calibration`."""
        n = len(self.labels)
        return sum(count / n * abs(accuracy - confidence) for confidence, accuracy, count in self.calibration())

    def most_wrong(self, k: int) -> np.ndarray:
        """The `k` wrong predictions with the highest confidence, or fewer if there are fewer; indices."""
        order = np.argsort(-self.confidence, kind="stable")
        return order[~self.right[order]][:k]

    def most_uncertain(self, k: int) -> np.ndarray:
        """The `k` predictions with the lowest confidence; indices."""
        return np.argsort(self.confidence, kind="stable")[:k]


def evaluate(learn: Learner) -> Evaluation:
    """The learner's predictions on its validation set, in fp32."""
    with learn.no_bar(), learn.no_logging(), full_precision(learn):
        probabilities, labels = learn.get_preds()
    return Evaluation(learn.dls.valid_ds.items, labels.numpy(), probabilities.numpy())
