"""Train a recipe again and again on a hold-out, and see what its settings are worth.

    python benchmarks/sweeps.py peaks       the accuracy at eight peak learning rates, and at the one that is suggested
    python benchmarks/sweeps.py ablation    the recipe with one setting changed at a time, for several seeds

Each run leaves its folder under `--out`; one that is there is not trained again, so that a broken-off sweep goes on.
"""

import json
import shutil
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from errors import InputError, run_command
from files import write_json
from train_fastai import main as train

PEAKS = np.geomspace(0.01, 10, 8).tolist()
ABLATION = {  # around the ancestor's peak learning rate, but for the first two
    "as it is": {},
    "as it is, no label smoothing": {"label_smoothing": 0.0},
    "half the learning rate": {"lr": "0.4"},
    "no label smoothing": {"lr": "0.4", "label_smoothing": 0.0},
    "label smoothing 0.2": {"lr": "0.4", "label_smoothing": 0.2},
    "half the weight decay": {"lr": "0.4", "wd": 2.5e-4},
    "twice the weight decay": {"lr": "0.4", "wd": 1e-3},
    "no cutout": {"lr": "0.4", "cutout": 0},
    "cutout 12x12": {"lr": "0.4", "cutout": 12},
    "pad 2": {"lr": "0.4", "pad": 2},
    "CutMix": {"lr": "0.4", "cutmix": 1.0},
    "batches of 256": {"bs": 256, "lr": "0.2"},
}


def result_of(folder: Path, **arguments) -> dict | None:
    """The result of that run: read if it is there, else trained for now. None where the loss was not finite."""
    if not (folder / "result.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a run left that was broken off
        try:
            with (folder.parent / f"{folder.name}.log").open("w") as log, redirect_stdout(log):
                train(**arguments, valid="holdout", out=str(folder))
        except InputError as e:
            if not (folder / "history.csv").exists():
                raise
            print(f"{folder.name}: {e}", flush=True)
            return None
    return json.loads((folder / "result.json").read_text())


def peaks(out: Path, seeds: int, lrs: list[float], **arguments) -> dict:
    """The last epoch's accuracy at each of `lrs`, and at the peak that the range test suggests to that seed.

    Of the range tests' other suggestions those to the first seed are kept.
    """
    rows, tests = [], []
    for seed in range(seeds):
        for lr in [*lrs, None]:
            suggested = lr is None
            lr = tests[-1]["suggestions"][tests[-1]["default"]] if suggested else lr
            folder = out / f"lr-{lr:.3g}{'-suggested' * suggested}-seed-{seed}"
            result = result_of(folder, lr=f"{lr:.6g}", seed=seed, no_lr_find=lr != lrs[0], **arguments)
            if lr == lrs[0]:
                tests.append(json.loads((folder / "lr_find.json").read_text()))
            accuracy = result and result["last_accuracy"]
            rows.append({"lr": float(f"{lr:.6g}"), "seed": seed, "suggested": suggested, "last_accuracy": accuracy})
            words = "diverged" if accuracy is None else f"accuracy {accuracy:.2%}"
            print(f"peak {lr:<7.3g} seed {seed}   {words}{', suggested' * suggested}", flush=True)
    return {"arguments": arguments, "suggestions": tests[0]["suggestions"], "peaks": rows}


def ablation(out: Path, seeds: int, **arguments) -> None:
    """Each change for every seed; `results/make.py --runs` takes the folders in and makes the table."""
    for seed in range(seeds):
        for name, change in ABLATION.items():
            folder = out / f"{name.replace(' ', '-').lower()}-seed-{seed}"
            result = result_of(folder, seed=seed, no_lr_find=True, tta=True, **arguments, **change)
            print(f"{name:<24} seed {seed}   accuracy {result['last_accuracy']:.2%}" if result else name, flush=True)


def main(
    sweep: Annotated[str, {"choices": ["peaks", "ablation"]}],  # What to vary
    recipe: str = "fast",  # The recipe to vary
    data: str = None,  # As train_fastai.py takes it
    width: int = 16,  # Channels of the network's first stage
    epochs: int = None,  # Of each run [3 for peaks, else the recipe's]
    seeds: int = 1,  # How many, from 0 on
    lrs: Annotated[float, {"nargs": "+"}] = None,  # Peaks to try [eight from 0.01 to 10]
    device: str = "auto",  # auto, cpu or cuda
    out: str = None,  # Folder of the runs [runs/SWEEP]
    save: str = None,  # Write the figures of peaks to this JSON file
):
    """Train a recipe again and again on a hold-out, with one setting changed at a time."""
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # fastai's import
    folder = Path(out or f"runs/{sweep}")
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {"recipe": recipe, "data": data, "width": width, "epochs": epochs, "device": device}
    if sweep == "ablation":
        ablation(folder, seeds, **arguments)
        return
    figures = peaks(folder, seeds, lrs or PEAKS, **arguments | {"epochs": epochs or 3})
    if save:
        write_json(Path(save), figures)


if __name__ == "__main__":
    run_command(main)
