"""What every file of a trained model says of it: our JSON, and the words for a file that is none of ours."""

from pathlib import Path

from errors import InputError

HEADER = "custom-resnet"  # the key of our JSON among the strings that a safetensors, ONNX or pt2 file can carry


FORMAT = 1  # changes with what is in the header


def check_header(header: dict) -> None:
    """Raise ValueError unless it is of this format and has classes."""
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, this version of the project reads {FORMAT}")
    classes = header["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are no names")


def foreign(path: str | Path, e: Exception) -> InputError:
    """The error that names the file, and what a reader said of it."""
    reason = f"{type(e).__name__} {e}".splitlines()[0]
    return InputError(f"{path}: not a {Path(path).suffix} file of this project ({reason[:80]})")
