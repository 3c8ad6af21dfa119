"""model.pt2, torch's exported program."""

import json
from pathlib import Path

import torch

from files import complete
from trained.classifier import Classifier, example_images
from trained.header import HEADER, check_header, foreign
from trained.predictor import Model, cpu_only


def save_pt2(classifier: Classifier, header: dict, path: Path) -> None:
    """Write the classifier as torch's exported program to `path`, complete or not at all; arguments as above."""
    program = torch.export.export(classifier, (example_images(),), dynamic_shapes=({0: torch.export.Dim("n")},))
    with complete(path) as beside:
        torch.export.save(program, beside, extra_files={HEADER: json.dumps(header)})


def load(path: Path, device: str) -> Model:
    """The model in the file, which may run what its author put in it. Raises InputError."""
    cpu_only(path, device)
    extra = {HEADER: ""}
    try:
        classifier = torch.export.load(path, extra_files=extra).module()
        header = json.loads(extra[HEADER])
        check_header(header)
    except Exception as e:
        raise foreign(path, e) from e
    return Model.of_torch(classifier, header, torch.device("cpu"))
