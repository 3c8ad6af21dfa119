"""model.pkl: the whole learner with our code in it, for fastai's `load_learner`. Loading it runs code."""

import sys
import warnings
from pathlib import Path

import cloudpickle
from fastai.learner import Learner, load_learner

from files import complete
from trained.classifier import classifier_of
from trained.device import get_device
from trained.header import foreign
from trained.predictor import Model

OURS = ("aug", "data", "errors", "images", "interrupts", "loader", "model", "names", "trained", "training", "workers")


def carry_our_code() -> None:
    """Make every later `learn.export()` of this process pickle our classes by value, so that the file carries our code.

    The code is bytecode, so the file needs the minor version of Python that wrote it.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in OURS:
            cloudpickle.register_pickle_by_value(module)


def export(learn: Learner, path: Path) -> None:
    """`learn.export` to `path`, complete or not at all. The file holds no images, no optimiser and no augmentation."""
    carry_our_code()
    home = learn.path
    try:
        learn.path = Path(".")  # the file should not contain a path of this machine
        with complete(path.absolute()) as beside:
            learn.export(beside)
    finally:
        learn.path = home


def load(path: Path, device: str) -> Model:
    """The model in the file, on the device of that name; runs code in the file. Raises InputError if it is not ours."""
    warnings.filterwarnings("ignore", message="load_learner` uses Python's insecure pickle")  # as the README says
    on = get_device(device)
    try:
        learn = load_learner(path)
        return Model.of_torch(classifier_of(learn), {"classes": [str(name) for name in learn.dls.vocab]}, on)
    except Exception as e:  # a pickle can raise anything
        raise foreign(path, e) from e
