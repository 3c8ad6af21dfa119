"""The moving average of the weights: what is validated and kept, and what training continues with."""

from itertools import pairwise

import pytest
import torch
from conftest import StopAt, main, outcome, same
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from data import get_dls
from errors import Stopped
from recipes import get_recipe
from train_fastai import get_learner
from trained.safe_file import load_safetensors

EVERY, EPOCHS = 5, 2
OPTIONS = {"recipe": "demo", "width": 2, "device": "cpu", "no_lr_find": True, "no_pictures": True}


class Weights(Callback):
    """Keeps the weights that each epoch starts with, those after every step, and those that each validation sees."""

    order = 70  # before they are averaged

    def before_fit(self):
        self.starts, self.steps, self.seen = [], [], []

    def before_batch(self):
        if self.training and self.iter == 0:
            self._keep(self.starts)

    def after_batch(self):
        self._keep(self.steps if self.training else self.seen)

    def _keep(self, into):
        into.append(torch.cat([t.detach().flatten().float() for t in self.model.state_dict().values()]))


# In the second the decay is below that of the first updates, and the last step of an epoch updates the average.
@pytest.fixture(scope="module", params=[(0.9, 64, 22), (0.3, 71, 20)])
def averaged(request, tmp_path_factory):
    """A learner, what it saw in training, what that should have averaged to after each epoch, and an epoch's steps."""
    decay, bs, steps = request.param
    recipe, seen = get_recipe("demo", width=2, ema=decay), Weights()
    dls = get_dls("digits", bs=bs, flip=0, device="cpu")
    set_seed(0)
    learn = get_learner(dls, recipe, path=tmp_path_factory.mktemp("averaged"))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(EPOCHS, 0.1, cbs=seen)
    kept = seen.steps[EVERY - 1 :: EVERY]
    average, at_end = kept[0], {}
    for i, weights in enumerate(kept):
        average = torch.lerp(weights, average, min(decay**EVERY, (1 + i) / (10 + i)) if i else 0)
        at_end[((i + 1) * EVERY - 1) // steps] = average
    return learn, seen, at_end, steps


def test_validation_sees_the_average_and_training_goes_on_without_it(averaged):
    learn, seen, at_end, steps = averaged
    first, last = seen.seen[0], seen.seen[-1]
    float_ = torch.cat([torch.full((t.numel(),), t.is_floating_point()) for t in learn.model.state_dict().values()])
    assert torch.allclose(first[float_], at_end[0][float_], atol=1e-6)
    assert torch.allclose(last[float_], at_end[1][float_], atol=1e-6)
    assert torch.equal(seen.starts[1][float_], seen.steps[steps - 1][float_])
    moves = [(b - a)[float_].norm() for a, b in pairwise(seen.steps)]
    assert moves[steps - 1] < 2 * max(moves[: steps - 1]), "the first step of an epoch starts where the last ended"
    assert (first - seen.steps[steps - 1])[float_].norm() > 1e-3


def test_after_the_fit_the_learner_is_the_average(averaged):
    learn, seen, *_ = averaged
    now = torch.cat([t.detach().flatten().float() for t in learn.model.state_dict().values()])
    assert torch.equal(now, seen.seen[-1])
    before = learn.validate()
    assert learn.validate() == before
    learn.get_preds()
    again = torch.cat([t.detach().flatten().float() for t in learn.model.state_dict().values()])
    assert torch.equal(now, again), "whatever is asked of it"


def test_the_range_test_averages_nothing(averaged):
    learn, *_ = averaged
    before = {name: t.clone() for name, t in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=12, show_plot=False)
    assert all(torch.equal(before[name], t) for name, t in learn.model.state_dict().items())


def test_few_steps_leave_the_trained_weights(tmp_path):
    learn = get_learner(get_dls("digits", bs=700, flip=0, device="cpu"), get_recipe("demo", width=2, ema=0.9))
    before = learn.model.head.weight.detach().clone()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1)
    assert not torch.equal(before, learn.model.head.weight)


@pytest.mark.parametrize(("epoch", "batch", "training"), [(1, 7, True), (1, 3, False), (2, 0, True)])
def test_a_stopped_average_goes_on_bit_for_bit(tmp_path, capsys, epoch, batch, training):
    options = {**OPTIONS, "epochs": 3, "ema": 0.9, "whiten": 0.01, "norm_bias_lr": 16.0, "muon": 0.1}
    main(**options, out=str(tmp_path / "whole"))
    with pytest.raises(Stopped):
        main(StopAt(epoch, batch, training), **options, out=str(tmp_path / "stopped"))
    main(resume=str(tmp_path / "stopped"))
    assert same(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))


def test_all_files_hold_the_average(tmp_path, capsys):
    result = main(**OPTIONS, epochs=2, ema=0.9, out=str(tmp_path / "run"))
    last = torch.load(tmp_path / "run/models/last.pth", weights_only=True)
    network = load_safetensors(tmp_path / "run/model.safetensors")[0].network.state_dict()
    assert all(torch.equal(last[name], network[name]) for name in last)
    assert result["last_accuracy"] == pytest.approx(result["history"][-1]["valid_accuracy"], abs=0.01)
    best = torch.load(tmp_path / "run/models/best.pth", weights_only=True)
    if result["best_epoch"] == 2:
        assert all(torch.equal(last[name], best[name]) for name in last)
