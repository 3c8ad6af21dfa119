"""Small trainings that are killed, or have a call fail, at each of their calls to the file system, and then resumed.

    python tests/sweep.py                    all of it: an hour on a core
    python tests/sweep.py 20                 at every twentieth call
    python tests/sweep.py 20 plain power     only that mode, or these kinds of trial in it

A mode is a kind of training: plain, with pictures, bf16, worker processes, two ranks. A call is one to open, make,
rename, list, delete or sync something in the run's folder. What counts: a resume with the same command ends with the
weights, history and files of an undisturbed run, no process is left, and nobody sees a traceback.
"""

import errno
import os
import random
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's other threads
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

# ruff: noqa: E402
import numpy as np
import torch._dynamo  # noqa: F401  torch's optimisers import it, which takes half of a small training's time
from conftest import outcome, same
from PIL import Image

import errors
import train_fastai
from errors import run_command
from options import Options
from training import checkpoint

KILLS = ("kill", "torn", "again", "power")
FAULTS = ("EIO", "ENOSPC", "EROFS", "EACCES", "ESTALE")
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.listdir", "os.scandir"}
# Options of each mode, its kinds of trial, and at which calls: the others write the same files as the plain one.
MODES = {
    "plain": ({}, (*KILLS, *FAULTS), 1),
    "pictures": ({"no_pictures": False}, ("kill", "EIO"), 2),
    "bf16": ({"precision": "bf16"}, ("kill", "again"), 3),
    "workers": ({"workers": 2}, ("kill", "again"), 3),
    "ranks": ({}, ("kill", "kill-other"), 2),
}
LONGEST = 60  # seconds that a process may take to end


class Shim:
    """Counts this process's calls to the file system under `root`; at call number `at` it does `what`.

    what: "kill"; "kill-other", the other rank; "torn", a kill in the midst of a write: of the file opened last a part
    is there; "power", which also loses what has not been synced, content (kept: names) or names, by turns; the name of
    an error.
    """

    def __init__(self, root: Path, at: int = 0, what: str = ""):
        self.root, self.at, self.what, self.count, self.synced = str(root), at, what, 0, set()
        self.written = None  # the file that was last opened to be written to, and its size then
        self.kept = root.with_name("kept")  # what a power cut leaves of the names: links, made when a folder is synced
        self.fsync, self.busy = os.fsync, False
        sys.addaudithook(self.hear)
        os.fsync = self.sync

    def hear(self, event: str, args: tuple) -> None:
        if event in CALLS and not self.busy and isinstance(args[0], str | Path) and str(args[0]).startswith(self.root):
            self.call(str(args[0]))
            if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
                self.written = args[0], os.path.getsize(args[0]) if os.path.exists(args[0]) else 0

    def sync(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(self.root):
            self.call(path)
        self.fsync(descriptor)
        self.synced.add(os.fstat(descriptor).st_ino)
        if os.path.isdir(path) and self.what == "power" and path.startswith(self.root):
            self.busy = True
            kept = self.kept / os.path.relpath(path, self.root)
            kept.mkdir(parents=True, exist_ok=True)
            for name in os.listdir(kept):
                if not (kept / name).is_dir():
                    (kept / name).unlink()
            for name in os.listdir(path):
                if os.path.isfile(os.path.join(path, name)):
                    os.link(os.path.join(path, name), kept / name)
            self.busy = False

    def call(self, path: str) -> None:
        self.count += 1
        if self.count != self.at:
            return
        self.busy = True
        if self.what == "power":
            self.lose()
        if self.what == "torn":
            self.tear()
        if self.what == "kill-other":
            os.kill(int(os.environ["OTHER"]), signal.SIGKILL)
            self.busy = False
            return
        if self.what in KILLS:
            os.kill(os.getpid(), signal.SIGKILL)
        self.busy = False
        code = getattr(errno, self.what)
        raise OSError(code, os.strerror(code), path)

    def tear(self) -> None:
        path, before = self.written or ("", 0)
        if os.path.isfile(path) and os.path.getsize(path) > before:  # else it has another name, and is complete
            os.truncate(path, random.Random(self.at).randrange(before, os.path.getsize(path)))

    def lose(self) -> None:
        if self.at % 2 and self.kept.exists():
            shutil.rmtree(self.root)
            self.kept.rename(self.root)
        for path in Path(self.root).rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, 0)


