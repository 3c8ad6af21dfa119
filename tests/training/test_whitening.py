"""The whitened first convolution."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from data import get_dls
from images.table import ImageTable
from recipes import get_recipe
from train_fastai import get_learner
from training.whitening import whitening_matrix

SMALL = {"width": 4, "lr": 0.05, "momentum": 0.9, "wd": 0.01, "logit_scale": 0.125}


def test_whitened_patches_are_uncorrelated_and_of_variance_one():
    dls = get_dls("digits", bs=64, device="cpu")
    matrix = whitening_matrix(dls, eps=1e-8)
    pixels = dls.train_ds.items.batch(list(range(1000)))[0]
    mean, std = (np.array(s) for s in dls.train_ds.items.train_stats())
    x = torch.from_numpy((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    patches = F.unfold(x, 3).transpose(0, 1).flatten(1).float()
    second = (matrix @ patches) @ (matrix @ patches).T / patches.shape[1]
    digits_are_grey = second.diag() > 0.5  # three equal channels: two thirds of the directions have no variance
    assert digits_are_grey.sum() == 9
    assert (second - torch.diag(digits_are_grey.float())).abs().max() < 0.1


def test_a_larger_epsilon_lowers_directions_of_small_variance():
    dls = get_dls("digits", bs=64, device="cpu")
    norms = [whitening_matrix(dls, eps).norm(dim=1) for eps in (1e-4, 1e-2)]
    assert norms[1].max() == pytest.approx(10, rel=0.01), "one over the root of epsilon, where the variance is zero"
    assert norms[0].max() == pytest.approx(100, rel=0.01)


def test_a_part_of_the_images_stands_for_all_classes(monkeypatch):
    table = noise()
    table = replace(table, labels=np.sort(table.labels), images=np.sort(table.images, axis=0))  # dark ones come first
    dls = get_dls(table, bs=64, device="cpu")
    every = whitening_matrix(dls, 0.01)
    monkeypatch.setattr("training.whitening.IMAGES", 24)
    some = whitening_matrix(dls, 0.01)
    assert torch.allclose(some.T @ some, every.T @ every, rtol=0.2, atol=1.0)


class Whitened(nn.Module):
    """torch's way: the convolution has C for its parameter, and C times the matrix for its weights."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, c):
        return (c.flatten(1) @ self.matrix).view(c.shape)


def noise(train=192, test=64):
    """A table of smooth noise, as in photographs; in flat parts rounding alone decides what a max-pool lets through."""
    n = train + test
    pixels = np.random.default_rng(0).integers(0, 256, (n, 34, 34, 3)).astype(float)
    images = np.mean([pixels[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)], axis=0)
    rows = np.arange(n)
    return ImageTable("noise", ("a", "b"), images.astype(np.uint8), rows % 2, rows < train, rows)


def test_it_trains_as_a_parametrisation_does(tmp_path):
    recipe = get_recipe("ancestor", **SMALL, whiten=0.01)
    weights = []
    for by_torch in (False, True):
        dls = get_dls(noise(), bs=64, device="cpu")
        set_seed(0)
        learn = get_learner(
            dls, get_recipe(recipe, whiten=0.0) if by_torch else recipe, precision="fp32", path=tmp_path
        )
        if by_torch:
            parametrize.register_parametrization(learn.model.body[0], "weight", Whitened(whitening_matrix(dls, 0.01)))
        before = learn.model.body[0].weight.detach().clone()
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 0.01)  # three steps; after many, rounding would tell them apart
        weights.append((before, learn.model.body[0].weight.detach(), learn.model.head.weight.detach()))
    for ours, theirs in zip(*weights, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert (weights[0][0] - weights[0][1]).abs().max() > 1e-3, "it has learned"


def test_the_network_stays_as_it_is(tmp_path):
    learn = get_learner(get_dls("digits", bs=128, flip=0, device="cpu"), get_recipe("fast", **SMALL, whiten=0.01))
    plain = get_learner(learn.dls, get_recipe("fast", **SMALL, whiten=0.0))
    assert learn.model.state_dict().keys() == plain.model.state_dict().keys()
    assert type(learn.model.body[0]) is nn.Conv2d
