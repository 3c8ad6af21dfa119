"""An exponential moving average of the weights, which is validated and kept in place of the trained weights."""

from itertools import chain

from fastai.callback.core import Callback
from fastai.learner import get_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.distributed import same_buffers

EVERY = 5  # steps between two updates of the average


class WeightAverage(Callback):
    """Averages weights and norm statistics during training; validation, and the network after the fit, use the average.

    decay: the fraction of the average kept at a step. Source: Page, "How to Train Your ResNet" (2019), part 8.
    """

    order = 80  # after callbacks that look at the trained weights; the checkpoint comes later and keeps both

    def __init__(self, decay: float):
        self.decay, self.average, self.trained, self.swapped = decay, None, False, False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "average": None}

    def before_fit(self):
        self.run = not hasattr(self, "lr_finder")
        if self.run:
            self.average = AveragedModel(get_model(self.model), multi_avg_fn=self._update, use_buffers=True)
            self.swapped = False

    def before_train(self):
        self.trained = False
        self._exchange(False)

    def after_batch(self):
        if self.training and self.train_iter % EVERY == 0:
            self.average.update_parameters(get_model(self.model))

    def after_train(self):
        self.trained = True

    def before_validate(self):
        if self.trained:  # not when a notebook validates without training
            self._exchange(True)
            same_buffers(self.model)

    def after_fit(self):
        self._exchange(True)
        self.average, self.trained = None, False

    def _update(self, average, weights, updates):
        # A smaller decay at first, so that the average soon forgets the initial weights.
        n = int(self.average.n_averaged)  # on the CPU, so reading it waits for nothing
        decay = min(self.decay**EVERY, (1 + n) / (10 + n))
        get_ema_multi_avg_fn(decay)(average, weights, updates)

    def _exchange(self, swapped: bool) -> None:
        """Swap the network's weights with the average, or back; nothing is copied or rounded."""
        if self.swapped != swapped and self.average.n_averaged:
            pairs = (chain(m.parameters(), m.buffers()) for m in (get_model(self.model), self.average.module))
            for ours, average in zip(*pairs, strict=True):
                ours.data, average.data = average.data, ours.data
            self.swapped = swapped

    def state_dict(self) -> dict:
        return {"average": self.average.state_dict(), "swapped": self.swapped}

    def load_state_dict(self, state: dict):
        self.average.load_state_dict(state["average"])
        self.swapped = state["swapped"]
