"""What only a GPU shows, on one where there is one: `test_gpu_stand_ins.py` has what can be shown without.

python -m pytest tests/test_gpu.py -n 0
TEST_DEVICE=cpu python -m pytest tests/test_gpu.py -n 0      whether the tests themselves work
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, StopAt, main, outcome, same
from fastai.callback.core import Callback

from data import get_dls
from errors import Stopped
from recipes import get_recipe
from train_fastai import get_learner
from trained.device import get_device
from trained.loading import load_model
from training import precision
from training.callbacks import CompiledTraining
from training.precision import PRECISIONS, obstacle

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not GPUS, reason="needs a GPU")

SERVE = """
import sys
from fastai.learner import load_learner
from data import get_dls
learn = load_learner(sys.argv[1])
images = list(get_dls("digits", bs=128, device="cpu").valid_ds.items.images[:3])
print(len(learn.get_preds(dl=learn.dls.test_dl(images))[0]), "predictions")
"""
SMALL = {"data": "digits", "bs": 64, "width": 8, "epochs": 3, "flip": 0.0, "device": DEVICE, "no_lr_find": True}
SMALL |= {"no_pictures": True, "workers": 2}


@pytest.fixture(autouse=True)
def flags():
    """torch's switches as they were."""
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    torch.backends.cudnn.benchmark = before[0]
    torch.use_deterministic_algorithms(before[1])


def learner(tmp_path, precision="fp32", recipe="demo", **changes):
    dls = get_dls("digits", bs=128, flip=0, workers=2, device=get_device(DEVICE))
    torch.manual_seed(0)
    return get_learner(dls, get_recipe(recipe, width=8, **changes), precision=precision, path=tmp_path)


def skip_unless(name):
    if why := obstacle(name, torch.device(DEVICE)):
        pytest.skip(why)


class NoWait(Callback):
    """From the first batch of an epoch's training or validation to the last nothing may wait for the GPU."""

    order = -90  # before all others in a batch's events

    def _allow(self, waits: bool):
        if DEVICE == "cuda" and self.epoch:  # the first epoch tries cuDNN's ways
            torch.cuda.set_sync_debug_mode("default" if waits else "error")

    def before_batch(self):
        self._allow(waits=False)

    def after_batch(self):
        self._allow(waits=self.iter == self.n_iter - 1)

    def after_fit(self):
        self._allow(waits=True)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(("recipe", "cutmix"), [("demo", 0.0), ("demo", 1.0), ("fast", 0.0)])
@pytest.mark.parametrize("bar", [True, False])
def test_no_batch_waits_for_the_gpu(tmp_path, name, recipe, cutmix, bar):
    skip_unless(name)
    if (name, recipe) == ("fp16", "fast"):
        pytest.skip("with Muon, torch's gradient scaler reads whether the gradients overflowed")
    learn = learner(tmp_path, name, recipe, cutmix=cutmix)
    try:
        with learn.no_logging(), nullcontext() if bar else learn.no_bar():
            if bar:
                learn.progress.after_batch = lambda: None  # it reads the loss five times a second
            learn.fit(2, 0.05, cbs=NoWait())
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("recipe", ["demo", "fast"])
def test_a_run_in_each_precision(tmp_path, name, recipe, capsys):
    skip_unless(name)
    result = main(**SMALL, recipe=recipe, precision=name, out=str(tmp_path / "run"))
    assert result["last_accuracy"] > 0.5
    assert result["device"].startswith(DEVICE)
    model = load_model(tmp_path / "run", "cpu")
    table = get_dls("digits", bs=128, device="cpu").valid_ds.items
    pixels, labels = table.batch(range(len(table)))
    assert abs((model.logits(pixels).argmax(1) == labels).mean() - result["last_accuracy"]) < 0.02


def test_deterministic_runs_are_the_same_also_stopped_and_resumed(tmp_path, capsys):
    for name in ("one", "two"):
        main(**SMALL, deterministic=True, out=str(tmp_path / name))
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 3), **SMALL, deterministic=True, out=str(tmp_path / "stopped"))
    main(resume=str(tmp_path / "stopped"))
    one = outcome(tmp_path / "one")
    assert same(one, outcome(tmp_path / "two"))
    assert same(one, outcome(tmp_path / "stopped"))


def test_a_run_begun_on_the_gpu_goes_on_on_a_cpu_and_back(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        main(cbs=StopAt(0, 3), **SMALL, precision="bf16", out=str(run))
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 3), resume=str(run), device="cpu", workers=0)
    torch.backends.cudnn.benchmark = False
    main(resume=str(run), device=DEVICE)
    assert torch.backends.cudnn.benchmark is (DEVICE == "cuda")
    assert json.loads((run / "result.json").read_text())["last_accuracy"] > 0.3


def test_compiled_training(tmp_path):
    learn = learner(tmp_path)
    torch.compiler.reset()
    learn.add_cb(CompiledTraining(learn))
    with learn.no_logging(), learn.no_bar():
        learn.fit(3, 0.1)
    assert learn.recorder.values[-1][-1] > 0.3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


def test_the_exported_learner_serves_where_no_gpu_is(tmp_path):
    learn = learner(tmp_path)
    with learn.no_logging(), learn.no_bar():
        learn.fit(1, 0.1)
    learn.export("learner.pkl")
    script = tmp_path / "script.py"
    script.write_text(SERVE)
    words = [sys.executable, str(script), str(tmp_path / "learner.pkl")]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT)
    assert "3 predictions" in result.stdout, result.stderr
    assert "pin_memory" not in result.stderr


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_second_gpu_takes_nothing_of_the_first(tmp_path, capsys):
    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    main(**{**SMALL, "device": "cuda:1"}, out=str(tmp_path / "run"))
    assert torch.cuda.current_device() == 1
    assert torch.cuda.max_memory_allocated(0) == before
    torch.cuda.set_device(0)


@pytest.mark.skipif(DEVICE == "cuda" and GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("norm", [[], ["--sync-bn"]])
def test_two_processes(tmp_path, norm):
    if norm and DEVICE == "cpu":
        pytest.skip("on GPUs alone")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(ROOT / "train_fastai.py"), "--recipe", "demo", "--bs", "128", "--epochs", "3", "--device", DEVICE]
    words += ["--no-pictures", "--out", str(tmp_path / "run"), *norm]
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"}
    result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["processes"] == 2
