"""A training that was stopped, killed or damaged continues as if nothing had happened."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, StopAt, main, outcome, same
from fastai.callback.core import Callback

from errors import InputError, Stopped
from files import leftovers, locked
from model import CustomResNet
from recipes import RECIPES
from training.callbacks import ReduceLR
from training.checkpoint import load_checkpoint

SMALL = {"data": "digits", "bs": 128, "width": 2, "epochs": 3, "lr": "0.05", "device": "cpu", "no_lr_find": True}
SMALL["no_pictures"] = True


def names(run):
    return {path.name for path in run.iterdir()}


# ALL=1 tries every recipe, which takes minutes
RUNS = [("fast", 2), ("plateau", 0), ("seed", 0)] + [
    (name, n) for name in RECIPES for n in (0, 2) if os.environ.get("ALL")
]


@pytest.mark.parametrize(("recipe", "workers"), RUNS)
def test_resumed_is_as_never_stopped(tmp_path, capsys, recipe, workers):
    """Stopped in the first batch of an epoch, in a later one, and while it validates; CutMix draws at every batch."""
    options = SMALL | {"recipe": recipe, "workers": workers, "cutmix": 1.0}
    main(**options, out=str(tmp_path / "whole"))
    run = tmp_path / "stopped"
    options["out"] = str(run)
    for place in ((0, 3), (1, 2, False)):
        with pytest.raises(
            Stopped, match=r"stopped by SIGTERM in epoch .* resume with: python train_fastai.py --resume "
        ) as e:
            main(cbs=StopAt(*place), **options)
        assert e.value.code == 143
        assert "checkpoint.pth" in names(run)
        assert "result.json" not in names(run)
        options = {"resume": str(run)}
    main(**options)
    assert same(outcome(run), outcome(tmp_path / "whole"))
    assert names(run) == names(tmp_path / "whole"), "and no checkpoint is left"
    assert "from epoch 2, batch 12 on" in capsys.readouterr().out


class Draws(Callback):
    """Draws from Python's and from numpy's generator at every batch."""

    def before_fit(self):
        self.drawn = []

    def before_batch(self):
        self.drawn.append((random.random(), np.random.rand()))


def test_all_random_generators_go_on(tmp_path, capsys):
    whole, rest, options = Draws(), Draws(), SMALL | {"recipe": "demo", "bs": 256, "epochs": 2}
    main([whole], **options, out=str(tmp_path / "whole"))
    with pytest.raises(Stopped):
        main([Draws(), StopAt(1, 2)], **options, out=str(tmp_path / "stopped"))
    main([rest], resume=str(tmp_path / "stopped"))
    assert rest.drawn == whole.drawn[-len(rest.drawn) :]


class Counts(Callback):
    """Counts batches, and predicts between the parts of an epoch."""

    def __init__(self, start=0):
        self.count = start

    def after_batch(self):
        self.count += 1

    def after_train(self):
        self.learn.predict(self.dls.valid_ds[0][0])

    after_epoch = after_train

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_callbacks_of_ones_own_go_on(tmp_path, capsys):
    """Also two of one class, and one that was not there when the run was started."""
    options = SMALL | {"recipe": "fast", "bs": 256}
    main(**options, out=str(tmp_path / "whole"))
    begun, resumed = [Counts(), Counts(1000)], [Counts(), Counts(), Counts()]
    with pytest.raises(Stopped):
        main([*begun, StopAt(1, 2)], **options, out=str(tmp_path / "stopped"))
    main(resumed, resume=str(tmp_path / "stopped"))
    rest = resumed[2].count
    assert rest > 0
    assert [cb.count for cb in resumed[:2]] == [cb.count + rest for cb in begun]
    assert same(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))


def test_a_plateaus_patience_goes_on():
    begun, resumed = (ReduceLR("valid_loss", patience=3) for _ in range(2))
    begun.best, begun.wait = 0.5, 2
    resumed.load_state_dict(begun.state_dict())
    assert (resumed.best, resumed.wait) == (0.5, 2)


class Break(Callback):
    """In the second epoch's third batch, the loss is not finite, and somebody asks the training to stop."""

    def before_batch(self):
        if (self.epoch, self.iter) == (1, 2):
            self.learn.xb = (self.x * float("nan"),)
            self.checkpoint.ask_to_stop(143)


