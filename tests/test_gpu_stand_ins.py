"""What a GPU would meet, shown without one: by stand-ins for it. `test_gpu.py` has the same on a real one."""

import json
import os
import re
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, StopAt, main, outcome, same
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import CutMix
from fastai.learner import load_learner
from fastcore.basics import noop
from fastcore.foundation import L
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import loader
import workers
from data import get_dls
from errors import InputError, Stopped
from recipes import get_recipe
from reporting.evaluation import evaluate
from train_fastai import get_learner
from trained.device import get_device
from training import distributed, precision
from training.callbacks import CompiledTraining, LazyCutMix, LazyRecorder
from training.optimizer import SGD

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


def test_a_gpu_that_cannot_be_used_is_reported_with_the_reason(two_gpus, monkeypatch):
    def full(*args, device):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch, "zeros", full)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InputError, match=f"^--device {name}: CUDA error: out of memory; pass another"):
            get_device(name)
    with pytest.raises(InputError, match=r"no such device here; this machine has cpu, cuda:0, cuda:1$"):
        get_device("cuda:2")


def test_cublas_is_told_to_be_repeatable_before_the_first_product(monkeypatch):
    """cuBLAS reads it once: what comes later is an error under `use_deterministic_algorithms`."""
    import gpu

    seen = []

    def first_product(*args, **kwargs):
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise InterruptedError

    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"})
    monkeypatch.setattr(gpu, "get_device", first_product)
    with pytest.raises(InterruptedError):
        gpu.main(gpu.Options(rehearse=True))
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
    shared = [next(iter(dls.train)), dls.train._workers.buffers.shape]
    assert shared[1] == (2 * workers.AHEAD + 1, 49, 32, 32, 3)
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


# Reads, each of which waits for all that a GPU has been given to do


@pytest.fixture
def fused(small, monkeypatch):
    """A function that makes a learner which scales its gradients as in fp16, for an optimiser that looks at them."""
    monkeypatch.setitem(precision.DTYPES, "fp16", torch.bfloat16)  # a CPU takes minutes for a step in fp16
    monkeypatch.setattr(precision, "obstacle", lambda *_: None)

    def make(**changes):
        learn = small(precision="fp16", **changes)
        learn.opt_func = partial(SGD, momentum=0.9, nesterov=True, fused=True)
        return learn

    return make


class Overflow(Callback):
    """Makes the gradients of these batches infinite; keeps weights, scale and reads of every batch."""

    order = 0

    def __init__(self, monkeypatch, *batches):
        self.batches, self.weights, self.scales, self.reads = batches, [], [], 0
        item = torch.Tensor.item
        monkeypatch.setattr(torch.Tensor, "item", lambda t: setattr(self, "reads", self.reads + 1) or item(t))

    def before_step(self):
        if self.iter in self.batches:
            self.model.head.bias.grad.fill_(float("inf"))
        self.weights.append(self.model.head.weight.detach().clone())
        self.scales.append(self.scaler.state_dict()["scale"])


def test_fp16_leaves_out_steps_that_overflow_and_reads_nothing(fused, monkeypatch):
    learn, overflow = fused(), Overflow(monkeypatch, 0, 3)
    learn.remove_cb(learn.recorder)
    learn.metrics = []
    with learn.no_logging(), learn.no_bar():
        learn.dls.loaders = [learn.dls.train, learn.dls.train.new(n=0)]
        learn.fit(1, 0.1, cbs=overflow)
    stayed = [torch.equal(*pair) for pair in pairwise(overflow.weights)]
    assert stayed == [True, False, False, True, *[False] * (len(stayed) - 4)]
    assert all(torch.isfinite(weight).all() for weight in overflow.weights)
    assert [overflow.scales[i] for i in (0, 1, 3, 4)] == [65536, 32768, 32768, 16384]
    assert overflow.reads == 2 * len(overflow.weights), "those of the test itself, in `state_dict`"


