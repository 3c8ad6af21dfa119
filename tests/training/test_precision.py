"""Training in bf16 is repeatable, resumes bit for bit, and is measured at its end in fp32, as the files are."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, StopAt, main, outcome, same
from fastai.callback import fp16
from fastai.callback.core import Callback
from fastai.learner import load_learner
from fastcore.basics import noop

from data import get_dls
from errors import InputError, Stopped
from recipes import get_recipe
from reporting.evaluation import evaluate
from train_fastai import get_learner
from trained.classifier import without_tf32
from trained.safe_file import load_safetensors
from training import description, precision
from training.precision import MixedPrecision, choose_precision, full_precision

SMALL = {"recipe": "demo", "bs": 128, "width": 2, "epochs": 2, "device": "cpu", "no_pictures": True}
CPU = torch.device("cpu")


@pytest.fixture
def bf16(monkeypatch):
    """A processor with bf16; torch emulates it on others."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)


@pytest.fixture
def small():
    """A function that makes a small learner of that precision."""

    def make(precision, **kwargs):
        dls = get_dls("digits", bs=128, flip=0, device="cpu")
        torch.manual_seed(0)
        learn = get_learner(dls, get_recipe("demo", width=2), precision=precision, **kwargs)
        learn.remove_cb(learn.progress)
        return learn

    return make


class Types(Callback):
    """Keeps the type of what the network computes in training."""

    def before_fit(self):
        self.dtypes = set()
        self.hook = self.model.body[0].register_forward_hook(lambda *args: self.dtypes.add(args[-1].dtype))

    def after_fit(self):
        self.hook.remove()


def test_auto_is_the_fastest_that_the_device_has(monkeypatch):
    for features, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        ({"bf16": True, "architecture": "arm64"}, "bf16"),
        ({"avx512_bf16": False, "avx2": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features, raising=False)
        assert choose_precision("auto", CPU) == expected
        assert choose_precision("fp32", CPU) == "fp32"
    with pytest.raises(InputError, match="--precision bf16: this cpu has no bf16, and to emulate it is slower"):
        choose_precision("bf16", CPU)
    with pytest.raises(InputError, match="--precision fp16: fp16 on cpu is far slower than fp32"):
        choose_precision("fp16", CPU)
    for capability, expected in (((8, 0), "bf16"), ((9, 0), "bf16"), ((7, 5), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert choose_precision("auto", torch.device("cuda")) == expected
        assert choose_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(InputError, match="this cuda has no bf16"):
        choose_precision("bf16", torch.device("cuda"))
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    with pytest.raises(InputError, match=r"'half': it must be auto, fp32, bf16, fp16"):
        choose_precision("half", CPU)


def test_a_refused_precision_is_one_line_before_anything_is_written(command, tmp_path):
    result = command("--recipe", "demo", "--device", "cpu", "--precision", "fp16")
    assert result.returncode == 2
    assert result.stderr == "train_fastai.py: error: --precision fp16: fp16 on cpu is far slower than fp32; " \
                            "pass auto, or fp32\n"  # fmt: skip
    assert not (tmp_path / "cwd/runs").exists()


def test_bf16_computes_in_bf16_and_says_so(bf16, tmp_path, capsys):
    for name in ("bf16", "fp32"):
        main(**SMALL, precision=name, no_lr_find=True, out=str(tmp_path / name))
        assert json.loads((tmp_path / name / "config.json").read_text())["precision"] == name
    weights, _, _ = zip(*(outcome(tmp_path / name) for name in ("bf16", "fp32")), strict=True)
    assert not torch.equal(*(last["head.weight"] for last, _ in weights))
    assert all(weight.dtype != torch.bfloat16 for last, _ in weights for weight in last.values())
    assert "precision       bf16" in capsys.readouterr().out


def test_one_seed_one_result_in_bf16_for_any_workers(bf16, tmp_path, capsys):
    main(**SMALL, precision="bf16", no_lr_find=True, out=str(tmp_path / "a"))
    main(**SMALL, precision="bf16", workers=2, no_lr_find=True, out=str(tmp_path / "b"))
    assert same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))


def test_stopped_and_resumed_in_bf16_is_as_never_stopped(bf16, tmp_path, capsys):
    options = SMALL | {"no_lr_find": True}
    main(**options, out=str(tmp_path / "whole"))
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 3), **options, out=str(tmp_path / "stopped"))
    with pytest.raises(InputError, match=r"--precision fp32: .* was started with bf16; leave it out"):
        main(resume=str(tmp_path / "stopped"), precision="fp32")
    main(resume=str(tmp_path / "stopped"))
    assert same(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))
    assert json.loads((tmp_path / "stopped/result.json").read_text())["precision"] == "bf16"


class Scale(Callback):
    """Keeps the state of the gradient scaler."""

    def after_epoch(self):
        self.state = self.scaler.state_dict()


