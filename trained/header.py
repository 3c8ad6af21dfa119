"""What every file of a trained model says of it: our JSON, and the words for a file that is none of ours."""

from math import inf, isfinite
from pathlib import Path

from errors import InputError

HEADER = "custom-resnet"  # the key of our JSON among the strings that a safetensors, ONNX or pt2 file can carry
FORMAT = 1  # changes with what is in the header
MOST_SCALE = 1000  # of the logits, as in a recipe


def check_header(header: dict) -> None:
    """Raise an exception of any kind unless it is of this format, and what is made use of is there and makes sense."""
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, this version of the project reads {FORMAT}")
    classes, scale, accuracy = header["classes"], header["architecture"]["logit_scale"], header["last_accuracy"]
    mean, std = (header["normalization"][name] for name in ("mean", "std"))
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are no names")
    if not 2 <= len(classes) == len(set(classes)) == header["architecture"]["num_classes"]:
        raise ValueError("classes are not as many different names as the network's outputs")
    if not len(mean) == len(std) == 3 or not all(type(n) in (int, float) for n in [*mean, *std, scale, accuracy]):
        raise ValueError("mean, std, logit_scale or last_accuracy are no numbers")  # True and False would be some, too
    if not all(isfinite(n) for n in mean) or not all(0 < n < inf for n in std):
        raise ValueError("mean is not finite, or std not above 0")
    if not 0 < scale <= MOST_SCALE or not 0 <= accuracy <= 1:
        raise ValueError("logit_scale or last_accuracy is out of range")
    if not all(isinstance(header[name], str) for name in ("source", "valid")):
        raise ValueError("source or valid are no words")
    "".join([*classes, header["source"]]).encode()  # half a character cannot be shown


def foreign(path: str | Path, e: Exception) -> InputError:
    """The error that names the file, and what a reader said of it."""
    reason = f"{type(e).__name__} {e}".splitlines()[0]
    return InputError(f"{path}: not a {Path(path).suffix} file of this project ({reason[:80]})")