def test_cutmix_mixes_as_fastais_does(small):
    weights = []
    for kind in (CutMix, LazyCutMix):
        learn = small(cutmix=1.0)
        learn.remove_cb(learn.cut_mix)
        torch.manual_seed(1)
        with learn.no_logging():
            learn.fit(1, 0.1, cbs=kind(1.0))
        weights.append(learn.model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(w.values() for w in weights), strict=True))


def test_cutmix_reads_nothing_of_the_device():
    """The meta device has tensors that nobody can read."""
    x, y = torch.empty(8, 3, 32, 32, device="meta"), torch.empty(8, dtype=torch.long, device="meta")
    for kind in (CutMix, LazyCutMix):
        mix = kind(1.0)
        mix.learn, mix.stack_y = SimpleNamespace(xb=(x,), yb=(y,), x=x, y=y), True
        with pytest.raises(RuntimeError, match="meta") if kind is CutMix else nullcontext():
            mix.before_batch()


class Waits(TorchDispatchMode):
    """Notes the copies from the CPU to the meta device for which a program would wait if that were a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func.overloadpacket.__name__
        if name in ("_to_copy", "copy_") and out.device.type == "meta":
            source = args[0 if name == "_to_copy" else 1]
            if source.device.type == "cpu" and not kwargs.get("non_blocking", args[2:] == (True,)):
                self.seen.append(tuple(source.shape))
        return out


class LastBatch(Callback):
    """Forgets the waits of the fit's first batch, and ends the fit after the last one of validation."""

    order = 100

    def __init__(self, waits):
        self.waits = waits

    def after_batch(self):
        if self.training and self.iter == 0:
            self.waits.seen.clear()
        if not self.training and self.iter == self.n_iter - 1:
            raise CancelFitException


@pytest.mark.parametrize(("recipe", "cutmix"), [("demo", 0.0), ("demo", 1.0), ("fast", 0.0)])
def test_no_batch_reads_the_device_or_waits_for_a_copy_to_it(tmp_path, monkeypatch, recipe, cutmix):
    """On the meta device, where reading is an error; batches come to it as from pinned memory."""
    copied, waits = loader.to_device, Waits()
    monkeypatch.setattr(loader, "to_device", lambda batch, device, non_blocking: copied(batch, device, True))
    monkeypatch.setattr(LazyRecorder, "_fetch", noop)  # at the end of an epoch it does read
    dls = get_dls("digits", bs=128, flip=0, workers=0, device="meta")
    learn = get_learner(dls, get_recipe(recipe, width=2, cutmix=cutmix), precision="fp32", path=tmp_path)
    learn.remove_cb(learn.progress)
    with learn.no_logging(), waits:
        learn.fit(1, 0.1, cbs=LastBatch(waits))
    assert learn.train_iter == 11
    assert waits.seen == []


# Compiling


@pytest.fixture
def graphs(monkeypatch):
    """The shapes and modes of what torch has compiled, which is then run as it is."""
    compiled, compile_module = [], nn.Module.compile

    def backend(graph, inputs):
        shape = next(tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor) and t.ndim == 4 and t.shape[1] == 3)
        compiled.append((shape, torch.is_grad_enabled()))
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend=backend))
    torch.compiler.reset()
    yield compiled
    torch.compiler.reset()


def test_one_graph_is_compiled_that_of_training(graphs, small):
    learn = small()
    learn.add_cb(CompiledTraining(learn))
    with learn.no_logging(), learn.no_bar():
        learn.lr_find(num_it=3, show_plot=False)
        learn.fit(2, 0.1)
        evaluate(learn)
    assert graphs == [((128, 3, 32, 32), True)]
    torch.compiler.reset()
    graphs.clear()
    learn = small()
    learn.model.compile()
    with learn.no_logging(), learn.no_bar():
        learn.fit(2, 0.1)
    assert len(graphs) == 3, "without the callback: training, validation, and its last batch"


