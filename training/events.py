"""A learner that calls, at each event of a batch, only the callbacks that handle it."""

from fastai.callback.core import Callback, _inner_loop
from fastai.learner import Learner

STEP = frozenset(_inner_loop)  # the events of a batch


def answers(cb: Callback, event_name: str) -> bool:
    """Whether a callback handles the event: it or its class defines it, or overrides how events are dispatched."""
    own = type(cb)
    if event_name in vars(cb) or hasattr(own, event_name):
        return True
    return own.__call__ is not Callback.__call__ or own.__getattr__ is not Callback.__getattr__


class StepLearner(Learner):
    """fastai's `Learner`, but at the events of a batch it calls, in fastai's order, only callbacks that handle them.

    fastai calls all of them, and those without a handler look for one in the learner and in the network, at eight
    events a step: a millisecond of Python, for which a fast GPU waits.

    `fitting`: whether epochs are being trained; a callback that predicts meanwhile sends a second `before_fit` and
    `after_fit`, at which what belongs to the training must stay.
    """

    fitting = False

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "fitting": False}  # of an export by a callback

    def _do_fit(self):
        self.fitting = True
        try:
            super()._do_fit()
        finally:
            self.fitting = False

    def one_batch(self, *args, **kwargs):
        try:
            super().one_batch(*args, **kwargs)
        except BaseException:  # Ctrl-C, or too little memory: no `after_batch` comes
            if hasattr(self, "autocast"):
                self.autocast.contexts.close()  # else all that the process computes from now on would be in bf16
            raise

    def to_channelslast(self, *args, **kwargs):
        """fastai's, which returns None where the network is channels-last already."""
        super().to_channelslast(*args, **kwargs)
        return self

    def _call_one(self, event_name):
        if event_name not in STEP:
            super()._call_one(event_name)
            return
        for cb in self.cbs.sorted("order"):
            if answers(cb, event_name):
                cb(event_name)

    def lr_find(self, *args, **kwargs):
        """fastai's `lr_find`; it does not count as an epoch of the loader, so that training sees the same batches."""
        train = self.dls.train
        epoch = getattr(train, "epoch", None)
        try:
            return super().lr_find(*args, **kwargs)
        finally:
            if epoch is not None:
                train.epoch = epoch
