"""A learner whose events cost what the callbacks that wait for them do."""

from fastai.callback.core import Callback, _inner_loop
from fastai.learner import Learner

STEP = frozenset(_inner_loop)  # the events of a batch


def answers(cb: Callback, event_name: str) -> bool:
    """Whether a callback does anything at the event: it, or its class, defines the event, or how events are taken."""
    own = type(cb)
    if event_name in vars(cb) or hasattr(own, event_name):
        return True
    return own.__call__ is not Callback.__call__ or own.__getattr__ is not Callback.__getattr__


class StepLearner(Learner):
    """fastai's `Learner`; at the events of a batch it asks, in fastai's order, those callbacks that have an answer.

    fastai asks all of them, and those without an answer look for one in the learner and in the network, at eight events
    a step: a millisecond of Python, for which a fast GPU waits.
    """

    def _call_one(self, event_name):
        if event_name not in STEP:
            super()._call_one(event_name)
            return
        for cb in self.cbs.sorted("order"):
            if answers(cb, event_name):
                cb(event_name)

    def lr_find(self, *args, **kwargs):
        """fastai's; training then begins with the epoch with which it would have begun."""
        train = self.dls.train
        epoch = getattr(train, "epoch", None)
        try:
            return super().lr_find(*args, **kwargs)
        finally:
            if epoch is not None:
                train.epoch = epoch
