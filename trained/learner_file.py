"""model.pkl: the whole learner, with our code in it: a program, for fastai's `load_learner`."""

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
    """Let every later `learn.export()` of this process put our classes into the file, instead of their module's name.

    They are stored as bytecode, so that the file wants the minor version of Python that wrote it.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in OURS:
            cloudpickle.register_pickle_by_value(module)


def export(learn: Learner, path: Path) -> None:
    """`learn.export` to `path`, complete or not at all. The file holds no images, no optimiser and no augmentation."""
    carry_our_code()
    home = learn.path
    try:
        learn.path = Path(".")  # the folder's name on this machine is nobody's business
        with complete(path.absolute()) as beside:
            learn.export(beside)
    finally:
        learn.path = home


def load(path: Path, device: str) -> Model:
    """The model in the file, on the device of that name; runs what its author put in it. Raises InputError."""
    warnings.filterwarnings("ignore", message="load_learner` uses Python's insecure pickle")  # the README says so
    on = get_device(device)
    try:
        learn = load_learner(path)
        return Model.of_torch(classifier_of(learn), {"classes": [str(name) for name in learn.dls.vocab]}, on)
    except Exception as e:  # a pickle can raise anything
        raise foreign(path, e) from e
