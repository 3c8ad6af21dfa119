"""The runner of many trainings: in order, never twice, over stops and failures."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import campaign

from errors import InputError

OPTIONS = "--data digits --bs 128 --width 2 --epochs 2 --device cpu --no-lr-find --no-pictures"


@pytest.fixture
def start(tmp_path):
    """A function that starts the command in the test's folder."""

    def start(*words):
        command = [sys.executable, str(ROOT / "benchmarks/campaign.py"), *words, "--options", OPTIONS]
        command += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        (tmp_path / "results").mkdir(exist_ok=True)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_stopped_it_goes_on_and_trains_nothing_twice(start, tmp_path):
    process = start("demo", "demo --lr 0.05")
    for line in process.stdout:
        if "demo --lr 0.05" in line and "started" in line:
            break
    children = [pid for pid in os.listdir("/proc") if pid.isdigit() and is_child(pid, process.pid)]
    assert [os.getpriority(os.PRIO_PROCESS, int(pid)) for pid in children] == [19]
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "campaign.py: stopped, with a checkpoint of each run; the same command resumes them\n"
    assert not is_child(children[0], process.pid), "no run goes on behind it"
    (kept,) = (tmp_path / "results").iterdir()
    (done,) = (tmp_path / "runs").glob("*/result.json")
    before = done.stat().st_mtime_ns
    kept.unlink()  # as if the campaign had been stopped between the end of that run and this

    process = start("demo", "demo --lr 0.05")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "2 runs, 1 of them have finished" in out
    assert "seed 0: epoch 2/2, " in out
    assert "2 of 2 runs have finished" in out
    results = [json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()]
    assert sorted((r["lr"], r["seed"]) for r in results) == [(0.05, 0), (0.1, 0)]
    assert done.stat().st_mtime_ns == before
    out, _ = start("demo", "demo --lr 0.05").communicate(timeout=60)
    assert "2 runs, 2 of them have finished" in out
    assert "started" not in out


def test_all_are_trained_with_one_seed_before_the_next(tmp_path):
    runs = campaign.trainings(["demo", "demo --lr 0.05"], "--width 2", range(3, 5), tmp_path)
    assert [str(run) for run in runs] == [
        f"demo{lr} --width 2, seed {seed}" for seed in (3, 4) for lr in ("", " --lr 0.05")
    ]


def is_child(pid, parent):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return int(stat.read().rpartition(")")[2].split()[1]) == parent
    except OSError:
        return False


def test_two_at_a_time_and_one_that_fails(start, tmp_path):
    process = start("demo", "demo --norm layer --lr 1000", "demo --wd 2", "--jobs", "2")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "wd is 2.0: it must be from 0 and at most 1" in out
    assert "too high here, lower --lr" in out
    assert "1 of 3 runs have finished" in out
    assert len(list((tmp_path / "results").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"runs": ["demon"]}, "'demon': it must start with a recipe, one of fast, "),
        ({"runs": ["demo", "demo"]}, "two of the trainings are the same"),
        ({"runs": ["demo"], "seeds": 0}, "--seeds is 0: it must be at least 1"),
        ({"runs": ["demo"], "results": "/nowhere"}, "--results /nowhere: there is no such folder"),
    ],
)
def test_wrong_arguments_start_nothing(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=expected):
        campaign.main(**arguments)
    assert not (tmp_path / "runs").exists()


def test_the_time_left_counts_all_runs(tmp_path, capsys):
    runs = campaign.trainings(["demo"], "--epochs 4", range(2), tmp_path)
    progress = campaign.Progress(runs, jobs=1)
    runs[0].folder.mkdir()
    (runs[0].folder / "history.csv").write_text("epoch,valid_accuracy,seconds\n1,0.5,600\n")
    progress.look(runs[0])
    assert capsys.readouterr().out.endswith("epoch 1/4, 50.00 %; left: 30 min, with all others 1 h 10 min\n")
