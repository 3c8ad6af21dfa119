"""The optimiser: hyper-parameters where fastai's callbacks look for them, and norm biases with a rate of their own."""

import pytest
import torch
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.torch_core import set_seed
from torch import nn

from data import get_dls
from recipes import get_recipe
from train_fastai import get_learner


def small(tmp_path, **changes):
    set_seed(0)
    dls = get_dls("digits", bs=256, flip=0, device="cpu")
    return get_learner(dls, get_recipe("demo", width=2, **changes), path=tmp_path)


def test_what_a_callback_writes_to_a_hyper_parameter_counts(tmp_path):
    learn = small(tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(5, 1e-20, cbs=ReduceLROnPlateau("accuracy", patience=1, factor=10))
    assert learn.recorder.lrs[-1] < 1e-20
    assert learn.opt.opt.param_groups[0]["lr"] == learn.opt.hypers[0]["lr"] < 1e-20


def test_hyper_parameters_are_numbers(tmp_path):
    learn = small(tmp_path)
    learn.fit(0, 0.1)
    assert {name: type(value) for name, value in learn.opt.hypers[0].items()} == dict.fromkeys(
        ("lr", "mom", "wd"), float
    )


def test_norm_biases_have_their_rate_and_scales_stay_at_one(tmp_path):
    learn = small(tmp_path, norm_bias_lr=8.0, wd=0.0, momentum=1e-9)
    before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
    grads = {}
    learn.opt = None
    with learn.no_bar(), learn.no_logging():
        learn.fit(0, 0.01)
    assert [h["lr"] for h in learn.opt.hypers] == [0.01] * 3, "one number is for all"
    x, y = learn.dls.train.one_batch()
    learn.model.train()
    learn.loss_func(learn.model(x), y).backward()
    grads = {name: p.grad.clone() for name, p in learn.model.named_parameters() if p.grad is not None}
    learn.opt.step()
    norm_names = {n for n, m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, p in learn.model.named_parameters():
        module, _, kind = name.rpartition(".")
        if module in norm_names and kind == "weight":
            assert torch.equal(p, torch.ones_like(p))
            continue
        rate = 0.08 if module in norm_names else 0.01
        torch.testing.assert_close(p.detach(), before[name] - rate * grads[name], atol=1e-6, rtol=1e-5)


def test_their_weight_decay_is_divided(tmp_path):
    learn = small(tmp_path, norm_bias_lr=8.0, wd=0.8)
    with learn.no_bar(), learn.no_logging():
        learn.fit(0, 0.01)
    assert [g["weight_decay"] for g in learn.opt.opt.param_groups] == pytest.approx([0.1, 0.8, 0.8])
