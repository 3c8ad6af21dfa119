"""The command line, and what a user sees when the input is bad: one line on stderr and exit code 2.

A bug in the code keeps its traceback.
"""

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

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # from fastai's import

OTHER_WORDS = {  # timm's, YOLO's and fastai's words for our options
    "--amp": "--precision", "--arch": "--width", "--batch": "--bs", "--batch-size": "--bs", "--checkpoint": "--resume",
    "--data-dir": "--data", "--dataset": "--data", "--fliplr": "--flip", "--fp16": "--precision fp16",
    "--gpu": "--device", "--gpus": "--device", "--hflip": "--flip", "--learning-rate": "--lr", "--lr0": "--lr",
    "--lr-max": "--lr", "--lr-rate": "--lr", "--model": "--width", "--moms": "--momentum", "--n-epoch": "--epochs",
    "--name": "--out", "--num-workers": "--workers", "--output": "--out", "--project": "--out",
    "--smoothing": "--label-smoothing", "--torchcompile": "--compile", "--weight-decay": "--wd",
}  # fmt: skip


class InputError(ValueError):
    """Bad input from the user. The message is one line: what is at fault, and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(re.sub(r"\s*\n\s*", " ", message.strip())))  # a library's can have several lines


class Stopped(Exception):
    """Training was asked to stop. The message is one line: where it stopped, and how to resume."""

    def __init__(self, message: str, code: int):
        super().__init__(printable(message))
        self.code = code


def fail(message: object, code: int = 2) -> NoReturn:
    """End the command with one line on stderr."""
    if (rank := os.environ.get("RANK", "0")) != "0":
        sleep(10)  # if rank 0 fails as well, it reports that, and the launcher ends the others in the meantime
        message = f"rank {rank}: {message}"
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=Lasting(sys.stderr))
    sys.exit(code)


class Lasting:
    """A standard stream that ignores failing writes, and drops what it cannot write.

    So training continues when the terminal is closed, after `| head -1`, and when the disk with the log is full.
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
                os.dup2(nowhere.fileno(), self.stream.fileno())  # also takes what is still in the buffer


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within this, printing never fails."""
    with redirect_stdout(Lasting(sys.stdout)), redirect_stderr(Lasting(sys.stderr)):
        yield


def leave_stdout() -> None:
    """Redirect stdout to nowhere after a failed write; Python would otherwise try to flush it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(func: Callable, *args, **kwargs) -> Any:
    """Return what `func` returns. Bad input or a failing disk: one line, exit code 2. A signal: one line, its code."""
    if sys.stdout is None:
        fail("stdout is closed; send it to a file, or to /dev/null")
    # Log files show each line at once, and characters that the terminal cannot show become escapes.
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
    except BrokenPipeError:  # the reader has ended, as `head` does
        leave_stdout()
        sys.exit(1)
    except OSError as e:  # a full or broken disk, or missing permissions: no bug of ours
        try:
            if e.filename is None:
                print(flush=True)  # fails if it is stdout that cannot be written to
        except OSError as of_stdout:
            leave_stdout()
            fail(f"stdout: {of_stdout.strerror}; send it somewhere else")
        if e.errno is None:
            raise
        fail(InputError(f"{e.filename or 'a file'}: {e.strerror}"))
    except Interrupted as e:
        if sys.stdout.isatty():
            print()  # ends the progress bar's line
        fail(e, e.code)


def right_option(word: str, options: Sequence[str]) -> str | None:
    """The one of `options` that the unknown option `word` most likely means, None if there is none."""
    word = word.split("=")[0].replace("_", "-")
    meant = OTHER_WORDS.get(word, word)
    if meant.partition(" ")[0] in options:
        return meant
    longer = [o for o in options if word and o.startswith(word)]
    return next(iter(longer or difflib.get_close_matches(word, options)), None)


def parse(func: Callable, pos: Sequence[str] = ()) -> Any:
    """Return what `func`, a dataclass of options or a command's function, makes of the command line's arguments.

    Like fastcore's `call_parse`, which reads options, types and help from the signature, but strict: options cannot be
    abbreviated, and a wrong one is one line with a suggestion, where argparse would print its whole usage first. `pos`
    names arguments that are positional although they have a default. Prepares the process, too, as `startup` and
    `interrupts` have it: threads, memory, Ctrl-C.
    """
    if sys.stderr is None:  # closed: the first warning would be an error, the next file that is opened take its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    keep_freed_memory()
    let_idle_threads_sleep()
    end_at_once()
    if func.__module__ == "__main__":  # fastcore would not find the comments there, from which it makes the help
        line = vars(func).get("__firstlineno__")
        func.__module__ = Path(sys.argv[0]).stem
        if line is not None:  # from Python 3.13 on, setting the module forgets the line where the class is
            func.__firstlineno__ = line
        sys.modules.setdefault(func.__module__, sys.modules["__main__"])
    parser = anno_parser(func, pos=pos)
    parser.allow_abbrev, parser.error = False, fail
    parsed, unknown = parser.parse_known_args()
    if unknown:
        options = [o for a in parser._actions for o in a.option_strings if a.help != "==SUPPRESS==" and len(o) > 2]
        near = right_option(unknown[0], options)
        hint = f" (did you mean {near}?)" if near else ""
        fail(f"unknown option {printable(unknown[0]) or repr('')}{hint}; --help explains all options")
    args = {name: value for name, value in vars(parsed).items() if name not in ("pdb", "xtra")}  # call_parse's own
    return run_command(func, **args)
