"""The trained learner's file: fastai's `.pkl`, which carries this project's code and so loads wherever fastai is."""

from pathlib import Path

import cloudpickle
from fastai.learner import Learner

import callbacks
import data
import images
import model
from run import complete


def carry_our_code() -> None:
    """Let every later `learn.export()` of this process put our classes into the file, instead of their module's name.

    They are stored as bytecode, so that the file wants the minor version of Python that wrote it.
    """
    for module in (callbacks, data, images, model):
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