def test_weights_that_are_no_numbers_are_not_kept(tmp_path, capsys):
    with pytest.raises(InputError, match="the training loss became nan in epoch 2, batch 3"):
        main([Break()], **SMALL, recipe="demo", out=str(tmp_path / "run"))
    assert not (tmp_path / "run/checkpoint.pth").exists()


def test_the_peak_of_the_range_test_stays(tmp_path, capsys):
    options = {**SMALL, "recipe": "demo", "lr": "auto", "no_lr_find": False}
    main(**options, out=str(tmp_path / "whole"))
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 1), **options, out=str(tmp_path / "stopped"))
    main(resume=str(tmp_path / "stopped"))
    assert same(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))


def test_one_command_starts_goes_on_and_says_that_it_is_done(tmp_path, capsys):
    run = tmp_path / "run"
    options = SMALL | {"recipe": "demo", "resume": "auto", "out": str(run)}
    with pytest.raises(Stopped, match="in epoch 2, after 1 of 11 batches"):
        main(cbs=StopAt(1, 0), **options)
    main(**options)
    first = outcome(run)
    capsys.readouterr()
    result = main(**options)
    assert capsys.readouterr().out == f"finished     {run}: {result['last_accuracy']:.2%} accuracy after 3 epochs\n"
    assert same(outcome(run), first)


def test_several_runs_go_on_where_they_were_stopped(tmp_path, capsys):
    options = SMALL | {"recipe": "demo", "epochs": 1, "runs": 2, "seed": 3}
    main(**options, out=str(tmp_path / "whole"))
    options |= {"resume": "auto", "out": str(tmp_path / "stopped")}
    with pytest.raises(Stopped):
        main(cbs=StopAt(0, 4), **options)
    main(**options)
    for seed in (3, 4):
        assert same(outcome(tmp_path / f"stopped/seed-{seed}"), outcome(tmp_path / f"whole/seed-{seed}"))


def command(*arguments, limit=resource.RLIM_INFINITY):
    """A run of the command that hears signals, and can write files of at most `limit` bytes."""

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests in the background has Ctrl-C ignored
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words, pipe = [sys.executable, str(ROOT / "train_fastai.py"), *map(str, arguments)], subprocess.PIPE
    env = {**os.environ, "MPLCONFIGDIR": matplotlib.get_cachedir()}  # there its list of fonts is made already
    options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True, "env": env}
    return subprocess.Popen(words, preexec_fn=prepare, **options)


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGINT, 130, "by Ctrl-C"), (signal.SIGHUP, 129, "by SIGHUP")]
)
def test_a_signal_stops_after_the_batch(tmp_path, capsys, number, code, words):
    options = {"--recipe": "demo", "--width": 2, "--epochs": 6, "--device": "cpu", "--workers": 2}
    start = [word for option in options.items() for word in option]
    process = command(*start, "--no-lr-find", "--out", tmp_path / "run")
    for line in process.stdout:
        if line.startswith("epoch   1/6"):
            break
    os.killpg(process.pid, number)  # as a terminal and a cluster do: its workers get it too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert errors.startswith(f"train_fastai.py: stopped {words} in epoch ")
    assert errors.endswith(f"resume with: python train_fastai.py --resume {tmp_path / 'run'}\n")
    assert errors.count("\n") == 1
    assert not leftovers(tmp_path / "run"), "nothing half-written"

    if number == signal.SIGINT:
        return  # once is enough
    main(resume=str(tmp_path / "run"))
    main(**{name[2:]: value for name, value in options.items()}, no_lr_find=True, out=str(tmp_path / "whole"))
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_max_minutes_is_no_failure(tmp_path, capsys):
    with pytest.raises(Stopped, match="stopped after --max-minutes in epoch 1, after 1 of 11 batches") as e:
        main(**SMALL, recipe="demo", max_minutes=1e-9, out=str(tmp_path / "run"))
    assert e.value.code == 0


