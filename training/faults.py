"""Faults of the machine and signals that end training early, as one line that says how to resume."""

import errno
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.torch_core import num_distrib

from errors import InputError, Stopped
from interrupts import Interrupted, stops_taken
from options import Options
from training.run import Run

REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room, then ")
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "see to it that it can be written, then ")

# Words in torch's errors about a file that it cannot create or write, where fastai has it write the file
TORCH_FILES = ("inline_container", "iostream error", "cannot be opened", "Parent directory")


def how_to_go_on(run: Path, **options) -> str:
    """The command that resumes `run`, if there is something to resume."""
    if not os.path.exists(run / "config.json"):  # unlike pathlib's, this raises nothing
        return "start again"
    return "resume with: " + Options(resume=str(run)).command(max(1, num_distrib()), **options)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, the one that was being handled when it was raised, and so on: clean-up code can fail, too."""
    while error:
        yield error
        error = error.__context__


@contextmanager
def faults_explained(run: Path, bs: int) -> Iterator[None]:
    """Within this, faults of the machine, and signals outside the fit, become one line that says how to resume."""
    try:
        yield
    except Interrupted as e:
        raise Stopped(f"{e}; {how_to_go_on(run)}", e.code) from e
    except torch.OutOfMemoryError as e:
        raise InputError(f"the device has too little memory for batches of {bs}; try --bs {max(2, bs // 2)}") from e
    except OSError as e:
        if e.errno is None:  # not the system's: a library cannot read what we gave it, a bug
            raise
        remedy = REMEDIES.get(e.errno, "")
        raise InputError(f"{e.filename or run}: {e.strerror}; {remedy}{how_to_go_on(run)}") from e
    except RuntimeError as e:
        if num_distrib() > 1 and any(isinstance(x, torch.distributed.DistError) or "gloo" in str(x) for x in causes(e)):
            gone = "another process of this training is gone, its own error is above"
            raise InputError(f"{gone}; {how_to_go_on(run)}") from e
        if any(words in str(e) for words in TORCH_FILES):
            what = "a file could not be written, maybe the disk is full; make room"
            raise InputError(f"{run}: {what}, then {how_to_go_on(run)}") from e
        why = next((line.strip(" .") for line in str(e).splitlines() if "DataLoader worker" in line), None)
        if why is None:
            raise
        raise InputError(f"{why}, perhaps for want of memory; {how_to_go_on(run, workers=0)}") from e


@contextmanager
def rest_can_wait(run: Run) -> Iterator[None]:
    """Within this, a fault of the disk becomes one line: what is written here can be made again."""
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise
        again = shlex.join(["python", "report.py", str(run)])
        what = "the weights and the result are there, make the rest with"
        raise InputError(f"{e.filename or run}: {e.strerror}; {what}: {again}") from e


@contextmanager
def stops_heard(ask: Callable[[int], None]) -> Iterator[None]:
    """Within this, Ctrl-C calls `ask(130)`, SIGTERM `ask(143)`, SIGHUP `ask(129)`; a second Ctrl-C is `Interrupted`."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to that one only
        yield
        return
    heard = []

    def handle(number):
        if heard and number == signal.SIGINT:
            raise Interrupted(number)
        heard.append(number)
        ask(128 + number)

    with stops_taken(handle):
        yield
