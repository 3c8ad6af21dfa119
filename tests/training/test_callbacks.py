"""The recorder and the progress bar: what fastai's record and show, without their wait at every batch."""

import sys

import pytest
import torch
from conftest import StopAt, main
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import Recorder
from fastai.torch_core import set_seed

from data import get_dls
from errors import Stopped
from recipes import get_recipe
from train_fastai import get_learner


def make_learner(tmp_path, bs=256, **kwargs):
    dls = get_dls("digits", bs=bs, flip=0, device="cpu")
    set_seed(0)
    return get_learner(dls, get_recipe("demo", width=2), path=tmp_path, **kwargs)


def usual(learn):
    """The same learner with fastai's own recorder and progress bar."""
    learn.remove_cbs([Recorder, ProgressCallback])
    return learn.add_cbs([Recorder, ProgressCallback])


def test_it_records_and_prints_what_fastai_does(tmp_path, capsys):
    ours, theirs = make_learner(tmp_path), usual(make_learner(tmp_path))
    logs = []
    for learn in (ours, theirs):
        capsys.readouterr()
        learn.fit_one_cycle(2, 0.1)
        out = capsys.readouterr().out
        logs.append([line.split()[:4] for line in out.replace("\r", "\n").splitlines() if line[:1].isdigit()])
    assert ours.recorder.losses == theirs.recorder.losses
    assert all(loss.ndim == 0 and loss.device.type == "cpu" for loss in ours.recorder.losses)
    assert [row[:3] for row in ours.recorder.values] == [row[:3] for row in theirs.recorder.values]
    assert ours.recorder.metric_names == theirs.recorder.metric_names
    assert len(logs[0]) == 2
    assert logs[0] == logs[1], "the table under the bar"
    assert ours.validate() == theirs.validate()


def test_the_range_test_sees_every_loss(tmp_path):
    ours, theirs = make_learner(tmp_path, bs=64), usual(make_learner(tmp_path, bs=64))
    with ours.no_bar(), theirs.no_bar():
        assert ours.lr_find(show_plot=False) == theirs.lr_find(show_plot=False)
    assert ours.recorder.losses == theirs.recorder.losses


def test_the_bar_shows_the_loss(tmp_path, capsys):
    learn = make_learner(tmp_path, bs=64)
    with learn.no_logging():
        learn.fit(1, 0.01)
    shown = [float(part.split("]")[0]) for part in capsys.readouterr().out.split("... ")[1:]]
    assert shown
    assert all(any(abs(loss - x) < 1e-4 for loss in learn.recorder.losses) for x in shown)


def on_the_screen(line):
    """What a terminal shows of a line: each carriage return writes over what was there, each erasure takes it away."""
    shown = ""
    for part in line.rsplit("\x1b[K", 1)[-1].split("\r"):
        shown = part + shown[len(part) :]
    return shown


def test_no_dead_bar_stays_behind_in_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    small = {"recipe": "demo", "bs": 128, "width": 2, "epochs": 1, "device": "cpu", "no_pictures": True}
    with pytest.raises(Stopped):
        main([StopAt(0, 5)], **small, out=str(tmp_path / "run"))
    lines = [on_the_screen(line) for line in capsys.readouterr().out.split("\n")]
    assert [line for line in lines if line.startswith("range test   edge")], "the range test ends within an epoch"
    assert [line for line in lines if "|" in line and "%" in line] == []


def test_no_batch_waits_for_the_device(tmp_path, monkeypatch):
    """What leaves the device, counted in epochs of few and of many batches: on a GPU each of these is a wait."""
    reads = []

    def counted(name):
        method = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            if self.is_floating_point() and self.ndim == 0:
                reads.append(name)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("cpu", "item", "tolist", "__float__", "__bool__", "numpy"):
        counted(name)

    def reads_of(bs, change=lambda learn: learn):
        learn = change(make_learner(tmp_path, bs))
        with learn.no_bar(), learn.no_logging():
            reads.clear()
            learn.fit(1, 0.01)
        return len(reads)

    assert reads_of(256) == reads_of(16) <= 6, "5 or 89 batches to train on, 2 or 23 to validate on"
    assert reads_of(16, usual) > 89, "as the counting finds with fastai's own"


def test_the_bar_waits_for_no_batch_after_no_bar_either(tmp_path):
    learn = make_learner(tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.01)
    learn.fit(1, 0.01)
    assert type(learn.progress).__name__ == "LazyProgress"


class SameAccuracy(Callback):
    """Every epoch ends with the same accuracy on the validation set."""

    order = TrackerCallback.order - 1

    def after_epoch(self):
        self.recorder.values[-1][-1] = 0.5


def test_of_equal_epochs_the_first_is_the_best(tmp_path, capsys):
    result = main([SameAccuracy()], data="digits", recipe="demo", width=2, epochs=3, no_lr_find=True, no_pictures=True,
                  device="cpu", out=str(tmp_path / "run"))  # fmt: skip
    assert (result["best_epoch"], result["best_accuracy"]) == (1, 0.5)


def test_callbacks_of_the_caller_come_on_top(tmp_path):
    learn = make_learner(tmp_path, cbs=SaveModelCallback(monitor="accuracy"))
    names = [type(cb).__name__ for cb in learn.cbs]
    assert "SaveModelCallback" in names
    assert "ChannelsLast" in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("bs", [64, 1438])
def test_plot_loss_draws_the_curve(tmp_path, bs):
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    learn = make_learner(tmp_path, bs=bs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.01)
    axes = learn.recorder.plot_loss(skip_start=0, with_valid=False)
    assert len(axes.lines[0].get_ydata()) == 2 * (1438 // bs)
    plt.close("all")
