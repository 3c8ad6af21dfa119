"""Measure on a GPU what cannot be measured without one, in some seventy epochs.

    python benchmarks/gpu.py                   all parts; each is written to results/gpu.json once it is measured
    python benchmarks/gpu.py --only compile    one part; the others that are in the file stay
    python benchmarks/gpu.py --rehearse        all parts, small and on the CPU: a check that it works

Run it on an idle machine. One part is a whole run of the recipe fast, on the images that --data names.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from errors import InputError, parse, run_command

PARTS = {
    "steps": "Training, batch 512: the bare network, a hand-written loop over our loader, our Learner",
    "loader": "How long a hand-written loop waits for the loader",
    "precision": "Our Learner in each precision",
    "deterministic": "Our Learner with --deterministic and without",
    "run": "A whole run by the recipe fast",
    "compile": "Our Learner with --compile and without; the first epoch has the compiling in it",
}


@dataclass(frozen=True)
class Options:
    """Measure a GPU: steps, loader, precisions, --deterministic, --compile, and a whole run."""

    only: Annotated[str, {"choices": list(PARTS)}] = None  # One part [all of them]
    device: str = "cuda"  # cuda or cuda:1
    width: int = 64  # Of the network
    images: int = 50_000  # An epoch of all parts but the run
    rounds: int = 3  # Epochs of each way, beside the first
    epochs: int = None  # Of the run [the recipe's]
    data: str = "cifar10"  # What the run trains on
    save: str = None  # A JSON file for the figures [results/gpu.json; none of a rehearsal]
    rehearse: bool = False  # All of it on the CPU: width 4, two epochs of 2,048 images, a run of one epoch of digits

    def __post_init__(self):
        for name, least in (("width", 1), ("images", 2048), ("rounds", 1)):
            if (value := getattr(self, name)) < least:
                raise InputError(f"--{name} is {value}: it must be at least {least}")
        if self.save and not Path(self.save).absolute().parent.is_dir():
            raise InputError(f"--save {self.save}: there is no folder of that name to write to; make it first")


if __name__ == "__main__":
    OPTIONS = parse(Options)

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from speed import begun, table
from steps import BARE, BY_HAND, MUON, OURS, by_hand, fit, loop
from ways import BS, noise

import options as run_options
from data import get_dls
from files import write_json
from recipes import get_recipe
from train_fastai import get_learner, train
from trained.device import CUBLAS_WORKSPACE, get_device, set_deterministic
from training.callbacks import CompiledTraining
from training.description import code_version, processor
from training.history import RunLog
from training.precision import PRECISIONS, choose_precision, obstacle


class Bench:
    """The measurements on a device: each of `PARTS` is a method that returns the rows of its table."""

    def __init__(self, options: Options, device: torch.device, folder: Path):
        self.options, self.device, self.folder = options, device, folder
        self.table = noise(options.images, options.images // 5)

    def steps(self) -> list[dict]:
        dls, step = self._dls(), self._step()
        batch = self._dls(workers=0).train.one_batch()
        ways = {BARE: lambda: [batch] * len(dls.train), BY_HAND: lambda: dls.train}
        rows = []
        for way, batches in ways.items():
            first, *times = (loop(step, batches, self.device) for _ in range(self.options.rounds + 1))
            rows.append({"way": way, **self._times(first, times), "whole epoch": None})
        ours = [(OURS, 0.0), (MUON, get_recipe("fast").muon)]
        return [*rows, *(self._epochs(way, self._learner(muon=muon)) for way, muon in ours)]

    def loader(self) -> list[dict]:
        dls, step, firsts, others = self._dls(), self._step(), [], []
        for _ in range(self.options.rounds + 1):
            batches, waits = iter(dls.train), []
            for _ in range(len(dls.train)):
                start = perf_counter()
                batch = next(batches)
                waits.append(1e3 * (perf_counter() - start))
                loss = step(*batch)
            next(batches, None)
            loss.item()  # waits for the device
            sleep(0.1)  # about as long as a validation, during which the loader begins the next epoch
            firsts.append(waits[0])
            others += waits[1:] if len(firsts) > 1 else []
        kinds = {"an epoch's first batch": firsts[1:], "every other batch": others}
        return [{"wait for": name, "median, ms": median(ms), "longest, ms": max(ms)} for name, ms in kinds.items()]

    def precision(self) -> list[dict]:
        return [self._epochs(p, self._learner(p)) for p in PRECISIONS if not obstacle(p, self.device)]

    def deterministic(self) -> list[dict]:
        rows = [self._epochs("as usual", self._learner())]
        with repeatable(self.device):
            return [*rows, self._epochs("--deterministic", self._learner())]

    def run(self) -> list[dict]:
        own = {name: getattr(self.options, name) for name in ("data", "width", "epochs")}
        result = train(run_options.Options(**own, device=str(self.device), out=str(self.folder / "run")))
        row = {"data": result["source"], "epochs": result["epochs"], "precision": result["precision"]}
        row |= {"accuracy, %": 100 * result["last_accuracy"], "seconds in all": result["seconds"]}
        return [row | {"an epoch": median(epoch["seconds"] for epoch in result["history"])}]

    def compile(self) -> list[dict]:
        rows, learn = [self._epochs("as usual", self._learner())], self._learner()
        learn.add_cb(CompiledTraining(learn))
        return [*rows, self._epochs("--compile", learn)]

    def _dls(self, workers: int | None = None) -> DataLoaders:
        return get_dls(self.table, workers=workers, device=self.device)

    def _learner(self, precision: str = "auto", muon: float = 0.0) -> Learner:
        recipe = get_recipe("fast", width=self.options.width, muon=muon)
        return get_learner(self._dls(), recipe, precision=precision, path=self.folder)

    def _step(self):
        return by_hand(self.device, self.options.width, False, choose_precision("auto", self.device))

    def _epochs(self, way: str, learn: Learner) -> dict:
        (first, _), *epochs = (fit(learn, RunLog()) for _ in range(self.options.rounds + 1))
        trained, whole = zip(*epochs, strict=True)
        return {"way": way, **self._times(first, trained), "whole epoch": min(whole)}

    def _times(self, first: float, others: list[float]) -> dict:
        row = {"first epoch": first, "median": median(others), "fastest": min(others)}
        return row | {"ms per step": 1e3 * min(others) / (self.options.images // BS)}


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within this, torch is set as by `--deterministic`; new learners follow that."""
    before = torch.backends.cudnn.benchmark
    set_deterministic(True, device)
    try:
        yield
    finally:
        set_deterministic(False, device)
        torch.backends.cudnn.benchmark = before


def describe(device: torch.device) -> dict:
    """The machine, the code and the versions that are measured."""
    packages = ("torch", "fastai", "albumentations", "torchvision", "numpy")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processor": processor(),
        "cuda": torch.version.cuda,
        **code_version(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def main(options: Options) -> None:
    """The command."""
    save = options.save or (None if options.rehearse else ROOT / "results/gpu.json")
    if options.rehearse:
        small = {"device": "cpu", "width": 4, "images": 2048, "rounds": 1, "epochs": 1, "data": "digits"}
        options = replace(options, **small)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)  # for --deterministic, before any product
    started, device = perf_counter(), get_device(options.device)
    here = describe(device)
    figures = begun(Path(save), here) if save else here
    print(", ".join(f"{name} {value}" for name, value in here.items()), flush=True)
    with TemporaryDirectory() as folder:
        bench = Bench(options, device, Path(folder))
        for part in [options.only] if options.only else PARTS:
            print(f"\n{PARTS[part]}\n", flush=True)
            figures[part] = getattr(bench, part)()
            print(f"{table(figures[part])}\n\n{perf_counter() - started:.1f} s so far", flush=True)
            if save:
                write_json(Path(save), figures)


if __name__ == "__main__":
    run_command(main, OPTIONS)
