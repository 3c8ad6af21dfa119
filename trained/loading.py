"""Load a trained model from a file of any of its formats."""

import os
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from errors import InputError
from trained.predictor import Model

# Imported when needed: for the page and a Space, neither fastai nor onnxruntime has to be installed.
LOADERS = {".safetensors": "safe_file", ".pkl": "learner_file", ".onnx": "onnx_file", ".pt2": "pt2_file"}


def model_file(path: str | Path, kinds: Iterable[str] = tuple(LOADERS)) -> Path:
    """The file itself, or `model.safetensors` in a run's folder. Raises InputError if there is none of these kinds."""
    path = Path(os.path.expanduser(path))
    in_folder = os.path.isdir(path)
    file = path / "model.safetensors" if in_folder else path
    if not os.path.isfile(file):
        what = "not the folder of a run that has finished, no model.safetensors in it" if in_folder else "no such file"
        raise InputError(f"{path}: {what}; pass a run folder, or a model's {', '.join(kinds)}")
    if file.suffix not in kinds:
        raise InputError(f"{file}: this takes a run folder, or a model's {', '.join(kinds)}")
    return file


def load_model(path: str | Path, device: str = "auto") -> Model:
    """The model in a file of any kind, or in the folder of a run.

    Loading a `.pkl` runs code in it, and so may a `.pt2`. ONNX and pt2 files run on the CPU. Raises InputError for a
    missing, damaged or foreign file, and for a device that does not exist.
    """
    file = model_file(path)
    return import_module(f"trained.{LOADERS[file.suffix]}").load(file, device)
