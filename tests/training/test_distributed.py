"""Several processes train as one, here two on the CPU: the same images, the same network, one writer."""

import csv
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, main
from fastai.learner import load_learner

from data import get_dls
from errors import InputError, Stopped

# Layer norm looks at one image at a time, so that two half batches are one batch. No flat areas and small steps: where
# a maximum is in two places, or nearly, rounding decides which of them learns, for one process with two threads, too.
SMALL = {"bs": 16, "cutout": 0, "width": 4, "epochs": 3, "lr": "0.001", "device": "cpu", "norm": "layer"}
SMALL |= {"precision": "fp32", "no_lr_find": True, "no_pictures": True}  # sums differ less than bf16 can tell apart
SMALL |= {"flips": "alternating", "whiten": 1.0, "norm_bias_lr": 4.0, "ema": 0.9, "muon": 0.1}
# The command, and at some batch of epoch 2 a signal from rank 1 to itself; at the end what each rank has learned.
SCRIPT = f"""
import hashlib, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from fastai.callback.core import Callback
import train_fastai
from errors import parse, run_command
from options import Options
OPTIONS = parse(Options)

class Probe(Callback):
    order = 100
    def before_batch(self):
        if not hasattr(self.learn, "checkpoint") or os.environ["RANK"] == "0":
            return
        if "SIGNAL" in os.environ and (self.epoch, self.iter, self.training) == (1, 3, True):
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
    def after_epoch(self):
        if "LOOK" in os.environ and hasattr(self.learn, "checkpoint"):
            self.learn.predict(self.dls.valid_ds[0][0])
            figures = list(self.learn.validate())
            assert figures == list(self.recorder.values[-1][1:]), "of all images"
    def after_fit(self):
        if not hasattr(self.learn, "checkpoint"):
            return  # the range test, or a look at the network
        state = [t.numpy().tobytes() for t in self.model.state_dict().values()]
        digest = hashlib.sha256(b"".join(state)).hexdigest()
        os.write(2, f"weights {{digest}} in {{self.learn.path}}\\n".encode())



run_command(train_fastai.train, OPTIONS, [Probe()])
"""
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


@pytest.fixture
def launch(tmp_path):
    """A function that runs the command with these arguments in two processes."""
    (tmp_path / "train_fastai.py").write_text(SCRIPT)

    def run(given, launcher=TORCHRUN, **env):
        words = [sys.executable, "-m", *launcher, str(tmp_path / "train_fastai.py")]
        for name, value in given.items():
            words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env)

    return run


def outcome(run):
    rows = list(csv.DictReader((run / "history.csv").open()))
    figures = [[float(row[name]) for name in row if name != "seconds"] for row in rows]
    return torch.load(run / "models/last.pth", weights_only=True), figures


def assert_close(run, other):
    """Sums of the same numbers, in another order."""
    (weights, figures), (others, other_figures) = outcome(run), outcome(other)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], atol=1e-5, rtol=0)  # they move by 1.5e-3
    assert all(row == pytest.approx(expected, abs=1e-5) for row, expected in zip(figures, other_figures, strict=True))


@pytest.fixture
def noise(image_folder):
    """The settings for a small data set of noise."""
    return SMALL | {"data": str(image_folder(train=88, test=30))}


@pytest.mark.parametrize(("processes", "workers"), [(2, 0), (2, 2), (3, 0)])
def test_the_batches_of_one_process_are_dealt_out_among_several(processes, workers):
    def batches(rank, size):
        dls = get_dls("digits", bs=96, seed=3, workers=workers, device="cpu")
        for dl in dls.loaders:
            dl.deal(rank, size)
        return [list(dl) for dl in dls.loaders for _ in range(2)]

    dealt = [batches(rank, processes) for rank in range(processes)]
    for epoch, whole in enumerate(batches(0, 1)):
        for i, (x, y) in enumerate(whole):
            shares = [rank[epoch][i] for rank in dealt]
            assert torch.equal(torch.cat([x for x, _ in shares]), x)
            assert torch.equal(torch.cat([y for _, y in shares]), y)
            assert max(len(y) for _, y in shares) - min(len(y) for _, y in shares) <= 1


def test_a_batch_smaller_than_the_number_of_processes_leaves_some_without():
    dls = get_dls("digits", bs=119, device="cpu")  # 359 images to validate on, two of them in the last batch
    sizes = []
    for rank in range(4):
        dls.valid.deal(rank, 4)
        sizes.append([len(y) for _, y in dls.valid])
    assert sum(map(sum, sizes)) == 359
    assert sorted(map(len, sizes)) == [3, 3, 4, 4]


