import copy
import random

import numpy as np
import pytest
import torch

from data import get_dls
from images.table import ImageTable
from recipes import RECIPES, get_recipe
from train_fastai import get_learner
from training.lr_finder import METHODS, RangeTest, edge, range_test, undisturbed


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


@pytest.mark.parametrize("recipe", [RECIPES["demo"], get_recipe("fast", width=4)], ids=["demo", "fast"])
@pytest.mark.parametrize("after_a_fit", [False, True])
def test_nothing_is_disturbed(tmp_path, after_a_fit, recipe):
    learn = small_learner(recipe=recipe, path=tmp_path)
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


def test_without_a_bar_it_says_that_it_begins_and_how_far_it_is(tmp_path, capsys, monkeypatch):
    learn = small_learner(path=tmp_path)
    range_test(learn, steps=12)
    begins = "range test   at most 12 batches, from a learning rate of 1e-05 to 10"
    assert capsys.readouterr().out.splitlines() == [begins]
    monkeypatch.setattr("training.lr_finder.SECONDS", 0)
    test = range_test(learn, steps=12)
    count = [f"range test   batch {n} of at most 12" for n in range(1, len(test.lrs) + 1)]
    assert capsys.readouterr().out.splitlines() == [begins, *count]


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
    assert 20 < len(test.lrs) == len(test.losses) == len(test.batch_losses) <= 100
    assert test.lrs == sorted(test.lrs)
    assert set(test.suggestions) == set(METHODS)
    assert all(test.lrs[0] <= test.suggestions[name] <= test.lrs[-1] for name in (*METHODS[1:], test.default))
    test.save(tmp_path, chosen=None)
    assert RangeTest.load(tmp_path) == test


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


def curve(*points, noise=0.02):
    """100 learning rates from 1e-5 to 10, and losses on straight lines through (learning rate, loss)."""
    lrs = np.geomspace(1e-5, 10, 100)
    losses = np.interp(np.log(lrs), *zip(*((np.log(lr), loss) for lr, loss in points), strict=True))
    return lrs.tolist(), (losses + noise * np.random.default_rng(0).normal(size=100)).tolist()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1e-3, 2.3), (0.5, 1.0), (1, 5)], 0.35),  # it climbs from 0.5 on, by half of the fall at 0.6
        ([(1e-3, 2.3), (0.2, 1.8), (0.4, 2.3), (2, 1.5)], 0.17),  # and falls again, as a rising weight decay makes it
        ([(1e-3, 2.3), (10, 1.0)], None),
        ([(1e-3, 2.3), (1, 1.0), (10, 1.3)], None),
        ([(1e-3, 2.3), (10, 2.3)], None),
        ([(1e-3, 2.3), (0.3, 2.2), (1, 20)], None),  # it has not learned
    ],
)
def test_the_edge_is_half_the_learning_rate_at_which_the_loss_climbs_back(points, expected):
    found = edge(*curve(*points))
    assert found == (expected and pytest.approx(expected, rel=0.25))


def test_the_edge_is_where_the_loss_is_no_number_any_more():
    lrs, losses = curve((1e-3, 2.3), (10, 1.0))
    losses[80:] = [float("nan")] * 20
    assert edge(lrs, losses) == lrs[80] / 2


def test_with_muon_there_is_no_edge(tmp_path):
    found = [range_test(small_learner(200, 4, get_recipe("demo", muon=muon), path=tmp_path)) for muon in (0.0, 0.1)]
    assert found[0].suggestions["edge"]
    assert found[1].suggestions["edge"] is None
    assert found[1].suggestion == found[1].suggestions["minimum"] > 0


def test_without_an_edge_the_minimum_counts(tmp_path):
    lrs, losses = curve((1e-3, 2.3), (10, 1.0))
    suggestions = dict.fromkeys(METHODS, 0.1) | {"edge": None, "minimum": 0.2}
    assert RangeTest(lrs, losses, losses, suggestions).suggestion == 0.2
    assert RangeTest(lrs, losses, losses, suggestions | {"edge": 0.3}).suggestion == 0.3


def test_the_other_suggestions_are_fastais(tmp_path):
    from fastai.callback.schedule import SuggestionMethod as S

    learn = small_learner(path=tmp_path)
    test = range_test(learn)
    torch.manual_seed(0)
    twin = small_learner(path=tmp_path)
    functions = [getattr(S, name.capitalize()) for name in METHODS[1:]]
    suggested = twin.lr_find(start_lr=1e-5, end_lr=10, num_it=100, show_plot=False, suggest_funcs=functions)
    assert {"edge": test.suggestions["edge"], **dict(zip(METHODS[1:], suggested, strict=True))} == test.suggestions
