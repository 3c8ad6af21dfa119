"""Train many runs in the background: recipes, changes of them, seeds.

    python benchmarks/campaign.py seed ancestor --seeds 3 --options "--tta --no-lr-find"
    python benchmarks/campaign.py fast "fast --lr 0.4" --options "--width 16 --epochs 8 --valid holdout" --jobs 2

Each run is a recipe and options of train_fastai.py. All of them are trained with the first seed, then with the next, so
that they can be compared at any time, and at the lowest priority. Ctrl-C and SIGTERM stop them with a checkpoint; the
same command resumes them, and does not train again what has finished. A result is in results/runs as soon as its run
has finished. Use a separate clone, at a commit, so that no edit of the code affects a run.
"""

import csv
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import sleep, strftime
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "results"))

from fastcore.basics import num_cpus
from figures import file_name, take_in

from errors import InputError, Stopped, parse
from files import locked
from interrupts import Interrupted
from recipes import RECIPES
from training.run import Run

ROOT = Path(__file__).parents[1]
POLL = 1.0  # seconds between two looks at the runs


@dataclass(frozen=True)
class Training:
    """One run: the arguments of train_fastai.py, its seed and its folder."""

    words: tuple[str, ...]
    seed: int
    folder: Path

    @property
    def ended(self) -> bool:
        """Whether it has finished."""
        return Run(self.folder).ended

    def epochs(self) -> int:
        """The number of its epochs."""
        if "--epochs" in self.words:
            return int(self.words[self.words.index("--epochs") + 1])
        return RECIPES[self.words[0]].epochs

    def history(self) -> list[dict[str, str]]:
        """The rows of `history.csv` so far."""
        with suppress(OSError):
            return list(csv.DictReader((self.folder / "history.csv").read_text().splitlines()))
        return []

    def start(self, threads: str) -> subprocess.Popen:
        """Start or resume it, in a session of its own, which the terminal's Ctrl-C does not reach, at low priority."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        recipe, *options = self.words
        words = ["--recipe", recipe, *options, "--seed", self.seed, "--out", self.folder, "--resume", "auto"]
        command = [sys.executable, str(ROOT / "train_fastai.py"), *map(str, words)]
        env = os.environ | {"OMP_NUM_THREADS": threads}
        with self.log.open("a") as log:
            process = subprocess.Popen(
                command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True, preexec_fn=lambda: os.nice(19),
            )  # fmt: skip
        with suppress(OSError):  # Linux divides the CPU between sessions first; nice counts only within a session
            Path(f"/proc/{process.pid}/autogroup").write_text("19")
        return process

    @property
    def log(self) -> Path:
        """The file with its output."""
        return self.folder.with_suffix(".log")

    def __str__(self) -> str:
        return f"{shlex.join(self.words)}, seed {self.seed}"


def trainings(texts: list[str], options: str, seeds: range, out: Path) -> list[Training]:
    """Seed by seed, a run for each of `texts` with `options` added. Raises InputError for an unknown recipe."""
    runs = []
    for seed in seeds:
        for text in texts:
            words = [*shlex.split(text), *shlex.split(options)]
            if not words or words[0] not in RECIPES:
                raise InputError(f"{text!r}: it must start with a recipe, one of {', '.join(RECIPES)}")
            runs.append(Training(tuple(words), seed, out / file_name(*words, "seed", seed)))
    if len({run.folder for run in runs}) < len(runs):
        raise InputError("two of the trainings are the same; name each once")
    return runs


def duration(seconds: float) -> str:
    """A time in minutes, or in hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


class Progress:
    """Prints a line for every epoch: the run, its progress, and how long it and all others will still take."""

    def __init__(self, runs: list[Training], jobs: int):
        self.runs, self.jobs = runs, jobs
        self.seen = {run: len(run.history()) for run in runs}

    def look(self, run: Training) -> None:
        """Print a line if `run` has finished another epoch."""
        rows = run.history()
        if len(rows) <= self.seen[run]:
            return
        self.seen[run] = len(rows)
        pace = median(float(row["seconds"]) for row in rows)
        left = {r: 0 if r.ended else r.epochs() - self.seen[r] for r in self.runs}
        whole = pace * max(left[run], sum(left.values()) / self.jobs)
        accuracy = 100 * float(rows[-1]["valid_accuracy"])
        tell(f"{run}: epoch {len(rows)}/{run.epochs()}, {accuracy:.2f} %; left: {duration(pace * left[run])}, "
             f"with all others {duration(whole)}")  # fmt: skip


def tell(line: str) -> None:
    """Print a line with the time of day."""
    print(f"{strftime('%H:%M:%S')}  {line}", flush=True)


@contextmanager
def ended(active: dict[Training, subprocess.Popen]) -> Iterator[None]:
    """Within this, Ctrl-C, SIGTERM and SIGHUP stop all active runs, each with a checkpoint."""
    try:
        yield
    except Interrupted as e:
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()
        raise Stopped("stopped, with a checkpoint of each run; the same command resumes them", e.code) from None


def work(runs: list[Training], jobs: int, threads: str, results: Path) -> int:
    """Train all `runs` that have not finished, `jobs` at a time; returns how many failed."""
    progress, failed = Progress(runs, jobs), 0
    active: dict[Training, subprocess.Popen] = {}
    finished = [run for run in runs if run.ended]
    waiting = [run for run in runs if run not in finished]
    for run in finished:
        take_in(run.folder, results)  # it can have finished while a campaign was being stopped
    tell(f"{len(runs)} runs, {len(finished)} of them have finished; {jobs} at a time, threads: {threads}")
    with ended(active):
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                active[run] = run.start(threads)
                tell(f"{run}: {'resumed' if run.history() else 'started'}")
            sleep(POLL)
            for run, process in list(active.items()):
                progress.look(run)
                if process.poll() is None:
                    continue
                del active[run]
                failed += not run.ended
                tell(outcome(run, process.returncode, results))
    return failed


def outcome(run: Training, code: int, results: Path) -> str:
    """One line on how it ended; copies its result to `results`."""
    if not run.ended:
        last = (run.log.read_text().splitlines() or ["nothing was printed"])[-1]
        return f"{run}: failed with exit code {code}: {last}"
    result = Run(run.folder).result()
    return f"{run}: {result['last_accuracy']:.2%} after {result['epochs']} epochs, in {take_in(run.folder, results)}"


def main(
    runs: Annotated[str, {"nargs": "+"}],  # A recipe each, in quotes with options of train_fastai.py behind it
    options: str = "",  # Further options, of all runs; a single one with an equals sign: --options=--tta
    seeds: int = 1,  # How many seeds of each
    first_seed: int = 0,  # The first of them
    jobs: int = 1,  # Runs at a time, which share the cores
    out: str = "runs/campaign",  # Folder of the run folders
    results: str = None,  # Folder for the results [results/runs]
):
    """Train many runs in the background: recipes, changes of them, seeds."""
    for option, value in (("--seeds", seeds), ("--jobs", jobs)):
        if value < 1:
            raise InputError(f"{option} is {value}: it must be at least 1")
    kept = Path(results) if results else ROOT / "results" / "runs"
    if not kept.is_dir():
        raise InputError(f"--results {results}: there is no such folder; make it first")
    folder = Path(out)
    todo = trainings(runs, options, range(first_seed, first_seed + seeds), folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, num_cpus() // jobs)))
        failed = work(todo, jobs, threads, kept)
    tell(f"{len(todo) - failed} of {len(todo)} runs have finished; python results/make.py makes tables of them")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    parse(main)