# Faults


@pytest.mark.parametrize("limit", [200_000])  # bytes: less than a checkpoint has; 60,000 is less than a picture has
def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path, capsys, limit):
    options = ["--recipe", "demo", "--width", 4, "--epochs", 2, "--device", "cpu", "--out", tmp_path / "run"]
    main(recipe="demo", width=4, epochs=2, device="cpu", out=str(tmp_path / "whole"))  # the images are in the cache now
    process = command(*options, limit=limit)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert errors.count("\n") == 1, errors
    assert "make room, then resume with: python train_fastai.py --resume" in errors
    assert "File too large" in errors or "a file could not be written" in errors
    assert not leftovers(tmp_path / "run") + leftovers(tmp_path / "run/models"), "nothing half-written"
    main(**{word.strip("-"): value for word, value in zip(options[::2], options[1::2], strict=True)}, resume="auto")
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_a_loader_process_that_dies_is_named(tmp_path, capsys, monkeypatch):
    class Kill(Callback):
        def before_batch(self):
            if self.epoch == 1 and self.training:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
                time.sleep(1)

    options = SMALL | {"recipe": "demo", "no_lr_find": True}
    with pytest.raises(InputError, match=r"DataLoader worker .* killed by signal: Killed, perhaps .* --workers 0"):
        main(cbs=Kill(), **options, workers=1, out=str(tmp_path / "run"))
    main(resume=str(tmp_path / "run"), workers=0)
    main(**options, out=str(tmp_path / "whole"))
    assert same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_says_where_and_keeps_what_was_good(tmp_path, capsys, monkeypatch):
    class Wreck(Callback):
        def before_batch(self):
            if (self.epoch, self.iter, self.training) == (1, 4, True):
                self.learn.xb = (self.x * float("nan"),)

    monkeypatch.setattr("training.checkpoint.EVERY", 0)
    with pytest.raises(InputError, match=r"the training loss became nan in epoch 2, batch 5, learning rate 0\.0\d+: "):
        main(cbs=Wreck(), **SMALL, recipe="demo", out=str(tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run", CustomResNet(width=2))
    assert state["epoch"] == 1
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_too_little_memory_says_what_to_try(tmp_path, capsys, monkeypatch):
    class Full(Callback):
        def before_batch(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(InputError, match="too little memory for batches of 128; try --bs 64"):
        main(cbs=Full(), **SMALL, recipe="demo", out=str(tmp_path / "run"))


# What cannot be resumed


@pytest.fixture
def stopped(tmp_path, capsys, monkeypatch):
    """A run that was stopped in its second epoch, with a checkpoint behind the first."""
    monkeypatch.setattr("training.checkpoint.EVERY", 0)
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 2), **SMALL, recipe="demo", out=str(tmp_path / "run"))
    return tmp_path / "run"


def test_another_setting_is_refused(stopped):
    for options, expected in (
        ({"epochs": 5}, "--epochs 5: .* started with 3; the learning rates of all epochs depend on it; leave it out"),
        ({"lr": "0.1"}, "--lr 0.1: .* was started with 0.05"),
        ({"seed": 1}, "--seed 1: .* was started with 0"),
        ({"recipe": "seed"}, "--recipe seed: .* was started with demo"),
        ({"wd": 0.1}, "--wd 0.1: .* was started with 0.0005"),
        ({"tta": True}, "--tta True: .* was started with False"),
        ({"out": "elsewhere"}, "--out elsewhere: a resumed run stays in its own folder"),
    ):
        with pytest.raises(InputError, match=expected):
            main(resume=str(stopped), **options)


def test_the_same_setting_and_another_number_of_workers_are_not(stopped, capsys):
    main(resume=str(stopped), recipe="demo", epochs=3, lr="0.05", wd=5e-4, workers=1)
    assert json.loads((stopped / "result.json").read_text())["workers"] == 1


def test_a_run_of_an_earlier_version_goes_on_with_the_defaults_of_what_it_lacks(stopped, tmp_path, capsys):
    config = json.loads((stopped / "config.json").read_text())
    for name in ("cutmix", "deterministic"):
        del config["options"][name], config[name]
    (stopped / "config.json").write_text(json.dumps(config))
    main(resume=str(stopped))
    main(**SMALL, recipe="demo", out=str(tmp_path / "whole"))
    assert same(outcome(stopped), outcome(tmp_path / "whole"))


def test_what_a_recipe_has_since_the_run_was_started_is_refused(tmp_path, capsys):
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 2), **SMALL, recipe="fast", out=str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["options"]["muon"], config["muon"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"muon is 0\.1, but it was started with 0\.0; start anew"):
        main(resume=str(tmp_path))


