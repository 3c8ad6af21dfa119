"""A learner that calls, at each event of a batch, only the callbacks that handle it."""

from fastai.callback.core import Callback, _inner_loop
from fastai.learner import Learner, Recorder, _after_epoch, _before_epoch
from fastcore.foundation import L
from fastcore.xtras import ContextManagers

STEP = frozenset(_inner_loop)  # the events of a batch
LOOK = (_before_epoch, _after_epoch, "after_fit")  # what fastai sends around predictions, and only there during a fit


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

    A callback may predict or validate between the parts of an epoch: the training, whose epochs `fitting` marks, stays
    as it is. fastai would send its callbacks a second `before_fit` and `after_fit`.
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

    def validation_context(self, cbs=None, inner=False):
        """fastai's; during a fit, as its `FetchPredsCallback` has it: without what records the training."""
        recording = [cb for cb in self.cbs if self.fitting and getattr(cb, "remove_on_fetch", False)]
        return ContextManagers([self.removed_cbs(recording), super().validation_context(cbs, inner)])

    def validate(self, ds_idx=1, dl=None, cbs=None):
        """fastai's; during a fit with a recorder of its own, as that of the training stays as it is."""
        if not self.fitting:
            return super().validate(ds_idx, dl, cbs)
        recorder = Recorder()
        with self.validation_context([*L(cbs), recorder]):
            recorder.before_epoch()
            self._do_epoch_validate(ds_idx, dl)
        return recorder.log[1:]

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

    def __call__(self, event_name):
        if not self.fitting or event_name not in LOOK:
            super().__call__(event_name)

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
