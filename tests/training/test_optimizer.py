"""The optimiser: hyper-parameters where callbacks look for them, norm biases with a rate of their own, and Muon."""

import pytest
import torch
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.torch_core import set_seed
from torch import nn

from data import get_dls
from recipes import get_recipe
from train_fastai import get_learner
from training.optimizer import SGD, orthogonal


def small(tmp_path, **changes):
    set_seed(0)
    dls = get_dls("digits", bs=256, flip=0, device="cpu")
    return get_learner(dls, get_recipe("demo", **{"width": 2, **changes}), path=tmp_path)


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


def test_an_orthogonal_matrix_turns_all_directions_as_they_were():
    u, v = (torch.linalg.qr(torch.randn(64, 16))[0][:n] for n in (16, 64))
    u, _ = torch.linalg.qr(u)
    values = torch.linspace(0.01, 1, 16)
    made = u.T @ orthogonal(u @ torch.diag(values) @ v.T) @ v
    assert 0.6 < made.diag().min() < made.diag().max() < 1.3
    assert (made - torch.diag(made.diag())).abs().max() < 1e-4
    assert torch.allclose(orthogonal(1000 * u), orthogonal(u), atol=1e-4), "whatever the gradient's scale is"


def steps(opt, parameters, grads):
    """What the parameters become in as many steps as there are lists of gradients."""
    for step in grads:
        for p, grad in zip(parameters, step, strict=True):
            p.grad = None if grad is None else grad.clone()
        opt.step()
    return [p.detach().clone() for p in parameters]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
@pytest.mark.parametrize("nesterov", [True, False])
def test_convolutions_take_the_steps_of_torchs_muon(nesterov):
    torch.manual_seed(0)
    weights, grads = torch.randn(8, 4, 3, 3), [[torch.randn(8, 4, 3, 3)] for _ in range(4)]
    conv = nn.Parameter(weights.to(memory_format=torch.channels_last))
    ours = SGD([conv], lr=0.4, momentum=0.9, nesterov=nesterov, muon=0.1, dtype=torch.bfloat16)
    ours.set_hyper("wd", 0.5)
    matrix = nn.Parameter(weights.flatten(1).clone())
    torchs = torch.optim.Muon([matrix], lr=0.04, momentum=0.9, nesterov=nesterov, weight_decay=0)
    for (grad,) in grads:
        with torch.no_grad():
            matrix.mul_(8**0.5 / matrix.norm())  # they keep the norm that a step has
        steps(ours.opt, [conv], [[grad]])
        steps(torchs, [matrix], [[grad.flatten(1)]])
        torch.testing.assert_close(conv.flatten(1), matrix, atol=2e-3, rtol=0)
    assert torch.equal(conv.grad, grads[-1][0]), "for callbacks that look at it"


def test_what_is_no_convolution_over_features_takes_the_steps_of_sgd():
    torch.manual_seed(0)
    shapes = [(8, 3, 3, 3), (8,), (10, 8)]
    start, grads = [torch.randn(s) for s in shapes], [[torch.randn(s) for s in shapes] for _ in range(3)]
    ends = []
    for muon in (0.0, 0.1):
        parameters = [nn.Parameter(w.clone()) for w in start]
        opt = SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, muon=muon)
        opt.set_hyper("wd", 0.01)
        ends.append(steps(opt.opt, parameters, grads))
    assert all(map(torch.equal, *ends))


def test_a_frozen_convolution_stays_under_muon():
    conv = nn.Parameter(torch.ones(4, 4, 3, 3))
    (end,) = steps(SGD([conv], lr=0.1, momentum=0.9, nesterov=True, muon=0.1).opt, [conv], [[None], [None]])
    assert torch.equal(end, torch.ones(4, 4, 3, 3))


@pytest.mark.parametrize(("muon", "learned"), [(0.0, False), (1.0, True)])
def test_muon_learns_in_a_few_steps_what_sgd_does_not(tmp_path, muon, learned):
    learn = small(tmp_path, width=4, muon=muon)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(8)
    *_, accuracy = learn.validate()
    assert (accuracy > 0.8) == learned
    assert len(learn.opt.hypers) == 2, "the groups for freeze and slices are the body and the head"
