"""Whatever the machine does to a run: nothing is lost, nothing stays behind, and one line says how to resume."""

import errno
import json
import multiprocessing
import os
import signal
import stat

import pytest
import torch
from conftest import StopAt, main, outcome, same
from fastai.callback.core import Callback
from fastai.learner import load_learner

import train_fastai
import workers
from errors import InputError, Lasting, Stopped, run_command
from files import complete, locked
from interrupts import Interrupted, stops_raised, stops_taken
from training import checkpoint
from training.description import keep_threads
from training.faults import faults_explained, stops_heard
from training.lr_finder import METHODS, RangeTest
from training.run import check_out

TINY = {"data": "digits", "bs": 256, "width": 2, "epochs": 2, "lr": "0.05", "device": "cpu", "no_lr_find": True}
TINY["no_pictures"] = True


@pytest.fixture
def run(tmp_path, capsys):
    """A run that has finished."""
    main(**TINY, out=str(tmp_path / "run"))
    return tmp_path / "run"


def litter(folder):
    """What kills leave behind, here and there."""
    (folder / "models/tmpab_c1234").mkdir(parents=True, exist_ok=True)
    for name in (".config.123.json", ".README.7.md", "models/.best.9.pth", "models/tmpab_c1234/_tmp.pth"):
        (folder / name).write_text("half")


