"""The recipes and their schedules, as fastai trains with them."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import main
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from data import get_dls
from images.table import ImageTable
from recipes import ANCESTOR, FAST, RECIPES, SEED, Cyclic, OneCycle, Plateau, Recipe, get_recipe
from train_fastai import get_learner

EPOCHS = 3


def trained(tmp_path, fit, recipe=FAST, norm="batch"):
    """A small learner after `fit(learner)`, from the same start every time."""
    dls = get_dls("digits", bs=256, flip=0, device="cpu")
    set_seed(0)
    learn = get_learner(dls, replace(recipe, width=2), norm, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    return learn


def test_the_seeds_schedule_is_the_one_it_logged():
    logged = {1: 0.020385, 2: 0.040380, 3: 0.060375, 4: 0.080369, 5: 0.099904, 6: 0.094643, 23: 0.005210}
    for epoch, lr in logged.items():
        assert SEED.schedule.lr(SEED.lr, epoch / SEED.epochs) == pytest.approx(lr, abs=1e-5)
    assert SEED.schedule.lr(SEED.lr, 0) == pytest.approx(0.1 / 256)
    assert SEED.schedule.lr(SEED.lr, 1) == 0


def test_the_ancestors_schedule():
    lr = [ANCESTOR.schedule.lr(0.4, epoch / 24) for epoch in (0, 2.5, 5, 14.5, 24)]
    assert lr == pytest.approx([0, 0.2, 0.4, 0.2, 0])


def test_one_cycle_is_fit_one_cycle_and_draws_its_rates(tmp_path):
    schedule = OneCycle(pct_start=0.3)
    ours = trained(tmp_path, lambda learn: schedule.fit(learn, EPOCHS, 0.1))
    theirs = trained(tmp_path, lambda learn: learn.fit_one_cycle(EPOCHS, 0.1, pct_start=0.3))
    assert ours.recorder.lrs == theirs.recorder.lrs
    for ours_, theirs_ in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(ours_, theirs_)
    n = len(ours.recorder.lrs)
    assert [schedule.lr(0.1, i / n) for i in range(n)] == pytest.approx(ours.recorder.lrs)


def test_fast_keeps_its_momentum_and_ends_at_a_tenth_of_its_peak(tmp_path):
    learn = trained(tmp_path, lambda learn: FAST.schedule.fit(learn, EPOCHS, 0.1))
    lrs, n = learn.recorder.lrs, len(learn.recorder.lrs)
    assert set(learn.recorder.hps["mom"]) == {FAST.momentum}
    assert lrs == pytest.approx([FAST.schedule.lr(0.1, i / n) for i in range(n)])
    assert 0.01 < lrs[-1] < 0.015


@pytest.mark.parametrize("name", ["fast", "seed"])
def test_nesterov_is_the_recipes(tmp_path, name):
    learn = trained(tmp_path, lambda learn: learn.create_opt(), RECIPES[name])
    assert learn.opt.opt.param_groups[0]["nesterov"] is (name == "fast")


@pytest.mark.parametrize("name", ["ancestor", "seed", "cyclic", "cyclic2", "cyclic-exp"])
def test_every_batch_has_the_learning_rate_of_its_position(tmp_path, name):
    schedule = RECIPES[name].schedule
    learn = trained(tmp_path, lambda learn: schedule.fit(learn, EPOCHS, 0.1))
    n = EPOCHS * 5
    assert learn.recorder.lrs == pytest.approx([schedule.lr(0.1, i / n) for i in range(n)])


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cyclic_rates_are_the_papers(mode):
    """Smith (2017), section 3.1, by iterations, half cycles (`stepsize`) and, for exp_range, gamma."""
    base, top, stepsize, iterations, gamma = 0.001, 0.006, 200, 1200, 0.999
    final = gamma**iterations if mode == "exp_range" else 1.0
    schedule = Cyclic(mode, cycles=iterations // (2 * stepsize), base=base / top, final=final)
    for i in range(iterations):
        cycle = np.floor(1 + i / (2 * stepsize))
        x = abs(i / stepsize - 2 * cycle + 1)
        shrunk = {"triangular": 1, "triangular2": 0.5 ** (cycle - 1), "exp_range": gamma**i}[mode]
        expected = base + (top - base) * max(0, 1 - x) * shrunk
        assert schedule.lr(top, i / iterations) == pytest.approx(expected)


def test_plateau_lowers_the_rate_once_the_validation_loss_stalls(tmp_path):
    # Steps this small change no weight, and without batch norm nothing else moves the validation loss either.
    schedule, lr = Plateau(factor=10, patience=2), 1e-20
    learn = trained(tmp_path, lambda learn: schedule.fit(learn, 6, lr), SEED, "layer")
    assert learn.recorder.lrs[::5] == pytest.approx([lr, lr, lr, lr / 10, lr / 10, lr / 100], rel=1e-6, abs=0)


def test_plateau_keeps_the_rate_while_the_loss_falls(tmp_path):
    class Falling(Callback):
        order = 55  # between the recorder, which has just written the epoch down, and what reads it there

        def after_epoch(self):
            self.recorder.values[-1][1] = 1 / (1 + self.epoch)

    schedule = Plateau(factor=10, patience=1)
    learn = trained(tmp_path, lambda learn: schedule.fit(learn, 4, 1e-20, [Falling()]), SEED, "layer")
    assert set(learn.recorder.lrs) == {1e-20}


@pytest.mark.parametrize("name", ["seed", "plateau", "cyclic", "best"])
def test_a_recipe_trains_by_name(tmp_path, capsys, name):
    out = tmp_path / name
    main(recipe=name, data="digits", width=2, epochs=1, bs=256, device="cpu", no_lr_find=True, out=str(out))
    config = json.loads((out / "config.json").read_text())
    assert config["schedule"] == str(RECIPES[name].schedule)
    assert (config["nesterov"], config["wd"]) == (RECIPES[name].nesterov, RECIPES[name].wd)
    assert (out / "model.pkl").exists()


def test_any_option_goes_over_the_recipe(tmp_path, capsys):
    changes = {"momentum": 0.8, "wd": 0.001, "label_smoothing": 0.2, "logit_scale": 0.5}
    changes |= {"flip": 0.4, "flips": "alternating", "pad": 2, "cutout": 0, "cutmix": 1.0}
    changes |= {"whiten": 0.02, "norm_bias_lr": 8.0, "ema": 0.9, "muon": 0.2}
    main(recipe="fast", data="digits", width=2, epochs=1, bs=256, device="cpu", out=str(tmp_path / "run"), **changes)
    assert changes.items() <= json.loads((tmp_path / "run/config.json").read_text()).items()
    without_option = {"schedule", "nesterov"}
    assert changes.keys() | {"data", "epochs", "bs", "lr", "width"} == {f.name for f in fields(Recipe)} - without_option


def test_settings_reach_the_learner():
    changes = {"momentum": 0.8, "wd": 0.001, "label_smoothing": 0.2, "logit_scale": 0.5, "width": 2, "cutmix": 0.7}
    learn = get_learner(get_dls("digits", bs=64, device="cpu"), get_recipe("fast", **changes))
    learn.fit(0, 0.1)
    hypers = learn.opt.hypers[0]
    assert (hypers["wd"], hypers["mom"], learn.loss_func.func.label_smoothing) == (0.001, 0.8, 0.2)
    assert (learn.model.logit_scale, learn.cut_mix.distrib.concentration1.item()) == (0.5, pytest.approx(0.7))
    assert not hasattr(get_learner(learn.dls, "fast"), "cut_mix")


def test_cutmix_mixes_training_images_and_no_others(tmp_path):
    class Seen(Callback):
        def __init__(self):
            self.colours = {True: set(), False: set()}

        def after_loss(self):
            for image in self.x.as_subclass(torch.Tensor):
                self.colours[self.training].add(len(image[0].unique()))

    images = np.zeros((64, 32, 32, 3), np.uint8)
    images[::2] = 255
    table = ImageTable("two", ("dark", "light"), images, np.arange(64) % 2, np.arange(64) < 48, np.arange(64))
    dls = get_dls(table, bs=16, device="cpu", cutout=0)
    learn, seen = get_learner(dls, get_recipe("fast", width=2, cutmix=1.0), path=tmp_path), Seen()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.01, cbs=seen)
    assert seen.colours == {True: {1, 2}, False: {1}}


def test_list_recipes_prints_every_setting_of_each(command):
    result = command("--list-recipes", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}, "at once"
    names, *rows = [line.split() for line in result.stdout.splitlines()]
    assert names == list(RECIPES)
    lrs = next(row for row in rows if row[0] == "lr")
    assert [float(lr) for lr in lrs[1:]] == [recipe.lr for recipe in RECIPES.values()]
    for name, recipe in RECIPES.items():
        assert [name, *str(recipe.schedule).split()] in rows


def test_a_recipe_in_python_can_be_changed_by_name():
    recipe = get_recipe("ancestor", epochs=10, lr=0.2)
    assert (recipe.epochs, recipe.lr, recipe.schedule) == (10, 0.2, ANCESTOR.schedule)