def test_compiled_for_mps_is_not_channels_last():
    model, x = nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8)
    model, x = (o.to(memory_format=torch.channels_last) for o in (model, x))
    for device, contiguous in (("cuda", False), ("mps", True)):
        compiled = CompiledTraining(SimpleNamespace(model=model))
        learn = SimpleNamespace(model=model, xb=(x,), dls=SimpleNamespace(device=torch.device(device)))
        compiled.learn = learn
        compiled.before_fit()
        compiled.before_batch()
        assert model.weight.is_contiguous() is contiguous
        assert learn.xb[0].is_contiguous() is contiguous


# Several processes


@pytest.fixture
def one_of_two(monkeypatch):
    """This process as the first of two, of which the other one keeps silent."""
    monkeypatch.setattr(distributed, "num_distrib", lambda: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("error", "cause", "left"), [
    (None, None, True), (InputError("--data: no such folder"), None, True), (Stopped("by SIGTERM", 143), None, True),
    (InputError("too little memory"), torch.OutOfMemoryError(), False), (ZeroDivisionError(), None, False),
])  # fmt: skip
def test_after_a_fault_of_one_process_nothing_waits_for_the_others(monkeypatch, error, cause, left):
    """NCCL waits for all of them where the group is destroyed, and gloo does not: the calls are counted."""
    calls = []
    monkeypatch.setattr(distributed, "num_distrib", lambda: 2)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: calls.append("joined"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("left"))
    with pytest.raises(type(error)) if error else nullcontext(), distributed.joined():
        if error:
            raise error from cause
    assert calls == ["joined", "left"][: 1 + left]


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


# The benchmarks


def test_the_benchmark_saves_what_it_has_measured(tmp_path, capsys):
    import gpu

    save = tmp_path / "gpu.json"
    for part in ("steps", "loader"):
        gpu.main(gpu.Options(rehearse=True, only=part, save=str(save)))
        figures = json.loads(save.read_text())
        assert figures["device"] in capsys.readouterr().out
        assert all(value is None or value for row in figures[part] for value in row.values())
    assert [len(figures[part]) for part in ("steps", "loader")] == [4, 2], "the second beside the first"


@pytest.fixture
def only(monkeypatch):
    """A function that runs one part of a benchmark, which finds `[{"ms": 1}]`."""
    import gpu
    import processors
    import speed

    monkeypatch.setattr(gpu.Bench, "loader", lambda self: [{"ms": 1}])
    monkeypatch.setattr(processors, "waiting", lambda: [{"ms": 1}])

    def run(name, save):
        if name == "gpu":
            gpu.main(gpu.Options(rehearse=True, only="loader", save=str(save)))
        else:
            speed.main(only="waiting", device="cpu", save=str(save))
        return json.loads(save.read_text())

    return run


@pytest.mark.parametrize("name", ["gpu", "speed"])
def test_one_part_measured_again_leaves_the_others(only, tmp_path, name):
    save = tmp_path / "figures.json"
    before = only(name, save) | {"memory": [{"MB": 5}]}
    save.write_text(json.dumps(before | {"loader": [], "waiting": []}))
    assert before.items() <= only(name, save).items()


@pytest.mark.parametrize("name", ["gpu", "speed"])
@pytest.mark.parametrize(("change", "what"), [
    ({"device": "a GPU"}, "not comparable, device a GPU there and .* here"),
    ({"commit": "ab12"}, "not comparable, commit ab12 there and "),
    ({"versions": {"torch": "1.0"}}, "not comparable, torch 1.0 there and .* here, fastai None there"),
    ({"versions": None}, "not a file of this benchmark"),
])  # fmt: skip
def test_figures_that_are_not_comparable_stay_alone(only, tmp_path, name, change, what):
    save = tmp_path / "figures.json"
    save.write_text(text := json.dumps(only(name, save) | change))
    with pytest.raises(InputError, match=f"^{save}: .*{what}.*; move it away, or pass another --save$"):
        only(name, save)
    assert save.read_text() == text
