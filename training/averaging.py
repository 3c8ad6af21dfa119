"""An exponential moving average of the weights, which is validated and kept in place of the trained weights."""

from collections.abc import Iterator
from copy import deepcopy
from itertools import chain

from fastai.callback.core import Callback
from fastai.learner import get_model
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.distributed import same_buffers

EVERY = 5  # steps between two updates of the average


class WeightAverage(Callback):
    """Averages weights and norm statistics during training; validation, and the network after the fit, use the average.

    decay: the fraction of the average kept at a step. Source: Page, "How to Train Your ResNet" (2019), part 8.
    """

    order = 80  # after callbacks that look at the trained weights; the checkpoint comes later and keeps both

    def __init__(self, decay: float):
        self.decay, self.average, self.steps, self.trained, self.swapped = decay, None, 0, False, False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "average": None}

    def before_fit(self):
        self.run = not hasattr(self, "lr_finder") and not hasattr(self, "gather_preds")
        if self.run:
            self.average, self.steps, self.swapped = deepcopy(get_model(self.model)), 0, False

    def before_train(self):
        self.trained = False
        self._exchange(False)

    def after_step(self):
        self.steps += 1
        if self.steps % EVERY == 0:
            self._update(self.steps // EVERY - 1)

    def after_train(self):
        self.trained = True

    def before_validate(self):
        if self.trained:  # not when a notebook validates without training
            self._exchange(True)
            same_buffers(self.model)

    def after_cancel_fit(self):  # before `SaveModelCallback` loads the best weights in `after_fit`
        self._exchange(True)

    def after_fit(self):
        self._exchange(True)
        self.average, self.trained = None, False

    def _update(self, number: int) -> None:
        # A smaller decay at first, so that the average soon forgets the initial weights; the first update is a copy.
        decay = min(self.decay**EVERY, (1 + number) / (10 + number)) if number else 0
        weights, averages = map(list, zip(*self._pairs(), strict=True))
        # torch's `AveragedModel` would also copy its count of updates to the device, and wait for that.
        get_ema_multi_avg_fn(decay)(averages, weights, number)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every weight and norm statistic of the network, with its average."""
        tensors = (chain(m.parameters(), m.buffers()) for m in (get_model(self.model), self.average))
        return (pair for pair in zip(*tensors, strict=True) if pair[0].is_floating_point())  # batch norm counts batches

    def _exchange(self, swapped: bool) -> None:
        """Swap the network's weights with the average, or back; nothing is copied or rounded."""
        if self.swapped != swapped and self.steps >= EVERY:
            for ours, average in self._pairs():
                ours.data, average.data = average.data, ours.data
            self.swapped = swapped

    def state_dict(self) -> dict:
        return {"average": self.average.state_dict(), "steps": self.steps, "swapped": self.swapped}

    def load_state_dict(self, state: dict):
        self.average.load_state_dict(state["average"])
        self.steps, self.swapped = state["steps"], state["swapped"]