def test_the_scale_of_fp16_goes_on_after_a_stop(image_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "obstacle", lambda precision, device: None)
    monkeypatch.setitem(precision.DTYPES, "fp16", torch.bfloat16)  # a CPU takes minutes for a step in fp16
    options = SMALL | {"data": str(image_folder(train=16)), "bs": 8, "precision": "fp16", "no_lr_find": True}
    whole, rest = Scale(), Scale()
    main([whole], **options, out=str(tmp_path / "whole"))
    with pytest.raises(Stopped):
        main([StopAt(0, 2)], **options, out=str(tmp_path / "stopped"))
    main([rest], resume=str(tmp_path / "stopped"))
    assert rest.state == whole.state
    assert whole.state["_growth_tracker"] == 8, "steps without an overflow"


def test_a_bf16_run_does_not_go_on_where_it_would_be_emulated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device: True)
    with pytest.raises(Stopped):
        main(cbs=StopAt(0, 3), **SMALL, no_lr_find=True, out=str(tmp_path / "run"))
    monkeypatch.setattr(precision, "has_bf16", lambda device: False)
    with pytest.raises(InputError, match="--precision bf16: this cpu has no bf16"):
        main(resume=str(tmp_path / "run"))


def test_what_a_run_ends_with_is_what_its_files_compute(bf16, tmp_path, capsys):
    options = {"recipe": "fast", "data": "digits", "bs": 64, "width": 4, "epochs": 1, "lr": "0.1"}
    main(
        **options, device="cpu", precision="bf16", tta=True, no_lr_find=True, no_pictures=True, out=str(tmp_path / "r")
    )
    result = json.loads((tmp_path / "r/result.json").read_text())
    classifier, _ = load_safetensors(tmp_path / "r/model.safetensors")
    table = get_dls("digits", bs=64, device="cpu").valid_ds.items
    pixels, labels = map(torch.from_numpy, table.batch(list(range(len(table)))))
    with torch.no_grad():
        logits, mirrored = classifier(pixels), classifier(pixels.flip(2))
    for name, scores in (("last_accuracy", logits), ("tta_accuracy", logits + mirrored)):
        assert result[name] == pytest.approx((scores.argmax(1) == labels).float().mean().item(), abs=1e-6)
    learn = load_learner(tmp_path / "r/model.pkl")
    loaded, _ = learn.get_preds(dl=learn.dls.test_dl(list(pixels.numpy()), bs=64), act=noop)
    assert torch.allclose(loaded, logits, atol=1e-4)


def test_evaluation_and_export_are_in_fp32_and_the_learner_goes_on_in_bf16(bf16, small, tmp_path):
    learn, types = small("bf16", path=tmp_path), Types()
    with learn.no_logging():
        learn.fit(1, 0.1, cbs=types)
        assert types.dtypes == {torch.bfloat16}
        trained, _ = learn.get_preds()
        assert trained.dtype == torch.float32, "whatever a user does with predictions works"
        with full_precision(learn):
            full, _ = learn.get_preds()
        assert (full - trained).abs().max() > 1e-5
        assert np.allclose(evaluate(learn).probabilities, full, atol=1e-6)
        learn.export("learner.pkl")
        learn.fit(1, 0.1, cbs=types)
        assert types.dtypes == {torch.bfloat16}
    loaded = load_learner(tmp_path / "learner.pkl")
    again, _ = loaded.get_preds(dl=loaded.dls.test_dl(list(learn.dls.valid_ds.items.batch(range(359))[0])))
    assert torch.allclose(again, full, atol=1e-5)


@pytest.mark.parametrize(
    ("start", "change", "expected", "warning"),
    [
        ("bf16", lambda learn: learn.to_fp16(), torch.bfloat16, "fp16 on cpu is far slower than fp32: still in bf16"),
        ("bf16", lambda learn: learn.to_bf16(), torch.bfloat16, None),
        ("fp32", lambda learn: learn.to_bf16(), torch.bfloat16, "now in bf16, not fp32"),
        ("fp32", lambda learn: learn.add_cb(fp16.MixedPrecision()), torch.float32, "fp16 on cpu .* still in fp32"),
        ("bf16", lambda learn: learn.add_cb(MixedPrecision("fp32")), torch.float32, "now in fp32, not bf16"),
        ("bf16", lambda learn: learn.to_fp32(), torch.float32, None),
    ],
)
def test_fastais_own_ways_to_say_it_leave_one_that_counts(bf16, small, recwarn, start, change, expected, warning):
    learn, types = small(start), Types()
    change(learn)
    recwarn.clear()
    with learn.no_logging():
        learn.fit(1, 0.1, cbs=types)
    assert types.dtypes == {expected}
    callbacks = [cb for cb in learn.cbs if isinstance(cb, fp16.MixedPrecision)]
    assert len(callbacks) <= 1
    assert not callbacks or callbacks == [learn.autocast]
    said = [str(w.message) for w in recwarn if w.category is UserWarning]
    assert len(said) == bool(warning)
    assert not warning or re.search(warning, said[0])
    with learn.no_logging():
        learn.fit(1, 0.1, cbs=types)
    assert types.dtypes == {expected}


