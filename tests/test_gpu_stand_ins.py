"""What a GPU would meet, shown without one: by stand-ins for it. `test_gpu.py` has the same on a real one."""

import os
import re
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, StopAt, main, outcome, same
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastcore.basics import noop
from fastcore.foundation import L
from torch.nn.parallel import DistributedDataParallel

import loader
from data import get_dls
from errors import InputError, Stopped
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


# The loader


def test_a_batch_is_pinned_and_its_copy_waits_for_nothing(small, monkeypatch):
    """In training and in validation: else the queue of the GPU runs empty."""
    learn, copies = small(workers=1), []
    for dl in learn.dls.loaders:
        dl._device = torch.device("cuda")
        monkeypatch.setattr(dl, "after_batch", noop)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: setattr(self, "pinned", True) or self)

    def copied(batch, device, non_blocking=False):
        copies.append((device.type, non_blocking, *(getattr(t, "pinned", False) for t in batch)))
        return batch

    monkeypatch.setattr(loader, "to_device", copied)
    batches = [len(list(dl)) for dl in learn.dls.loaders]
    assert copies == [("cuda", True, True, True)] * sum(batches)


def test_a_learner_exported_on_a_gpu_pins_nothing_where_there_is_none(small, tmp_path, recwarn):
    learn = small()
    for dl in learn.dls.loaders:
        dl.pin_memory = dl.fake_l.pin_memory = True
    learn.export("learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    recwarn.clear()
    with loaded.no_bar():
        loaded.get_preds(dl=loaded.dls.test_dl(list(learn.dls.valid_ds.items.images[:3])))
    assert not [w for w in recwarn if "pin_memory" in str(w.message)]


def test_the_next_epoch_begins_while_validation_runs():
    """The first batch of an epoch takes 0.4 s here, every other one a hundredth of that."""
    dls = get_dls("digits", bs=256, workers=1, device="cpu")
    augment = dls.train.after_item.fs[0]
    pipeline = augment.pipeline
    augment.pipeline = lambda images, epoch, places, rows: (
        time.sleep(0.4 * (places[0] == 0)) or pipeline(images, epoch, places, rows)
    )
    list(dls.train)
    time.sleep(1)  # of validation
    started = time.perf_counter()
    begun = iter(dls.train)
    first = next(begun)
    assert time.perf_counter() - started < 0.2
    second = [first, *begun]
    dls.train.begin_at(1, 2)  # another epoch than the one that has been begun
    again = list(dls.train)
    assert len(again) == len(second) - 2
    for (x, y), (x_again, y_again) in zip(second[2:], again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)


def test_shared_memory_is_that_of_a_share_and_grows_with_it():
    dls = get_dls("digits", bs=97, workers=2, device="cpu")
    dls.train.deal(1, 2)
    shared = [next(iter(dls.train)), dls.train._workers.dataset.buffers.shape]
    assert shared[1] == (2 * loader.AHEAD + 1, 49, 32, 32, 3)
    dls.train.deal(0, 1)
    assert len(next(iter(dls.train))[1]) == 97


def test_full_shared_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    need = "the loader's processes share 2 MB, for which /dev/shm has no room"
    words = re.escape(f"{need}; give a container more (docker run --shm-size 1g), or pass fewer --workers")
    with pytest.raises(InputError, match=f"^{words}$"):
        main(**SMALL, workers=2, out=str(tmp_path / "run"))


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
