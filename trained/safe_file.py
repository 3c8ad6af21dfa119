"""model.safetensors: weights as data, and a JSON header. Reading it runs no code from it, and needs no fastai."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save

from errors import InputError
from files import complete
from model import CustomResNet
from trained.classifier import Classifier
from trained.device import get_device
from trained.header import FORMAT, HEADER, check_header, foreign
from trained.predictor import Model

if TYPE_CHECKING:
    from fastai.learner import Learner


def save_safetensors(learn: "Learner", path: Path, result: dict) -> None:
    """Write the weights and a JSON header to `path`, complete or not at all.

    result: the content of `result.json`, from which the header takes architecture, classes, data and accuracies.
    """
    mean, std = learn.dls.train_ds.items.train_stats()
    header = {
        "format": FORMAT,
        "architecture": {"num_classes": len(result["classes"])}
        | {name: result[name] for name in ("width", "norm", "logit_scale")},
        "normalization": {"mean": mean, "std": std},  # of RGB in the range 0..1
        **{name: result[name] for name in ("classes", "source", "fingerprint", "recipe", "epochs", "seed", "valid")},
        **{name: result[name] for name in ("flip", "last_accuracy", "tta_accuracy", "versions")},
    }
    _write(learn.model.state_dict(), header, path)


def save_half(classifier: Classifier, header: dict, path: Path) -> None:
    """Write the classifier and its header to `path` with fp16 weights, in half the size.

    Raises InputError for weights too large for fp16.
    """
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in classifier.network.state_dict().items()}
    if not all(t.isfinite().all() for t in tensors.values()):
        raise InputError("--to half: weights of this network are too large for 16 bits; leave it as it is")
    _write(tensors, header, path)


def _write(tensors: dict[str, torch.Tensor], header: dict, path: Path) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with complete(path) as beside:
        beside.write_bytes(save(tensors, {HEADER: json.dumps(header)}))  # several keys would come in a random order


def load_safetensors(path: str | Path) -> tuple[Classifier, dict]:
    """The classifier on the CPU, in evaluation mode, and the header of a file that `save_safetensors` wrote.

    No code in the file is run. Raises InputError if it is damaged, or not ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        tensors = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}  # of `save_half`
        with torch.device("meta"):  # allocates nothing, whatever the header asks for; the weights are the file's
            network = CustomResNet(**header["architecture"])
        types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        network.load_state_dict(tensors, assign=True)
        if types != {name: tensor.dtype for name, tensor in tensors.items()}:
            raise ValueError("weights of another type")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("weights are not finite")
        if any(tensor.min() < 0 for name, tensor in tensors.items() if name.endswith("running_var")):
            raise ValueError("a variance is below 0")
        check_header(header)
        mean, std = (header["normalization"][name] for name in ("mean", "std"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from e
    except Exception as e:  # a foreign file can make the readers and the network raise anything
        raise foreign(path, e) from e
    return Classifier(network, mean, std).eval(), header


def load(path: Path, device: str) -> Model:
    """The model in the file, on the device of that name. Raises InputError if either cannot be used."""
    on = get_device(device)
    classifier, header = load_safetensors(path)
    return Model.of_torch(classifier, header, on)
