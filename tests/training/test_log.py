"""Logging to TensorBoard and to Weights & Biases, through fastai's callbacks."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import options
from data import get_dls
from errors import InputError, Stopped
from recipes import get_recipe
from train_fastai import get_learner
from training.callbacks import BatchLog

SMALL = {"recipe": "demo", "bs": 128, "width": 2, "epochs": 2, "device": "cpu", "no_lr_find": True, "no_pictures": True}


def test_tensorboard_gets_every_batch_also_of_a_training_that_was_stopped(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        main(**SMALL, log="tensorboard", max_minutes=1e-9, out=str(run))
    main(resume=str(run), max_minutes=9.0)
    logged = {"train_loss": {}, "lr": {}, "valid_loss": {}, "accuracy": {}}
    for path in (run / "tensorboard").iterdir():
        events = EventAccumulator(str(path)).Reload()
        for tag in set(events.Tags()["scalars"]) & set(logged):
            logged[tag] |= {event.step: event.value for event in events.Scalars(tag)}
    assert sorted(logged["train_loss"]) == sorted(logged["lr"]) == list(range(1, 23))
    history = json.loads((run / "result.json").read_text())["history"]
    for tag, name, steps in (("accuracy", "valid_accuracy", (11, 22)), ("valid_loss", "valid_loss", (11, 22))):
        assert logged[tag] == {
            step: pytest.approx(row[name], abs=1e-5) for step, row in zip(steps, history, strict=True)
        }
    assert logged["lr"][22] == pytest.approx(history[-1]["lr"], rel=1e-3)


def test_in_a_notebook_it_is_one_more_callback(tmp_path):
    learner = get_learner(get_dls("digits", bs=64, device="cpu"), get_recipe("demo", width=2))
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 0.1, cbs=BatchLog("tensorboard", tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == list(range(1, 23))
    assert events.Scalars("accuracy")[0].value == pytest.approx(learner.recorder.values[-1][2])


def test_wandb_without_a_network_and_without_a_key(tmp_path):
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in SMALL.items()]
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_fastai.py"), *words, "--log", "wandb", "--out"]
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    env.pop("WANDB_API_KEY", None)
    result = subprocess.run([*command, tmp_path / "run"], env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    (log,) = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert b"train_loss" in log.read_bytes()
    del env["WANDB_MODE"]
    result = subprocess.run([*command, tmp_path / "b"], env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 2
    assert "--log wandb: " in result.stderr
    assert result.stderr.endswith("log in with wandb login, or set WANDB_MODE=offline\n")


def test_a_resumed_run_goes_on_with_its_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step, resume in ((1, False), (2, True), (1, False)):
        log = BatchLog("wandb", tmp_path, resume=resume)
        log.write({"train_loss": 0.5}, step)
        log.close()
        time.sleep(1)  # folders are named by the second
    ids = [path.name.rpartition("-")[2] for path in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert len(ids) == 3
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"--log {name}: the package is not installed; pip install {name}"):
        main(**SMALL, log=name, out=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
