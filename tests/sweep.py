"""Small trainings that are killed, or have a call fail, at every one of their calls to the file system, and then go on.

    python tests/sweep.py              all of it: an hour on two cores
    python tests/sweep.py 20           at every twentieth call
    python tests/sweep.py 20 power     only that, of kill, power, EIO, ENOSPC, EROFS, EACCES and ESTALE

A call is one to open, make, rename, list, delete or sync something in the run's folder. What counts: a resume with the
same command ends with the weights, history and files of an undisturbed run, and nobody sees a traceback.
"""

import errno
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's other threads
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

# ruff: noqa: E402
import numpy as np
from conftest import outcome, same
from PIL import Image

import train_fastai
from errors import run_command
from options import Options
from training import checkpoint

FAULTS = ("EIO", "ENOSPC", "EROFS", "EACCES", "ESTALE")
CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.listdir", "os.scandir"}


class Shim:
    """Counts this process's calls to the file system under `root`; at call number `at` it does `what`.

    what: "kill"; "power", which also loses what has not been synced, content (kept: names) or names, by turns; the name
    of an error.
    """

    def __init__(self, root: Path, at: int = 0, what: str = ""):
        self.root, self.at, self.what, self.count, self.synced = str(root), at, what, 0, set()
        self.kept = root.with_name("kept")  # what a power cut leaves of the names: links, made when a folder is synced
        self.fsync, self.busy = os.fsync, False
        sys.addaudithook(self.hear)
        os.fsync = self.sync

    def hear(self, event: str, args: tuple) -> None:
        if event in CALLS and not self.busy and isinstance(args[0], str | Path) and str(args[0]).startswith(self.root):
            self.call(str(args[0]))

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
        if self.what in ("kill", "power"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.busy = False
        code = getattr(errno, self.what)
        raise OSError(code, os.strerror(code), path)

    def lose(self) -> None:
        if self.at % 2 and self.kept.exists():
            shutil.rmtree(self.root)
            self.kept.rename(self.root)
        for path in Path(self.root).rglob("*"):
            if path.is_file() and path.stat().st_ino not in self.synced:
                os.truncate(path, 0)


def forked(func, *args) -> tuple[int, str]:
    """Exit code and standard error of `func(*args)` in a process of its own; minus the number of a signal."""
    return ended(*started(func, *args))


def started(func, *args) -> tuple[int, int]:
    end, start = os.pipe()
    if pid := os.fork():
        os.close(start)
        return pid, end
    os.setpgid(0, 0)
    os.dup2(start, 2)
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


def ended(pid: int, end: int) -> tuple[int, str]:
    with open(end) as errors:
        text = errors.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


class Sweep:
    """The trials in `home`, each counted under its kind: how many, and what was not right."""

    def __init__(self, home: Path, pictures: bool = False, workers: int = 0):
        self.home, self.trials, self.findings = home, Counter(), []
        checkpoint.EVERY = 0
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        rng = np.random.default_rng(0)
        for place in ("train/a", "train/b", "test/a", "test/b"):
            (home / "images" / place).mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(home / f"images/{place}/{i}.png")
        self.options = {"data": str(home / "images"), "bs": 4, "width": 2, "epochs": 2, "lr": "0.05", "device": "cpu"}
        self.options |= {"resume": "auto", "no_pictures": not pictures, "workers": workers, "valid": "test"}
        code, text = forked(self.train, "whole")
        assert code == 0, text
        self.whole, self.files = outcome(home / "whole/run"), self.listed("whole")

    def train(self, folder: str, shim: tuple = ()) -> None:
        if shim:
            shim = Shim(self.home / folder / "run", *shim)
        try:
            run_command(train_fastai.main, Options(**self.options, out=str(self.home / folder / "run")))
        finally:
            if shim:
                (self.home / "count").write_text(str(shim.count))

    def listed(self, folder: str) -> list[str]:
        run = self.home / folder / "run"
        return sorted(str(path.relative_to(run)) for path in run.rglob("*"))

    def calls(self) -> int:
        forked(self.train, "counted", (0, ""))
        return int((self.home / "count").read_text())

    def check(self, kind: str, what: str, codes: tuple, *results: tuple[int, str]) -> None:
        """One trial is over: look at how its processes ended, go on with the same command, and compare."""
        self.trials[kind] += 1
        wrong = [f"{code}: {text.strip()[-300:]}" for code, text in results
                 if code not in codes or text.count(": error: ") > 1 or "Traceback" in text]  # fmt: skip
        code, text = forked(self.train, "trial")
        if code or "Traceback" in text:
            wrong.append(f"resumed: {code} {text.strip()[-300:]}")
        elif not same(outcome(self.home / "trial/run"), self.whole):
            wrong.append("another end")
        elif self.listed("trial") != self.files:
            wrong.append(f"files: {sorted(set(self.listed('trial')) ^ set(self.files))}")
        self.findings += [f"{kind} {what}: {line}" for line in wrong]
        for folder in ("trial/run", "trial/kept"):
            shutil.rmtree(self.home / folder, ignore_errors=True)

    def at_every_call(self, what: str, step: int = 1, first: int = 1) -> None:
        codes = (-9,) if what in ("kill", "power") else (0, 2)
        for at in range(first, self.calls() + 1, step):
            self.check(what, f"at call {at}", codes, forked(self.train, "trial", (at, what)))

    def signals(self, times: int, longest: float, rng: random.Random) -> None:
        for _ in range(times):
            numbers = rng.choices((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), k=rng.choice((1, 1, 2)))
            delay, process = longest * rng.random(), started(self.train, "trial")
            for number in numbers:
                time.sleep(delay)
                os.kill(process[0], number)
                delay = 0.05 * rng.random()
            self.check("signals", f"{[n.name for n in numbers]}", (0, 129, 130, 143, -1, -2, -15), ended(*process))

    def together(self, times: int, processes: int = 2) -> None:
        for _ in range(times):
            running = [started(self.train, "trial") for _ in range(processes)]
            self.check("together", "", (0, 2), *[ended(*process) for process in running])


def main(step: int, kinds: list[str]) -> None:
    """The command."""
    with TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder))
        calls = sweep.calls()
        for number, what in enumerate(kinds or ("kill", "power", *FAULTS)):
            sweep.at_every_call(what, step, 1 + calls * (number + 1) // 9 % step)  # each at others
            print(f"{what:<10} {sweep.trials[what]} trials, {len(sweep.findings)} findings so far", flush=True)
        if not kinds:
            begun = time.perf_counter()
            forked(sweep.train, "timed")
            sweep.signals(100 // step, time.perf_counter() - begun, random.Random(0))
            sweep.together(50 // step)
        print(dict(sweep.trials), *sweep.findings, sep="\n")
        sys.exit(bool(sweep.findings))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2:])
