"""model.onnx, for onnxruntime and whatever else reads ONNX. Writing and reading it takes optional packages."""

import json
from importlib.util import find_spec
from pathlib import Path

import torch

from errors import InputError
from files import complete
from trained.classifier import Classifier, example_images
from trained.header import HEADER, check_header, foreign
from trained.predictor import Model, cpu_only


def save_onnx(classifier: Classifier, header: dict, path: Path) -> None:
    """Write the classifier as ONNX to `path`, complete or not at all: `images`, uint8 (n, 32, 32, 3) → `logits`.

    header: travels in its metadata, as JSON.
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
    """The model in the file. Raises InputError."""
    cpu_only(path, device)
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path}: reading it takes a package more: pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        header = json.loads(session.get_modelmeta().custom_metadata_map[HEADER])
        check_header(header)
    except Exception as e:
        raise foreign(path, e) from e
    return Model(header, lambda images: session.run(None, {"images": images})[0])
