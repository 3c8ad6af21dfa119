"""The main job, as a user runs it."""

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, main
from fastai.callback.core import Callback
from fastai.learner import load_learner
from PIL import Image

from data import get_dls
from errors import InputError
from recipes import get_recipe
from train_fastai import get_learner
from trained.device import set_deterministic
from training.history import RunLog

FILES = {
    "config.json", "history.csv", "result.json", "augmentations.png", "loss.png", "accuracy.png", "model.pkl",
    "model.safetensors", "lr_find.png", "lr_find.csv", "lr_find.json", "models/best.pth", "models/last.pth",
    "README.md", "schedule.png", "confusion.png", "classes.png", "reliability.png", "wrong.png", "uncertain.png",
    "loss.svg", "accuracy.svg", "schedule.svg", *(f"examples/{label:02}.png" for label in range(10)),
}  # fmt: skip
TINY = ("--recipe", "demo", "--width", "4", "--device", "cpu")


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def weights(folder, name="last"):
    return torch.load(folder / f"models/{name}.pth", weights_only=True)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_whole_job(command, tmp_path):
    # In bf16 an epoch and the files, which are in fp32, can be an image apart.
    result = command(*TINY, "--epochs", 3, "--lr", 0.2, "--seed", 7, "--precision", "fp32")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    run = tmp_path / "cwd/runs/001-demo"
    assert files(run) == FILES

    config = json.loads((run / "config.json").read_text())
    asked = {"recipe": "demo", "data": "digits", "epochs": 3, "lr": 0.2, "width": 4, "seed": 7, "device": "cpu"}
    assert asked.items() <= config.items()
    assert config["images"] == {"train": 1438, "valid": 359}
    assert re.fullmatch("[0-9a-f]{64}", config["fingerprint"])
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]

    rows = list(csv.DictReader((run / "history.csv").open()))
    columns = "epoch train_loss train_accuracy valid_loss valid_accuracy lr seconds"
    assert [" ".join(row) for row in rows] == [columns] * 3
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 <= float(row[f"{part}_accuracy"]) <= 1 for row in rows for part in ("train", "valid"))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert float(rows[-1]["lr"]) < 1e-3 < float(rows[0]["lr"]) <= 0.2

    test = json.loads((run / "lr_find.json").read_text())
    assert test["chosen"] == 0.2
    assert set(test["suggestions"]) == {"edge", "valley", "slide", "minimum", "steep"}
    points = list(csv.DictReader((run / "lr_find.csv").open()))
    assert len(points) > 20
    assert all(float(p["lr"]) > 0 and np.isfinite(float(p["loss"])) for p in points)
    for picture in run.glob("*.png"):
        assert np.asarray(Image.open(picture).convert("RGB")).std() > 10, f"{picture} shows something"

    out = result.stdout
    assert "\r" not in out, "no progress bars in a file"
    assert "█" not in out
    assert len([line for line in out.splitlines() if re.match(r"epoch +\d+/3 .* train loss", line)]) == 3
    for expected in (
        "Conv2d",
        "Total params: 26,350",
        "range test   at most 100 batches",
        "measuring    359 images, in fp32",
        "pictures     10 of them",
        "predict.py runs/001-demo IMAGE",
        "--seed 8",
    ):
        assert expected in out
    last, best = (100 * max(float(r["valid_accuracy"]) for r in part) for part in (rows[-1:], rows))
    assert f"last epoch   {last:.2f}%" in out
    number = max(rows, key=lambda row: float(row["valid_accuracy"]))["epoch"]
    chosen = f" in epoch {number}"
    if best > last:
        chosen += ", chosen on the validation set, so a little too good to quote"
    assert f"best epoch   {best:.2f}%{', the last one' if number == '3' else chosen}\n" in out

    result = json.loads((run / "result.json").read_text())
    assert config.items() <= result.items()
    assert [{name: str(value) for name, value in row.items()} for row in result["history"]] == rows
    assert result["suggestions"] == test["suggestions"]
    accuracies = [result[f"{which}_accuracy"] for which in ("last", "best", "tta")]
    assert accuracies[:2] == pytest.approx([last / 100, best / 100])
    assert accuracies[2] is None
    assert sum(row["seconds"] for row in result["history"]) < result["seconds"]

    assert command(*TINY, "--epochs", 1, "--no-lr-find", "--no-pictures").returncode == 0
    assert files(tmp_path / "cwd/runs/002-demo") == {
        name for name in FILES if "lr_find" not in name and not name.endswith((".png", ".svg", ".md"))
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_one_seed_one_result_with_and_without_the_range_test(tmp_path, capsys, workers):
    common = {"recipe": "demo", "width": 4, "epochs": 2, "device": "cpu", "workers": workers, "no_pictures": True}
    main(**common, seed=1, out=str(tmp_path / "a"))
    main(**common, seed=1, out=str(tmp_path / "b"), no_lr_find=True, deterministic=True)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert same_weights(first, second)
    main(**{**common, "workers": 2 - workers, "epochs": 1}, seed=1, out=str(tmp_path / "c"), no_lr_find=True)
    main(**{**common, "epochs": 1}, seed=1, out=str(tmp_path / "d"), no_lr_find=True)
    assert same_weights(weights(tmp_path / "c"), weights(tmp_path / "d")), "whatever the number of workers"
    main(**{**common, "epochs": 1}, seed=2, out=str(tmp_path / "e"), no_lr_find=True)
    assert not same_weights(weights(tmp_path / "d"), weights(tmp_path / "e"))


def test_deterministic_is_for_cuda(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        for name, on in (("cpu", False), ("cuda", True)):  # a CPU is so anyway, and would only be slower
            set_deterministic(True, torch.device(name))
            assert torch.are_deterministic_algorithms_enabled() is on
            assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is on
        with pytest.raises(InputError, match="--deterministic: torch has no deterministic max-pooling on mps"):
            set_deterministic(True, torch.device("mps"))
    finally:
        set_deterministic(False, torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_several_runs_are_those_of_their_seeds_and_a_table(tmp_path, capsys):
    common = {
        "recipe": "fast",
        "data": "digits",
        "bs": 64,
        "width": 4,
        "epochs": 1,
        "device": "cpu",
        "no_lr_find": True,
        "no_pictures": True,
    }
    before = set(multiprocessing.active_children())
    main(**common, tta=True, seed=4, runs=2, workers=1, out=str(tmp_path / "both"))
    assert not set(multiprocessing.active_children()) - before, "each run's loaders go with it"
    out = capsys.readouterr().out
    main(**common, seed=5, out=str(tmp_path / "alone"))
    assert same_weights(weights(tmp_path / "both/seed-5"), weights(tmp_path / "alone"))
    results = [json.loads((tmp_path / f"both/seed-{seed}/result.json").read_text()) for seed in (4, 5)]
    lines = [line.split() for line in out.split("accuracy on the validation set, in %")[1].splitlines() if line]
    assert lines[0] == ["seed", "last", "epoch", "with", "TTA"]
    for column, key in ((1, "last_accuracy"), (2, "tta_accuracy")):
        a, b = (100 * result[key] for result in results)
        expected = [a, b, (a + b) / 2, abs(a - b) / 2**0.5, min(a, b), max(a, b)]
        assert [float(line[column]) for line in lines[1:]] == pytest.approx(expected, abs=0.0051)
    assert [line[0] for line in lines[1:]] == ["4", "5", "mean", "std", "min", "max"]


def test_best_weights_are_those_of_the_best_epoch(tmp_path, capsys):
    main(recipe="demo", width=4, epochs=4, lr="0.2", device="cpu", out=str(tmp_path / "run"), no_lr_find=True)
    rows = list(csv.DictReader((tmp_path / "run/history.csv").open()))
    dls = get_dls("digits", bs=64, flip=0, device="cpu")
    learn = get_learner(dls, get_recipe("demo", width=4), path=tmp_path / "run")
    learn.remove_cb(learn.progress)
    accuracies = [float(row["valid_accuracy"]) for row in rows]
    for name, expected in (("best", max(accuracies)), ("last", accuracies[-1])):
        learn.load(name, with_opt=False)
        assert learn.validate()[1] == pytest.approx(expected, abs=1e-6)


def test_best_weights_stay_when_later_epochs_are_worse(tmp_path):
    class Wreck(Callback):
        def before_validate(self):
            if self.epoch == 2:
                torch.nn.init.zeros_(self.model.head.weight)

    dls = get_dls("digits", bs=64, flip=0, device="cpu")
    learn, log = get_learner(dls, get_recipe("demo", width=4), path=tmp_path), RunLog()
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 0.1, cbs=[log, Wreck()])
        accuracies = [row["valid_accuracy"] for row in log.history]
        assert max(accuracies) > accuracies[-1]
        assert log.best_epoch == accuracies.index(max(accuracies)) + 1
        learn.load("best", with_opt=False)
        assert learn.validate()[1] == pytest.approx(max(accuracies), abs=1e-6)


def test_compile_changes_nothing_but_the_speed(tmp_path, capsys, monkeypatch):
    common = {"recipe": "demo", "width": 2, "epochs": 1, "device": "cpu", "no_lr_find": True, "no_pictures": True}
    main(**common, out=str(tmp_path / "a"))
    # With the default back end torch would need a C++ compiler, and a minute. This one traces the network too.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    main(**common, out=str(tmp_path / "b"), compile=True)
    assert frames["ok"] - before == 2, "the check, and the network in training"
    assert frames["ok"] == frames["total"]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert "--compile" in capsys.readouterr().out.splitlines()[-1]
    assert load_learner(tmp_path / "b/model.pkl").predict(np.zeros((32, 32), np.uint8))[0] in "0123456789"


def test_tta_averages_over_mirror_images_and_stands_beside_the_plain_figure(tmp_path, capsys):
    common = {"recipe": "demo", "width": 4, "epochs": 2, "device": "cpu", "no_lr_find": True, "no_pictures": True}
    with pytest.raises(InputError, match="--tta: flip is 0"):
        main(**common, tta=True, out=str(tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()

    common |= {"recipe": "fast", "data": "digits", "bs": 64, "lr": "0.1"}
    main(**common, tta=True, out=str(tmp_path / "fast"))
    out = capsys.readouterr().out
    dls = get_dls("digits", bs=64, device="cpu")
    learn = get_learner(dls, get_recipe("fast", width=4), path=tmp_path / "fast")
    learn.load("last", with_opt=False)
    x, y = (torch.cat(part) for part in zip(*dls.valid, strict=True))
    x, y, model = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor), learn.model.eval()
    with torch.no_grad():
        logits, averaged = model(x), model(x) + model(x.flip(3))
    for line, scores in (("last epoch   ", logits), ("with TTA     ", averaged)):
        assert f"{line}{(scores.argmax(1) == y).float().mean():.2%}" in out
    assert (logits.argmax(1) != averaged.argmax(1)).any()


def test_lr_auto_trains_at_the_suggestion(tmp_path, capsys):
    main(recipe="demo", width=4, epochs=1, lr="auto", device="cpu", out=str(tmp_path / "run"))
    test = json.loads((tmp_path / "run/lr_find.json").read_text())
    assert test["chosen"] == test["suggestions"][test["default"]]
    assert f"peak learning rate {test['chosen']:.3g}" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["lr"] == "auto"


def test_lr_find_only_stops_there(tmp_path, capsys):
    main(recipe="demo", width=4, device="cpu", out=str(tmp_path / "run"), lr_find_only=True)
    assert files(tmp_path / "run") == {"config.json", "augmentations.png", "lr_find.png", "lr_find.csv", "lr_find.json"}
    command = "\ntrain        python train_fastai.py --recipe demo --lr LR --width 4 --device cpu"
    assert f"{command}\n" in capsys.readouterr().out
    main(resume=str(tmp_path / "run"))
    assert re.search(rf"{command}( --precision \w+)?\n", capsys.readouterr().out), "which is no resume"


# Bad input


def line_of(result):
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_wrong_values_found_later_are_one_line_too_and_leave_nothing(command, tmp_path, image_folder):
    root = image_folder()
    (root / "train/cat/000.png").write_text("words")
    assert "train/cat/000.png: not a readable image" in line_of(command("--data", root))
    assert "no such device here; this machine has cpu" in line_of(command(*TINY, "--device", "gpu"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "the folder is not empty" in line_of(command(*TINY, "--out", tmp_path / "full"))
    assert files(tmp_path / "full") == {"notes.txt"}
    assert files(tmp_path / "cwd") == set()


def test_compile_without_a_compiler_is_one_line(command, tmp_path):
    result = command(*TINY, "--compile", CXX="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    assert "--compile: torch.compile does not work here; leave it out" in line_of(result)
    assert files(tmp_path / "cwd") == set()


def test_a_loss_that_is_not_finite_says_why(command, tmp_path):
    result = command(*TINY, "--epochs", 3, "--lr", 1000, "--no-lr-find", "--norm", "layer")
    assert "a peak learning rate of 1e+03 is too high here, lower --lr" in line_of(result)
    assert "history.csv" in files(tmp_path / "cwd/runs/001-demo")


def test_a_bug_keeps_its_traceback(tmp_path):
    script = tmp_path / "buggy.py"
    script.write_text("from errors import parse\n\ndef main():\n    1 / 0\n\nparse(main)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr


def test_a_closed_stderr_changes_no_exit_code(tmp_path):
    script = tmp_path / "closed.py"
    script.write_text(
        "import warnings\nfrom errors import InputError, lasting_streams, parse\n\ndef main():\n"
        "    with lasting_streams():\n        warnings.warn('some')\n    raise InputError('bad')\n\nparse(main)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in ([], ["--nope"]):
        assert subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", sys.executable, script, *words], env=env).returncode == 2


def test_ctrl_c_while_it_imports_is_one_line(tmp_path):
    words = [sys.executable, "-v", str(ROOT / "train_fastai.py"), "--recipe", "demo"]  # -v: a line an import
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    for line in process.stderr:
        if line.startswith("import 'torch"):
            break
    process.send_signal(signal.SIGINT)
    errors = process.stderr.read()
    assert process.wait(60) == 130
    assert "train_fastai.py: error: stopped by Ctrl-C\n" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["train_fastai", "predict", "report", "export", "app"])
def test_help_says_what_each_option_is(name):
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    entries = re.split(r"\n  (?=[-a-z])", text.partition("positional arguments:")[2] or text.partition("options:")[2])
    said = {e.split()[0]: e.partition("  ")[2].split("(default")[0].strip() for e in entries if e.strip()}
    assert len(said) >= 4
    assert [option for option, words in said.items() if not words] == []


def test_help_explains_every_option_at_once(command):
    result = command("--help", PYTHONPROFILEIMPORTTIME="1")
    assert result.returncode == 0
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "fastcore.script" in imported
    assert not {"torch", "fastai", "numpy"} & imported, "nothing that takes seconds"
    options = re.findall(r"^  (--[a-z-]+)", result.stdout, re.M)
    assert {"--data", "--recipe", "--epochs", "--lr", "--bs", "--width", "--norm", "--seed", "--workers", "--valid",
            "--device", "--out", "--compile", "--tta", "--list-recipes", "--lr-find-only", "--no-lr-find",
            "--runs", "--resume", "--max-minutes", "--no-pictures", "--deterministic"} <= set(options)  # fmt: skip
