"""The run folder: the names of its files, reading and writing them. Imports nothing slow."""

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
    """Raise InputError if `out` cannot become a run folder."""
    if out is None:
        return
    path = Path(out)
    # pathlib's is_dir raises for a name that is too long. What a killed process left does not count.
    if os.path.isdir(path) and set(path.iterdir()) - {path / LOCK, *leftovers(path)}:
        raise InputError(f"--out {out}: the folder is not empty; name a new or an empty one")
    if os.path.exists(path) and not os.path.isdir(path):
        raise InputError(f"--out {out}: this is a file; name a new or an empty folder")


def new_run_folder(recipe: str, out: str | None = None, parent: str = "runs") -> Path:
    """Make `out`, or the next free `runs/NNN-recipe`. Raises InputError if it cannot be made.

    The caller checks what is in `out` again once it has locked it, as another process may have used it meanwhile.
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
            except FileExistsError:  # another run has just taken the number
                continue
    except OSError as e:
        raise InputError(f"{e.filename}: the run folder cannot be made here ({e.strerror}); pass --out PATH") from e


def open_run(folder: Path | None, options: Options, config: dict) -> Path:
    """The folder to resume in, or a new one. Raises InputError if it was started with other settings or images."""
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
        """Whether it has a result, which training writes last."""
        return (self / "result.json").exists()

    def config(self) -> dict:
        """The content of `config.json`."""
        return json.loads((self / "config.json").read_text())

    def tidy(self) -> None:
        """Delete what a killed process has left, and a finished run's checkpoints. Only while the folder is locked."""
        for folder in (self.folder, self / "models", self / "examples"):
            for path in leftovers(folder):
                path.unlink(missing_ok=True)
        for path in (self / "models").glob("tmp????????"):  # from fastai's range test
            shutil.rmtree(path, ignore_errors=True)
        if self.ended:
            for name in CHECKPOINTS:
                (self / name).unlink(missing_ok=True)

    def result_if_ended(self) -> dict | None:
        """The content of `result.json` if the run has finished, else None."""
        return self.result() if self.ended else None

    def result(self) -> dict:
        """The content of `result.json`. Raises InputError if there is none, or it is not one of this project."""
        try:
            result = json.loads((self / "result.json").read_text())
            if not {"last_accuracy", "calibration_error", "history", "seed"} <= result.keys():
                raise KeyError
        except OSError as e:
            raise InputError(f"{self}: not the folder of a run that has finished, no result.json ({e.strerror})") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{self}/result.json: not that of a run of this version of the project") from e
        # what older runs had, before these were options
        return {"precision": "fp32", "valid_pct": Options.valid_pct, **result}

    def write(self, kind: str, content: dict) -> None:
        """Write `content` to `config.json` or `result.json`; kind: "config" or "result"."""
        write_json(self / f"{kind}.json", content)

    def check_same(self, config: dict) -> None:
        """Raise InputError if the run was started with other settings or images, and so cannot be resumed."""
        before = self.config()
        for name in SETTINGS:
            # A setting that an older version did not know was off, as it is in the ancestor.
            was = before.get(name, getattr(ANCESTOR, name, config[name]))
            if was != config[name]:
                what = "the images are others" if name == "fingerprint" else f"{name} is {config[name]}"
                raise InputError(f"--resume {self}: {what}, but it was started with {was}; start anew")
