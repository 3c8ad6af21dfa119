"""model.pt2, torch's exported program."""

import json
from pathlib import Path

import torch

from files import complete
from trained.classifier import Classifier, example_images
from trained.header import HEADER, check_header, foreign
from trained.predictor import Model, cpu_only


def save_pt2(classifier: Classifier, header: dict, path: Path) -> None:
    """Write the classifier as torch's exported program to `path`, complete or not at all.

    It takes uint8 (n, 32, 32, 3) and returns logits. header: goes into the file, as JSON.
    """
    program = torch.export.export(classifier, (example_images(),), dynamic_shapes=({0: torch.export.Dim("n")},))
    with complete(path) as beside:
        torch.export.save(program, beside, extra_files={HEADER: json.dumps(header)})


def load(path: Path, device: str) -> Model:
    """The model in the file; loading it can run code in it. Raises InputError if it is not ours."""
    cpu_only(path, device)
    extra = {HEADER: ""}
    try:
        classifier = torch.export.load(path, extra_files=extra).module()
        header = json.loads(extra[HEADER])
        check_header(header)
    except Exception as e:
        raise foreign(path, e) from e
    return Model.of_torch(classifier, header, torch.device("cpu"))