def test_a_learner_that_has_come_from_a_gpu_goes_on_in_fp32(small, monkeypatch):
    monkeypatch.setattr(precision, "obstacle", lambda precision, device: None)
    learn, types = small("fp16"), Types()
    monkeypatch.undo()
    with learn.no_logging(), pytest.warns(UserWarning, match="fp16 on cpu is far slower than fp32: now in fp32"):
        learn.fit(1, 0.1, cbs=types)
    assert types.dtypes == {torch.float32}


def test_an_interrupted_batch_leaves_no_precision_behind(bf16, small):
    class Interrupt(Callback):
        def after_pred(self):
            raise KeyboardInterrupt

    learn = small("bf16")
    with learn.no_logging(), pytest.raises(KeyboardInterrupt):
        learn.fit(1, 0.1, cbs=Interrupt())
    assert not torch.is_autocast_enabled("cpu")


def test_files_are_computed_without_tf32():
    before = torch.backends.cudnn.allow_tf32
    with without_tf32():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 is before


# What a run says of itself


def test_the_commit_and_whether_the_code_was_changed(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    monkeypatch.setattr(description, "__file__", str(tmp_path / "training/description.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert description.code_version() == {"commit": None, "clean": None, "repository": None}
    (tmp_path / "run.py").write_text("1")
    git("init")
    git("add", "run.py")
    git("-c", "user.name=a", "-c", "user.email=b", "commit", "-m", "c")
    commit = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert description.code_version() == {"commit": commit.strip(), "clean": True, "repository": None}
    (tmp_path / "run.py").write_text("2")
    for origin, web in (
        ("https://me:secret@host.org:8443/owner/name.git", "https://host.org:8443/owner/name"),
        ("git@host.org:owner/name.git", "https://host.org/owner/name"),
        ("/home/me/name.git", None),
    ):
        git("config", "remote.origin.url", origin)
        assert description.code_version() == {"commit": commit.strip(), "clean": False, "repository": web}


def test_few_batches_an_epoch_are_a_warning_with_what_to_pass(image_folder, tmp_path, capsys):
    few = {"data": str(image_folder(train=12)), "recipe": "ancestor", "epochs": 1, "width": 2, "no_lr_find": True}
    few |= {"device": "cpu", "no_pictures": True}
    for how, warning in (
        ({"bs": 8}, "an epoch has 3 batches, few for a peak learning rate of 0.4; pass --bs 4 --lr 0.003"),
        ({"bs": 4, "lr": "0.003"}, None),
        ({"bs": 2}, None),  # twelve batches
    ):
        main(**few, **how, out=str(tmp_path / f"{how['bs']}"))
        assert capsys.readouterr().err == (f"warning: {warning}\n" if warning else "")


def test_a_long_training_on_a_cpu_says_how_long(tmp_path, capsys):
    with pytest.raises(Stopped):
        main(**SMALL | {"epochs": 10_000, "max_minutes": 0.15}, no_lr_find=True, out=str(tmp_path / "run"))
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("time ")]
    rows = json.loads((tmp_path / "run/config.json").read_text()), (tmp_path / "run/history.csv").read_text()
    seconds = [float(row.split(",")[-1]) for row in rows[1].splitlines()[1:]]
    number, unit = line.split("about ")[1].split()[:2]
    told = float(number) * {"minutes": 60, "hours": 3600}[unit]
    assert 0.5 < told / (10_000 * sum(seconds) / len(seconds)) < 2


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"KMP_BLOCKTIME": "1"}])
def test_idle_threads_sleep_unless_the_environment_says_otherwise(tmp_path, own):
    script = tmp_path / "script.py"
    show = "print({k: os.environ.get(k) for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME')})"
    script.write_text(f"import os\nfrom errors import parse\n\ndef main():\n    {show}\n\nparse(main)\n")
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    env = {k: v for k, v in os.environ.items() if k not in names} | {"PYTHONPATH": str(ROOT)} | own
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, check=True).stdout
    ours = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
    assert eval(said) == dict.fromkeys(names) | (own or ours)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("own", [{}, {"MALLOC_MMAP_MAX_": "65536"}])
def test_a_batch_gets_the_memory_of_the_one_before_unless_the_environment_says_otherwise(tmp_path, own):
    script = tmp_path / "script.py"
    script.write_text("""
from resource import RUSAGE_SELF, getrusage
from errors import parse

def main():
    for _ in range(2):
        faults = getrusage(RUSAGE_SELF).ru_minflt
        bytearray(1 << 26)  # as large as an activation; it touches every page
    print(getrusage(RUSAGE_SELF).ru_minflt - faults)

parse(main)
""")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"PYTHONPATH": str(ROOT)} | own
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, check=True).stdout
    assert (int(said) < 100) == (not own), f"{said} pages were new the second time"