def started(func, *args, env: dict | None = None) -> tuple[int, int]:
    """A process of its own for `func(*args)`: its number, and where its standard error can be read."""
    end, start = os.pipe()
    if pid := os.fork():
        os.close(start)
        return pid, end
    os.setpgid(0, 0)
    signal.alarm(LONGEST)  # what hangs is killed by it
    os.environ.update(env or {})
    os.dup2(start, 2)
    os.close(start)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv[0] = "train_fastai.py"
    try:
        func(*args)
        os._exit(0)
    except SystemExit as e:
        os._exit(e.code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(*processes: tuple[int, int], launched: bool = False) -> list[tuple[int, str]]:
    """Exit code, or minus the number of a signal, and standard error of each. If one of those that a launcher has
    started together fails, the others are asked to end."""
    codes = {}
    while len(codes) < len(processes):
        pid, status = os.waitpid(-1, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        for other in {pid for pid, _ in processes} - codes.keys() if launched and codes[pid] else ():
            os.kill(other, signal.SIGTERM)
    return [(codes[pid], said(pid, end)) for pid, end in processes]


def said(pid: int, end: int) -> str:
    """All that has been written to standard error, once nobody has it open any more."""
    text, deadline = b"", time.monotonic() + LONGEST
    while select.select([end], [], [], max(0, deadline - time.monotonic()))[0]:
        if not (piece := os.read(end, 1 << 16)):
            os.close(end)
            return text.decode()
        text += piece
    os.killpg(pid, signal.SIGKILL)
    os.close(end)
    return text.decode() + f"\nTraceback of its own: a process was left for {LONGEST} seconds"


class Sweep:
    """The trials of one mode in `home`, each counted under its kind: how many, and what was not right."""

    def __init__(self, home: Path, mode: str = "plain"):
        self.home, self.mode, self.trials, self.findings = home, mode, Counter(), []
        self.ranks = 2 if mode == "ranks" else 1
        (home / "trial").mkdir(parents=True)
        checkpoint.EVERY = 0
        errors.sleep = lambda seconds: None  # in which a launcher ends the ranks that have nothing to say
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        rng = np.random.default_rng(0)
        for place in ("train/a", "train/b", "test/a", "test/b"):
            (home / "images" / place).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(home / f"images/{place}/{i}.png")
        self.options = {"data": str(home / "images"), "bs": 4, "width": 2, "epochs": 2, "lr": "0.05", "device": "cpu"}
        self.options |= {"resume": "auto", "no_pictures": True, "precision": "fp32", "valid": "test"} | MODES[mode][0]
        results = self.run("whole")
        assert not any(code for code, _ in results), results
        self.whole, self.files = outcome(home / "whole/run"), self.listed("whole")

    def train(self, folder: str, shim: tuple = ()) -> None:
        if shim:
            shim = Shim(self.home / folder / "run", *shim)
        try:
            run_command(train_fastai.main, Options(**self.options, out=str(self.home / folder / "run")))
        finally:
            if shim:
                (self.home / "count").write_text(str(shim.count))

    def start(self, folder: str, *shim) -> list[tuple[int, int]]:
        """The process of a training, or those of all its ranks. The shim is in rank 0, which alone writes."""
        if self.ranks == 1:
            return [started(self.train, folder, shim)]
        with socket.create_server(("localhost", 0)) as server:
            port = str(server.getsockname()[1])
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        other = started(self.train, folder, env=env | {"RANK": "1", "LOCAL_RANK": "1"})
        env |= {"RANK": "0", "LOCAL_RANK": "0", "OTHER": str(other[0])}
        return [started(self.train, folder, shim, env=env), other]

    def run(self, folder: str, *shim) -> list[tuple[int, str]]:
        return ended(*self.start(folder, *shim), launched=True)

    def listed(self, folder: str) -> list[str]:
        run = self.home / folder / "run"
        return sorted(str(path.relative_to(run)) for path in run.rglob("*"))

    @cached_property
    def calls(self) -> int:
        """How many an undisturbed run has."""
        (self.home / "counted").mkdir()  # as `trial` is there: to make it would be two more calls
        self.run("counted", 0, "")
        return int((self.home / "count").read_text())

    def check(self, kind: str, what: str, codes: tuple, results: list[tuple[int, str]]) -> None:
        """One trial is over: look at how its processes ended, resume with the same command, and compare."""
        self.trials[kind] += 1
        wrong = [f"{code}: {text.strip()[-300:]}" for code, text in results
                 if code not in codes or text.count(": error: ") > 1 or "Traceback" in text]  # fmt: skip
        resumed = self.run("trial")
        if any(code or "Traceback" in text for code, text in resumed):
            wrong.append(f"resumed: {resumed}"[:600])
        elif not same(outcome(self.home / "trial/run"), self.whole):
            wrong.append("another end")
        elif self.listed("trial") != self.files:
            wrong.append(f"files: {sorted(set(self.listed('trial')) ^ set(self.files))}")
        self.findings += [f"{self.mode}, {kind} {what}: {line}" for line in wrong]
        for folder in ("trial/run", "trial/kept"):
            shutil.rmtree(self.home / folder, ignore_errors=True)

    def at_every_call(self, what: str, step: int = 1, first: int = 1) -> None:
        for at in range(first, self.calls + 1, step):
            codes = (-9,) if what in KILLS else (0, 2)
            results = self.run("trial", at, "kill" if what == "again" else what)
            if what == "again":  # the resume does not get to its end, either; or it does, as it has fewer calls
                codes = (-9, 0)
                results += self.run("trial", random.Random(at).randrange(1, self.calls), "kill")
            elif self.ranks > 1:  # the launcher ends the rank that is left; it may just have reached its end
                codes = (-9, 0, 2, 143, -15)
            self.check(what, f"at call {at}", codes, results)

    def signals(self, times: int, rng: random.Random) -> None:
        begun = time.perf_counter()
        self.run("timed")
        longest = time.perf_counter() - begun
        for _ in range(times):
            numbers = rng.choices((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), k=rng.choice((1, 1, 2)))
            delay, processes = longest * rng.random(), self.start("trial")
            for number in numbers:
                time.sleep(delay)
                os.kill(processes[0][0], number)
                delay = 0.05 * rng.random()
            self.check("signals", f"{[n.name for n in numbers]}", (0, 129, 130, 143, -1, -2, -15), ended(*processes))

    def together(self, times: int) -> None:
        for trial in range(times):
            shutil.rmtree(self.home / "cache")
            running = [process for _ in range(2 + trial % 2) for process in self.start("trial")]
            self.check("together", f"{len(running)} processes", (0, 2), ended(*running))


def main(step: int = 1, modes: list[str] = (), kinds: list[str] = ()) -> None:
    """The command: those of the kinds in those of the modes, all if none is given."""
    findings = []
    with TemporaryDirectory() as folder:
        for mode in modes or MODES:
            sweep = Sweep(Path(folder) / mode, mode)
            _, own, share = MODES[mode]
            for number, kind in enumerate([kind for kind in own if not kinds or kind in kinds]):
                every = step * share
                sweep.at_every_call(kind, every, 1 + sweep.calls * (number + 1) // 11 % every)  # each at others
                print(f"{mode}, {kind}: {sweep.trials[kind]} trials, findings: {len(sweep.findings)}", flush=True)
            if mode == "plain" and not kinds:
                sweep.signals(max(1, 100 // step), random.Random(0))
                sweep.together(max(1, 50 // step))
            print(f"{mode}: {dict(sweep.trials)}", *sweep.findings, sep="\n", flush=True)
            findings += sweep.findings
        sys.exit(bool(findings))


if __name__ == "__main__":
    words = sys.argv[2:]
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 1,
        *[[w for w in words if (w in MODES) == mode] for mode in (True, False)],
    )
