import copy
import random

import numpy as np
import pytest
import torch

from data import get_dls
from images import ImageTable
from lr_finder import METHODS, range_test, undisturbed
from train_fastai import get_learner


def small_learner(n=40, bs=8, recipe="demo", **kwargs):
    """A learner of two classes that differ in their colour."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    images = rng.integers(0, 128, (n, 32, 32, 3), dtype=np.uint8) + 100 * labels[:, None, None, None].astype(np.uint8)
    table = ImageTable("colours", ("dark", "light"), images, labels, np.arange(n) < n - 8, np.arange(n))
    torch.manual_seed(0)
    learn = get_learner(get_dls(table, bs=bs, device="cpu", workers=0), recipe, **kwargs)
    learn.remove_cb(learn.progress)
    return learn


def everything(learn):
    """All that a range test could disturb."""
    return {
        "model": copy.deepcopy(learn.model.state_dict()),
        "opt": copy.deepcopy(learn.opt and learn.opt.state_dict()),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state(),
        "loaders": [(dl.rng.getstate(), dl.epoch) for dl in learn.dls.loaders],
    }


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("after_a_fit", [False, True])
def test_nothing_is_disturbed(tmp_path, after_a_fit):
    learn = small_learner(path=tmp_path)
    if after_a_fit:
        with learn.no_logging():
            learn.fit(1)
    before = everything(learn)
    range_test(learn)
    after = everything(learn)
    for part in before:
        assert same(before[part], after[part]), part
    with learn.no_logging():
        learn.fit(1)
    assert not same(before["model"], everything(learn)["model"]), "the comparison sees a change"


def test_a_broken_off_training_is_undone_too(tmp_path):
    learn = small_learner(path=tmp_path)
    before = everything(learn)

    def broken_off():
        with undisturbed(learn), learn.no_logging():
            learn.fit(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert same(before, everything(learn))


@pytest.mark.parametrize(("n", "bs"), [(10, 2), (40, 32), (400, 2)])
def test_it_works_with_any_number_of_batches(tmp_path, n, bs):
    learn = small_learner(n, bs, path=tmp_path)
    assert len(learn.dls.train) in (1, 196)
    test = range_test(learn)
    assert 20 < len(test.lrs) == len(test.losses) <= 100
    assert test.lrs == sorted(test.lrs)
    assert all(test.suggestions[name] for name in METHODS)
    assert all(test.lrs[0] <= test.suggestions[name] <= test.lrs[-1] for name in METHODS)


@pytest.mark.parametrize("good_batches", [0, 1, 8, 40])
def test_a_loss_that_becomes_nan_ends_it(tmp_path, good_batches):
    learn, calls = small_learner(path=tmp_path), []
    loss = learn.loss_func

    def breaking(pred, target):
        calls.append(1)
        return loss(pred, target) * (1 if len(calls) <= good_batches else float("nan"))

    learn.loss_func = breaking
    before = everything(learn)
    test = range_test(learn)
    assert len(calls) == good_batches + 1
    assert len(test.losses) == good_batches
    assert np.isfinite(test.losses).all()
    assert same(before, everything(learn))
    assert (test.suggestion is not None) == (good_batches == 40)
    test.save(tmp_path, chosen=None)
    assert len((tmp_path / "lr_find.csv").read_text().splitlines()) == good_batches + 1


def test_the_suggestions_are_fastais(tmp_path):
    from fastai.callback.schedule import SuggestionMethod as S

    learn = small_learner(path=tmp_path)
    test = range_test(learn)
    torch.manual_seed(0)
    twin = small_learner(path=tmp_path)
    functions = [getattr(S, name.capitalize()) for name in METHODS]
    suggested = twin.lr_find(start_lr=1e-5, end_lr=10, num_it=100, show_plot=False, suggest_funcs=functions)
    assert dict(zip(METHODS, suggested, strict=True)) == pytest.approx(test.suggestions)
