"""What a GPU would meet, shown without one: by stand-ins for it. `test_gpu.py` has the same on a real one."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, StopAt, main, outcome, same
from fastai.callback.core import Callback
from fastcore.foundation import L
from torch.nn.parallel import DistributedDataParallel

from data import get_dls
from errors import Stopped
from recipes import get_recipe
from train_fastai import get_learner
from trained.device import get_device
from training import distributed

sys.path.insert(0, str(ROOT / "benchmarks"))

SMALL = {"recipe": "demo", "bs": 128, "width": 2, "epochs": 2, "device": "cpu", "no_lr_find": True, "no_pictures": True}


@pytest.fixture
def small(tmp_path):
    """A function that makes a small learner on the CPU."""

    def make(workers=0, precision="fp32", **changes):
        dls = get_dls("digits", bs=128, flip=0, workers=workers, device="cpu")
        torch.manual_seed(0)
        learn = get_learner(dls, get_recipe("demo", width=2, **changes), precision=precision, path=tmp_path)
        learn.remove_cb(learn.progress)
        return learn

    return make


# The device


@pytest.fixture
def two_gpus(monkeypatch):
    """Where torch finds two GPUs, on which nothing can be computed; a list of those made the current one."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1].index if chosen else 0)
    return chosen


def test_a_gpu_with_a_number_becomes_the_current_one(two_gpus):
    assert get_device("cuda") == torch.device("cuda:0")
    assert get_device("cuda:1") == torch.device("cuda:1")
    assert torch.cuda.current_device() == 1
    assert get_device("cpu") == torch.device("cpu")
    assert two_gpus == [torch.device("cuda:1")]


def test_cublas_is_told_to_be_repeatable_before_the_first_product(monkeypatch):
    """cuBLAS reads it once: what comes later is an error under `use_deterministic_algorithms`."""
    import steps

    seen = []

    def first_product(*args, **kwargs):
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise InterruptedError

    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"})
    monkeypatch.setattr(steps, "get_dls", first_product)
    with pytest.raises(InterruptedError):
        steps.steps(torch.device("cuda"), width=4, images=512, rounds=1, precision="fp32")
    assert seen == [":4096:8"]


# Resume


def test_a_run_goes_on_with_fewer_gpus_and_leaves_cudnn_as_it_is(tmp_path, capsys, monkeypatch):
    run, one_gpu = tmp_path / "run", [torch.zeros(16, dtype=torch.uint8)]
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 2), **SMALL, out=str(run))
    state = torch.load(run / "checkpoint.pth", weights_only=True)
    state["random"] |= {"torch_cuda_state": [torch.ones(16, dtype=torch.uint8)] * 2}
    state["random"] |= {"torch_benchmark": False, "torch_deterministic": False}
    torch.save(state, run / "checkpoint.pth")

    restored = []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: one_gpu)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    for flag in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, flag, True)
    main(resume=str(run))
    assert {len(states) for states in restored} == {1}
    assert any(states[0].any() for states in restored), "of the first GPU"
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic
    main(**SMALL, out=str(tmp_path / "whole"))
    assert same(outcome(run), outcome(tmp_path / "whole"))


# Several processes


@pytest.fixture
def one_of_two(monkeypatch):
    """This process as the first of two, of which the other one keeps silent."""
    monkeypatch.setattr(distributed, "num_distrib", lambda: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Order(Callback):
    """Notes the steps of a batch, and where in them other processes are waited for."""

    order = 100

    def __init__(self, monkeypatch):
        self.seen = []

        def noted(owner, name):
            function = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *args: self.seen.append(name) or function(*args))

        for name in ("all_reduce", "broadcast"):
            noted(dist, name)
        noted(DistributedDataParallel, "_sync_buffers")

    def __call__(self, event):
        if event in ("before_batch", "after_loss", "after_backward", "after_batch", "before_validate"):
            self.seen.append(event)


def test_no_forward_pass_waits_for_other_processes(one_of_two, small, monkeypatch):
    learn, order = small(), Order(monkeypatch)
    with learn.no_logging(), distributed.all_ranks(learn):
        learn.fit(1, 0.01, cbs=order)
    step = ["before_batch", "after_loss", "all_reduce", "after_backward", "after_batch"]
    train, valid = (L(order.seen).argwhere(lambda name, x=x: name == x) for x in ("after_loss", "before_validate"))
    assert order.seen[train[0] - 1 : train[0] + 14] == step * 3
    assert "_sync_buffers" not in order.seen
    assert order.seen[: valid[0]].count("broadcast") == len(list(learn.model.buffers())), "before they are tested"
    assert order.seen[valid[0] - 1] == "broadcast"
