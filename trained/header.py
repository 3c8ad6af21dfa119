"""The JSON header of a safetensors, ONNX or pt2 file, its checks, and the error for a file that is not ours."""

from math import inf, isfinite
from pathlib import Path

from errors import InputError

HEADER = "custom-resnet"  # the key of our JSON in the metadata of a safetensors, ONNX or pt2 file
FORMAT = 1  # changes with the content of the header
MOST_SCALE = 1000  # for the logits, as in a recipe


def check_header(header: dict) -> None:
    """Raise an exception of any kind unless the format is known, and all that is used is there and makes sense."""
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, this version of the project reads {FORMAT}")
    classes, scale, accuracy = header["classes"], header["architecture"]["logit_scale"], header["last_accuracy"]
    mean, std = (header["normalization"][name] for name in ("mean", "std"))
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are no names")
    if not 2 <= len(classes) == len(set(classes)) == header["architecture"]["num_classes"]:
        raise ValueError("classes are not as many different names as the network's outputs")
    if not len(mean) == len(std) == 3 or not all(type(n) in (int, float) for n in [*mean, *std, scale, accuracy]):
        raise ValueError("mean, std, logit_scale or last_accuracy are no numbers")  # isinstance would take True
    if not all(isfinite(n) for n in mean) or not all(0 < n < inf for n in std):
        raise ValueError("mean is not finite, or std not above 0")
    if not 0 < scale <= MOST_SCALE or not 0 <= accuracy <= 1:
        raise ValueError("logit_scale or last_accuracy is out of range")
    if not all(isinstance(header[name], str) for name in ("source", "valid")):
        raise ValueError("source or valid are no words")
    "".join([*classes, header["source"]]).encode()  # raises for a lone surrogate, which cannot be shown


def foreign(path: str | Path, e: Exception) -> InputError:
    """The error for a file that its reader rejected with `e`."""
    reason = f"{type(e).__name__} {e}".splitlines()[0]
    return InputError(f"{path}: not a {Path(path).suffix} file of this project ({reason[:80]})")
