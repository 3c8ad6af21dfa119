"""The run folder: what its files are called, and what can be read from it. Imports nothing that takes long."""

import json
import os
import shutil
from pathlib import Path

from errors import InputError
from files import LOCK, leftovers, to_disk, write_json
from options import Options
from recipes import ANCESTOR, Recipe

SETTINGS = (*Recipe.__annotations__, "recipe", "precision", "norm", "seed", "valid", "valid_pct", "sync_bn", "compile")
SETTINGS += ("deterministic", "fingerprint")
CHECKPOINTS = ("checkpoint.pth", "checkpoint-before.pth")


def check_out(out: str | None) -> None:
    """Raise InputError if `out` cannot become a run folder; looked at before the work starts."""
    if out is None:
        return
    path = Path(out)
    # Of a name that is too long, pathlib's is_dir raises; what a killed process left is nothing.
    if os.path.isdir(path) and set(path.iterdir()) - {path / LOCK, *leftovers(path)}:
        raise InputError(f"--out {out}: the folder is not empty; name a new or an empty one")
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"--out {out}: this is a file; name a new or an empty folder")


def new_run_folder(recipe: str, out: str | None = None, parent: str = "runs") -> Path:
    """Make `out`, or the next free `runs/NNN-recipe`. Raises InputError where that cannot be.

    What is in `out` is looked at again once it is held: another process can have made it in the meantime.
    """
    try:
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            to_disk(Path(out).parent)
            return Path(out)
        Path(parent).mkdir(exist_ok=True)
        while True:
            taken = [int(p.name.split("-")[0]) for p in Path(parent).iterdir() if p.name.split("-")[0].isdigit()]
            folder = Path(parent) / f"{max(taken, default=0) + 1:03}-{recipe}"
            try:
                folder.mkdir()
                to_disk(folder.parent)
                return folder
            except FileExistsError:  # another run took the number in the meantime
                continue
    except OSError as e:
        raise InputError(f"{e.filename}: the run folder cannot be made here ({e.strerror}); pass --out PATH") from e


def open_run(folder: Path | None, options: Options, config: dict) -> Path:
    """The folder to go on in, or a new one. Raises InputError where it was started with other settings or images."""
    if folder is None:
        return new_run_folder(options.recipe, options.out)
    Run(folder).check_same(config)
    return folder


class Run:
    """A run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def ended(self) -> bool:
        """Whether it has a result, which is written last."""
        return (self / "result.json").exists()

    def config(self) -> dict:
        """What is in `config.json`."""
        return json.loads((self / "config.json").read_text())

    def tidy(self) -> None:
        """Delete what a killed process has left; only for whoever holds the folder."""
        for folder in (self.folder, self / "models", self / "examples"):
            for path in leftovers(folder):
                path.unlink(missing_ok=True)
        for path in (self / "models").glob("tmp????????"):  # of fastai's range test
            shutil.rmtree(path, ignore_errors=True)
        if self.ended:
            for name in CHECKPOINTS:
                (self / name).unlink(missing_ok=True)

    def result_if_ended(self) -> dict | None:
        """What is in `result.json` of a run that has ended, None for any other."""
        return self.result() if self.ended else None

    def result(self) -> dict:
        """What is in `result.json`. Raises InputError where there is none, or it is not one of this project."""
        try:
            result = json.loads((self / "result.json").read_text())
            if not {"last_accuracy", "calibration_error", "history", "seed"} <= result.keys():
                raise KeyError
        except OSError as e:
            raise InputError(f"{self}: not the folder of a run that has ended, no result.json ({e.strerror})") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{self}/result.json: not that of a run of this version of the project") from e
        return {"precision": "fp32", **result}  # as it was before one could choose

    def write(self, kind: str, content: dict) -> None:
        """Write `config` or `result`."""
        write_json(self / f"{kind}.json", content)

    def check_same(self, config: dict) -> None:
        """Raise InputError where it was started with other settings or images: it cannot be gone on with."""
        before = self.config()
        for name in SETTINGS:
            # What an older version did not write it had not: in a recipe that was off, as it is in the ancestor.
            was = before.get(name, getattr(ANCESTOR, name, config[name]))
            if was != config[name]:
                what = "the images are others" if name == "fingerprint" else f"{name} is {config[name]}"
                raise InputError(f"--resume {self}: {what}, but it was started with {was}; start anew")