def test_no_run_no_resume(tmp_path):
    with pytest.raises(InputError, match=r"nothing: not the folder of a run, no config\.json"):
        main(resume=str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: not that of a run of this version"):
        main(resume=str(tmp_path))
    with pytest.raises(InputError, match="--resume auto: pass --out RUN too"):
        main(resume="auto")


def test_other_images_are_refused(image_folder, tmp_path, capsys):
    root = image_folder()
    options = SMALL | {"data": str(root), "bs": 2, "out": str(tmp_path / "run")}
    with pytest.raises(Stopped):
        main(cbs=StopAt(1, 0), **options)
    (root / "train/cat/000.png").write_bytes((root / "train/dog/000.png").read_bytes())
    with pytest.raises(InputError, match="the images are others, but it was started with"):
        main(resume=str(tmp_path / "run"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(stopped, tmp_path, capsys):
    path, content = stopped / "checkpoint.pth", (stopped / "checkpoint.pth").read_bytes()
    for harm in (cut, flip, lambda path: path.write_bytes(b""), lambda path: path.write_text("words")):
        path.unlink()
        path.write_bytes(content)
        harm(path)
        with pytest.raises(InputError, match=r"checkpoint\.pth: damaged, delete it to resume from the one before") as e:
            load_checkpoint(stopped, CustomResNet(width=2))
        assert "\n" not in str(e.value)
    path.unlink()
    main(resume=str(stopped))
    main(**SMALL, recipe="demo", out=str(tmp_path / "whole"))
    assert same(outcome(stopped), outcome(tmp_path / "whole"))


def test_a_checkpoint_runs_no_code(stopped, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"format": 1, "model": Evil()}, stopped / "checkpoint.pth")
    with pytest.raises(InputError, match=r"checkpoint\.pth: damaged"):
        main(resume=str(stopped))
    assert not (tmp_path / "evil").exists()


def test_the_checkpoint_of_another_network_or_version_is_refused(stopped):
    state = torch.load(stopped / "checkpoint.pth", weights_only=True)
    for change, expected in (
        ({"model": CustomResNet(width=3).state_dict()}, "the checkpoint of another network"),
        ({"model": CustomResNet(width=2, norm="layer").state_dict()}, "the checkpoint of another network"),
        ({"format": 0}, "not a checkpoint of this version of the project"),
        ({"more": 1}, "not a checkpoint of this version of the project"),
    ):
        torch.save(state | change, stopped / "checkpoint.pth")
        with pytest.raises(InputError, match=rf"checkpoint\.pth: {expected}$"):
            main(resume=str(stopped))
    torch.save([1], stopped / "checkpoint.pth")
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        main(resume=str(stopped))


def test_two_runs_never_share_a_folder(stopped):
    holder = "import sys, pathlib, files\nwith files.locked(pathlib.Path(sys.argv[1])): print(); input()"
    pipe = subprocess.PIPE
    words = [sys.executable, "-W", "ignore", "-c", holder, str(stopped)]
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, cwd=ROOT)
    process.stdout.readline()
    with pytest.raises(InputError, match="run: another process trains in this folder; wait for it"):
        main(resume=str(stopped))
    process.kill()
    process.wait()
    with locked(stopped):
        pass