def test_two_processes_train_one_network_and_one_of_them_writes(launch, tmp_path):
    given = SMALL | {"data": "digits", "norm": "batch", "epochs": 3, "bs": 32, "lr": "0.2"}
    del given["no_lr_find"]
    # Whatever that launcher is told, the precision is that of --precision.
    result = launch({**given, "out": "two"}, (*ACCELERATE, "--mixed_precision", "bf16"))
    assert result.returncode == 0, result.stderr
    (_, first, _, folder), (_, second, _, other) = sorted(
        (line.split() for line in result.stderr.splitlines() if line.startswith("weights")), key=lambda w: w[3] != "two"
    )
    assert first == second
    assert folder == "two"
    assert not other.startswith(str(tmp_path / "two"))
    assert result.stdout.count("epoch   3/3") == 1
    assert result.stdout.count("range test   edge") == 1
    assert "again        torchrun --nproc-per-node 2 train_fastai.py" in result.stdout

    main(**given, out=str(tmp_path / "one"))
    names = [sorted(p.relative_to(tmp_path / run) for p in (tmp_path / run).rglob("*")) for run in ("one", "two")]
    assert names[0] == names[1]
    one, two = (json.loads((tmp_path / run / "result.json").read_text()) for run in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert abs(one["last_accuracy"] - two["last_accuracy"]) < 0.1
    assert two["history"][0]["train_loss"] == pytest.approx(one["history"][0]["train_loss"], abs=0.1)
    assert 1 / 3 < two["suggestions"]["minimum"] / one["suggestions"]["minimum"] < 3


def test_a_run_goes_on_with_another_number_of_processes(launch, noise, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        main(**noise, out=str(run), max_minutes=1e-6)
    result = launch({"resume": run, "max_minutes": 10}, SIGNAL="SIGTERM", LOOK="a callback's, which changes nothing")
    assert "stopped by SIGTERM in epoch 2, after" in result.stderr
    assert "of 11 batches; resume with: torchrun --nproc-per-node 2 train_fastai.py --resume" in result.stderr
    assert result.stderr.count("stopped by") == 1
    main(resume=str(run), max_minutes=10)
    main(**noise, out=str(tmp_path / "undisturbed"))
    assert_close(run, tmp_path / "undisturbed")


def test_a_process_that_dies_takes_the_others_down_and_the_run_goes_on(launch, noise, tmp_path):
    del noise["no_lr_find"]
    started = time.monotonic()
    result = launch({**noise, "out": "run"}, SIGNAL="SIGKILL")
    assert time.monotonic() - started < 60
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in result.stderr
    run = tmp_path / "run"
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]
    main(resume=str(run))
    main(**noise, out=str(tmp_path / "undisturbed"))
    assert_close(run, tmp_path / "undisturbed")
    first, second = ((r / "lr_find.csv").read_text().split()[1:30] for r in (run, tmp_path / "undisturbed"))
    first, second = ([float(line.split(",")[1]) for line in lines] for lines in (first, second))
    assert first == pytest.approx(second, abs=1e-5), "the range test's losses are not those of all processes"


def test_what_a_kill_behind_the_end_has_left_undone_is_done(launch, noise, tmp_path):
    run = tmp_path / "run"
    main(**noise, out=str(run))
    (run / "model.pkl").rename(run / ".model.123.pkl")
    (run / "checkpoint.pth").touch()
    result = launch({"resume": run})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished ") == 1
    assert load_learner(run / "model.pkl").predict(np.zeros((32, 32, 3), np.uint8))[0] in ("cat", "dog")
    assert not (run / "checkpoint.pth").exists()
    assert not (run / ".model.123.pkl").exists()


def test_bad_input_is_one_line_of_one_process(launch):
    result = launch({"data": "nonsuch", "device": "cpu"})
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "train_fastai.py: error: nonsuch: no such file or folder; data is " in result.stderr
    assert "[rank1]" not in result.stderr, "the other process has a traceback"


@pytest.mark.parametrize(("env", "given", "words"), [
    ({"WORLD_SIZE": "3"}, {"bs": 128},
     "--bs is 128: it must be a multiple of the number of processes, 3; pass 126 or 129"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, {"bs": 128}, "WORLD_SIZE is 2, but the processes do not find each other"),
])  # fmt: skip
def test_processes_that_cannot_train_together(tmp_path, monkeypatch, env, given, words):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        main(**{**SMALL, "data": "digits", **given}, out=str(tmp_path / "run"))
