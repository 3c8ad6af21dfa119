"""What a user sees when the input is bad: one line on stderr and exit code 2; a bug in the code keeps its traceback."""

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from time import sleep
from typing import Any, NoReturn, TextIO

from fastcore.script import anno_parser

from interrupts import Interrupted, end_at_once, stops_raised
from names import printable
from startup import keep_freed_memory, let_idle_threads_sleep

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # fastai's import, nothing to do here

OTHER_WORDS = {  # timm's, YOLO's and fastai's words for our options
    "--amp": "--precision", "--arch": "--width", "--batch": "--bs", "--batch-size": "--bs", "--checkpoint": "--resume",
    "--data-dir": "--data", "--dataset": "--data", "--fliplr": "--flip", "--fp16": "--precision fp16",
    "--gpu": "--device", "--gpus": "--device", "--hflip": "--flip", "--learning-rate": "--lr", "--lr0": "--lr",
    "--lr-max": "--lr", "--lr-rate": "--lr", "--model": "--width", "--moms": "--momentum", "--n-epoch": "--epochs",
    "--name": "--out", "--num-workers": "--workers", "--output": "--out", "--project": "--out",
    "--smoothing": "--label-smoothing", "--torchcompile": "--compile", "--weight-decay": "--wd",
}  # fmt: skip


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: the thing at fault, and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(re.sub(r"\s*\n\s*", " ", message.strip())))  # a library's words can have several


class Stopped(Exception):
    """Training ended early because it was asked to. The message is one line: where, and how to go on."""

    def __init__(self, message: str, code: int):
        super().__init__(printable(message))
        self.code = code


def fail(message: object, code: int = 2) -> NoReturn:
    """End the command with one line on stderr."""
    if (rank := os.environ.get("RANK", "0")) != "0":
        sleep(10)  # what stops rank 0, too, is for rank 0 to say: the launcher then ends the others before this
        message = f"rank {rank}: {message}"
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=Lasting(sys.stderr))
    sys.exit(code)


class Lasting:
    """A standard stream that outlasts its reader: whatever cannot be written to it any more is lost, and that is all.

    So a training goes on behind a closed terminal, `head -1` or a log on a full disk.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, func: Callable, *args) -> None:
        try:
            func(*args)
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # also for what is still in its buffer


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within this, whatever is printed outlasts its reader."""
    with redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr)):
        yield


def leave_stdout() -> None:
    """Write no more to stdout, as that has failed; else Python tries once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(func: Callable, *args, **kwargs) -> Any:
    """What `func` returns; bad input or a failing disk is one line and exit code 2, a signal one line and its own."""
    if sys.stdout is None:
        fail("stdout is closed; send it to a file, or to /dev/null")
    # Whoever follows a log file sees each line as it comes, and what the terminal cannot show as an escape.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        with stops_raised():
            return func(*args, **kwargs)
    except InputError as e:
        fail(e)
    except Stopped as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {e}", file=Lasting(sys.stderr))
        sys.exit(e.code)
    except BrokenPipeError:  # whoever reads the output has had enough, as `head` does
        leave_stdout()
        sys.exit(1)
    except OSError as e:  # a disk that is full, broken or another user's is no bug of ours
        try:
            if e.filename is None:
                print(flush=True)  # is it stdout that cannot be written to, as /dev/full and a full disk?
        except OSError as of_stdout:
            leave_stdout()
            fail(f"stdout: {of_stdout.strerror}; send it somewhere else")
        if e.errno is None:
            raise
        fail(InputError(f"{e.filename or 'a file'}: {e.strerror}"))
    except Interrupted as e:
        if sys.stdout.isatty():
            print()  # the bar's line ends here
        fail(e, e.code)


def right_option(word: str, options: Sequence[str]) -> str | None:
    """The one of a command's `options` that the unknown `word` stands for, None where there is none."""
    word = word.split("=")[0].replace("_", "-")
    if OTHER_WORDS.get(word, word).split()[0] in options:
        return OTHER_WORDS.get(word, word)
    return next(iter([o for o in options if o.startswith(word)] or difflib.get_close_matches(word, options)), None)


def parse(func: Callable, pos: Sequence[str] = ()) -> Any:
    """What `func`, a dataclass of options or a command's function, makes of the command line that its signature
    describes, as with fastcore's `call_parse`, but strictly.

    An option must be spelled out (no abbreviations), and a wrong one is one line that names the right ones, where
    argparse would print its whole usage first. `pos` names arguments that stay positional though they have a default.
    """
    keep_freed_memory()
    let_idle_threads_sleep()
    end_at_once()
    if func.__module__ == "__main__":  # there fastcore does not look for a dataclass's comments, which --help shows
        line = vars(func).get("__firstlineno__")
        func.__module__ = Path(sys.argv[0]).stem
        if line is not None:  # Python from 3.13 on forgets with the module where a class's source is
            func.__firstlineno__ = line
        sys.modules.setdefault(func.__module__, sys.modules["__main__"])
    parser = anno_parser(func, pos=pos)
    parser.allow_abbrev, parser.error = False, fail
    parsed, unknown = parser.parse_known_args()
    if unknown:
        options = [o for a in parser._actions for o in a.option_strings if a.help != "==SUPPRESS==" and len(o) > 2]
        near = right_option(unknown[0], options)
        hint = f" (did you mean {near}?)" if near else ""
        fail(f"unknown option {printable(unknown[0])}{hint}; --help explains all options")
    args = {name: value for name, value in vars(parsed).items() if name not in ("pdb", "xtra")}  # call_parse's own
    return run_command(func, **args)