def test_what_a_killed_process_left_is_no_content(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.123.json").write_text("{")
    check_out(str(tmp_path))
    (tmp_path / ".mine").touch()
    with pytest.raises(InputError, match="the folder is not empty"):
        check_out(str(tmp_path))


def test_a_run_starts_in_what_a_killed_one_left_and_sweeps_it(tmp_path, capsys, monkeypatch):
    """Without hard links, too, which FAT and many network drives lack."""
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    monkeypatch.setattr(os, "link", lambda *_: 1 / 0)
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").touch()
    (run / ".config.123.json").write_text("{")
    with pytest.raises(Stopped):
        main(**TINY, out=str(run), cbs=StopAt(1, 2))
    assert (run / "checkpoint-before.pth").exists()
    litter(run)
    main(resume=str(run))
    left = {path.name for path in run.iterdir()}
    assert left == {".lock", "config.json", "history.csv", "result.json", "models", "model.pkl", "model.safetensors"}
    assert {path.name for path in (run / "models").iterdir()} == {"best.pth", "last.pth"}


def test_the_checkpoints_of_a_run_that_has_ended_are_swept(run):
    litter(run)
    (run / "checkpoint.pth").write_text("a kill between the result and this")
    main(resume="auto", out=str(run))
    assert not [path for path in run.rglob("*") if path.name.startswith((".c", ".R", ".b", "tmp", "checkpoint"))]


def test_two_that_start_at_once_are_one_run(tmp_path, capsys, monkeypatch):
    run, new_learner = tmp_path / "run", train_fastai.new_learner
    options = TINY | {"resume": "auto", "out": str(run)}

    def overtaken(*args):
        monkeypatch.setattr(train_fastai, "new_learner", new_learner)
        main(**options)
        overtaken.first = outcome(run)
        (run / "history.csv").chmod(0o444)
        return new_learner(*args)

    monkeypatch.setattr(train_fastai, "new_learner", overtaken)
    main(**options)
    assert capsys.readouterr().out.count("finished ") == 1
    assert same(outcome(run), overtaken.first)
    assert stat.S_IMODE((run / "history.csv").stat().st_mode) == 0o444, "written anew"


def test_what_replaces_a_file_is_on_the_disk_before_that_one_goes(tmp_path, capsys, monkeypatch):
    """Power may go at any call: no file takes its name, and none is deleted, before what it rests on is synced."""
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    run, synced, calls = tmp_path / "run", set(), []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def recorded_fsync(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.add(os.fstat(descriptor).st_ino)
        calls.append(("sync", path))

    def recorded_replace(old, new):
        assert os.stat(old).st_ino in synced, f"{new} has not been synced"
        replace(old, new)
        calls.append(("replace", str(new)))

    def recorded_unlink(path, **kwargs):
        if str(path).endswith("checkpoint.pth") and os.path.exists(path):
            last = max(i for i, call in enumerate(calls) if call == ("replace", str(run / "result.json")))
            assert ("sync", str(run)) in calls[last:], "the name of the result has not been synced"
            calls.append(("unlink", str(path)))
        unlink(path, **kwargs)

    for name, func in (("fsync", recorded_fsync), ("replace", recorded_replace), ("unlink", recorded_unlink)):
        monkeypatch.setattr(os, name, func)
    main(**TINY, out=str(run))
    assert ("replace", str(run / "checkpoint-before.pth")) in calls
    assert ("unlink", str(run / "checkpoint.pth")) in calls
    for i, (what, path) in enumerate(calls):
        if what == "replace" and path.endswith(".pth") and "models" in path:
            assert ("sync", os.path.dirname(path)) in calls[i : i + 2]


def test_checkpoints_come_every_ten_seconds_at_stops_and_at_the_end(tmp_path, capsys, monkeypatch):
    written = []

    class Clock(Callback):
        order = 89

        def after_epoch(self):
            self.checkpoint.written -= self.epoch == 1 and 11  # as if so many seconds had passed

    monkeypatch.setattr(checkpoint, "complete", lambda path: written.append((path.name, log())) or complete(path))
    monkeypatch.setattr(checkpoint.Checkpoint, "after_fit", lambda self: None)

    def log():
        return (tmp_path / "run/history.csv").read_text().count("\n") - 1

    main(**TINY | {"epochs": 4}, out=str(tmp_path / "run"), cbs=Clock())
    assert written == [("checkpoint.pth", 2), ("checkpoint.pth", 4)]


def test_damaged_files_are_one_line(run):
    test = RangeTest([1.0], [2.0], [3.0], dict.fromkeys(METHODS, 0.1))
    test.save(run, 0.1)
    assert RangeTest.load(run) == test
    for name in ("lr_find.csv", "lr_find.json"):
        test.save(run, 0.1)
        os.truncate(run / name, 0)
        with pytest.raises(InputError, match=rf"{name}: damaged; delete it, and the range test is made once more"):
            RangeTest.load(run)
    os.truncate(run / "result.json", 0)
    with pytest.raises(InputError, match=r"result\.json: not that of a run of this version"):
        main(resume="auto", out=str(run))


def test_the_number_of_threads_stays(capsys):
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    try:
        for before, after in ((2, 1), (1, 2)):
            torch.set_num_threads(before)
            if after <= len(os.sched_getaffinity(0)):
                keep_threads({"threads": after, "processes": 1}, cpu)
                assert torch.get_num_threads() == after
        keep_threads({"threads": 99_999, "processes": 1}, cpu)
        assert "threads      2, not 99999 as at the start: the end will differ a little" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


def test_a_picture_that_fails_comes_last_and_can_be_drawn_later(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a b/loss.png")

    run, drawn = tmp_path / "a b", []
    monkeypatch.setattr(train_fastai, "write_report", full)
    monkeypatch.setattr(train_fastai, "save_augmentations", lambda *_: None)
    monkeypatch.setattr(train_fastai, "draw_again", lambda run, device, pictures: drawn.append(run.folder))
    make_it = f"make the rest with: python report.py '{run}'"
    expected = f"a b/loss.png: No space left .*; the weights and the result are there, {make_it}"
    options = TINY | {"no_pictures": False, "out": str(run)}
    with pytest.raises(InputError, match=expected):
        main(**options)
    assert "last epoch   " in capsys.readouterr().out
    assert {"result.json", "model.pkl", "model.safetensors"} < {path.name for path in run.iterdir()}
    main(**options, resume="auto")
    assert drawn == [run]


def test_a_model_pkl_that_fails_does_not_take_the_result_with_it(tmp_path, capsys):
    class InTheWay(Callback):
        def after_fit(self):
            (self.path / "model.pkl").mkdir(exist_ok=True)

    run = tmp_path / "run"
    with pytest.raises(
        InputError, match=r"run/model\.pkl: Is a directory; the weights and the result are there, .* with:"
    ):
        main(**TINY, out=str(run), cbs=InTheWay())
    assert json.loads((run / "result.json").read_text())["epochs"] == 2
    assert (run / "model.safetensors").exists()
    assert f"run folder   {run}: history.csv, result.json, model.safetensors from" in capsys.readouterr().out
    (run / "model.pkl").rmdir()
    main(resume=str(run))
    learn = load_learner(run / "model.pkl")
    assert torch.equal(learn.model.head.weight, torch.load(run / "models/last.pth", weights_only=True)["head.weight"])
    assert not (run / "README.md").exists(), "no pictures were wanted"


@pytest.mark.parametrize(("code", "remedy"), [
    (errno.EIO, ""), (errno.ENOSPC, "make room, then "), (errno.EROFS, "see to it that it can be written, then "),
    (errno.EACCES, "see to it that it can be written, then "), (errno.ESTALE, ""),
])  # fmt: skip
def test_a_fault_of_the_disk_is_one_line(tmp_path, capsys, monkeypatch, code, remedy):
    replace, run = os.replace, tmp_path / "it's"

    def fail(old, new):
        if os.path.basename(new) == fail.name:
            raise OSError(code, os.strerror(code), str(old), None, str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", fail)
    fail.name = "config.json"
    with pytest.raises(InputError, match=rf"it's/config\.json: {os.strerror(code)}; {remedy}start again$"):
        main(**TINY, out=str(run))
    if code not in (errno.EIO, errno.EROFS):
        return  # two of them are enough
    fail.name = "history.csv"
    again = r"resume with: python train_fastai\.py --resume '.*it'\"'\"'s'$"
    with pytest.raises(InputError, match=rf"it's/history\.csv: {os.strerror(code)}; .*{again}"):
        main(**TINY, out=str(run))
    fail.name = None
    assert main(resume=str(run))["epochs"] == 2


def test_another_process_that_is_gone_is_told_where_cleaning_up_fails_too(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="another process of this training is gone"), faults_explained(tmp_path, 8):
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
        finally:
            raise RuntimeError("Missing key(s) in state_dict")
    with pytest.raises(RuntimeError, match="a bug"), faults_explained(tmp_path, 8):
        raise RuntimeError("a bug")


def test_other_commands_say_it_in_one_line_too(capsys):
    def full():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "model.onnx")

    with pytest.raises(SystemExit) as e:
        run_command(full)
    assert e.value.code == 2
    assert capsys.readouterr().err.endswith("error: model.onnx: Read-only file system\n")
    with pytest.raises(OSError, match="of a library"):
        run_command(lambda: (_ for _ in ()).throw(OSError("of a library, a bug")))


def test_the_lock_is_neither_followed_nor_emptied_nor_deleted(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / ".lock").symlink_to("other")
    with pytest.raises(InputError, match=r"\.lock: this is a link"), locked(tmp_path):
        pass
    assert (tmp_path / "other").read_text() == "mine"
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_text("words")
    number = (tmp_path / ".lock").stat().st_ino
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == "words"
    assert (tmp_path / ".lock").stat().st_ino == number


def test_where_there_are_no_locks_a_line_says_so(tmp_path, capsys, monkeypatch):
    def absent(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.lockf", absent)
    with locked(tmp_path):
        pass
    assert "no locks there (Function not implemented); let no other process train in it" in capsys.readouterr().err


# Signals


class Kill(Callback):
    """Sends this process a signal at an event of the last epoch."""

    def __init__(self, number, event):
        setattr(self, event, lambda: self.epoch == self.n_epoch - 1 and os.kill(os.getpid(), number))


def test_a_signal_outside_the_fit_is_one_line_and_a_resume_goes_on_behind_it(tmp_path, capsys, monkeypatch):
    main(**TINY, out=str(tmp_path / "whole"))
    run, evaluate = tmp_path / "run", train_fastai.evaluate
    with pytest.raises(Stopped, match=r"stopped by SIGHUP after the last epoch; resume with: .* --resume ") as e:
        main(**TINY, out=str(run), cbs=Kill(signal.SIGHUP, "after_validate"))
    assert e.value.code == 129
    monkeypatch.setattr(train_fastai, "evaluate", lambda learn: os.kill(os.getpid(), signal.SIGTERM))
    with stops_raised(), pytest.raises(Stopped, match=r"stopped by SIGTERM; resume with: .* --resume ") as e:
        main(resume=str(run))
    assert e.value.code == 143
    monkeypatch.setattr(train_fastai, "evaluate", evaluate)
    main(resume=str(run))
    assert same(outcome(run), outcome(tmp_path / "whole"))


def test_a_second_ctrl_c_ends_at_once():
    before, asked = signal.signal(signal.SIGINT, signal.default_int_handler), []
    try:
        with stops_heard(asked.append):
            os.kill(os.getpid(), signal.SIGINT)
            assert asked == [130]
            with pytest.raises(Interrupted):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_that_was_asked_for_by_an_option_is_no_failure(capsys):
    def stop():
        raise Stopped("stopped after --max-minutes", 0)

    with pytest.raises(SystemExit) as e:
        run_command(stop)
    assert e.value.code == 0


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with stops_raised():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_handlers_are_put_back_is_heard(monkeypatch):
    heard, put = [], signal.signal

    def put_back(number, handler):
        put(number, handler)
        if number == signal.SIGINT:  # the first of them
            os.kill(os.getpid(), signal.SIGTERM)

    before = put(signal.SIGINT, signal.default_int_handler)
    try:
        with stops_taken(heard.append):
            monkeypatch.setattr(signal, "signal", put_back)
        assert heard == [signal.SIGTERM]
    finally:
        put(signal.SIGINT, before)


def test_a_training_outlives_whoever_reads_it():
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "w", buffering=1) as stream:
        lasting = Lasting(stream)
        for _ in range(3):
            print("a line", file=lasting, flush=True)
        assert not lasting.isatty()


def test_a_worker_does_not_outlive_the_process_that_started_it():
    """As torch's own would, where that one has been killed before the worker looks who it is."""
    worker = multiprocessing.get_context("fork").Process(target=workers.begin_worker, args=(1, 0))
    waiting = multiprocessing.get_context("fork").Process(target=begin_and_wait)
    for process in (worker, waiting):
        process.start()
        process.join(20)
    assert waiting.exitcode == 1


def begin_and_wait():
    workers.begin_worker(1, 0)  # 1 has not started it
    signal.pause()
