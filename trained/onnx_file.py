"""model.onnx, for onnxruntime and anything else that reads ONNX. Writing and reading it needs optional packages."""

import json
from importlib.util import find_spec
from pathlib import Path
from threading import Timer

import numpy as np
import torch

from errors import InputError
from files import complete
from trained.classifier import Classifier, example_images
from trained.header import HEADER, check_header, foreign
from trained.predictor import Model, cpu_only

INTERFACE = ("images", "tensor(uint8)", [32, 32, 3], "tensor(float)")  # our input's name, type, shape; output's type
SECONDS = 120  # for a batch; ours takes one second on two cores, and an untrusted graph may never end
NO_LOG = 4  # onnxruntime logs only what is fatal, as we report errors ourselves


def save_onnx(classifier: Classifier, header: dict, path: Path) -> None:
    """Write the classifier as ONNX to `path`, complete or not at all: `images`, uint8 (n, 32, 32, 3) → `logits`.

    header: goes into its metadata, as JSON. Raises InputError if a package is missing.
    """
    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise InputError(f"--to onnx: {missing[0]} is not installed; pip install -r requirements-onnx.txt")
    program = torch.onnx.export(
        classifier, (example_images(),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    program.model.metadata_props[HEADER] = json.dumps(header)
    with complete(path) as beside:
        program.save(beside, external_data=False)


def load(path: Path, device: str) -> Model:
    """The model in the file. Raises InputError if it is not ours, onnxruntime is missing, or `device` not the CPU."""
    cpu_only(path, device)
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path}: onnxruntime is not installed; pip install onnxruntime") from None
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = NO_LOG
    try:
        session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])
        header = json.loads(session.get_modelmeta().custom_metadata_map[HEADER])
        check_header(header)
        (taken,), (given,) = session.get_inputs(), session.get_outputs()
        if (taken.name, taken.type, taken.shape[1:], given.type) != INTERFACE or isinstance(taken.shape[0], int):
            raise ValueError("it does not make floats of images, uint8 (n, 32, 32, 3)")
    except Exception as e:
        raise foreign(path, e) from e

    def logits(images: np.ndarray) -> np.ndarray:
        options = onnxruntime.RunOptions()
        options.log_severity_level = NO_LOG
        stop = Timer(SECONDS, setattr, (options, "terminate", True))  # onnxruntime checks it before every operation
        stop.start()
        try:
            return session.run(None, {"images": images}, options)[0]
        except Exception as e:  # a foreign graph can fail in any way
            raise foreign(path, TimeoutError(f"no answer in {SECONDS} s") if options.terminate else e) from e
        finally:
            stop.cancel()

    return Model(header, logits)
