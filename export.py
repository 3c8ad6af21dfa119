"""The trained model's files: fastai's `.pkl`, which carries this project's code, and safetensors, which holds none."""

import json
from math import isfinite
from pathlib import Path

import cloudpickle
import torch
from fastai.learner import Learner
from safetensors import safe_open
from safetensors.torch import save

import callbacks
import data
import images
import model
from errors import InputError
from model import CustomResNet
from run import complete

HEADER = "custom-resnet"  # the key of our JSON among the strings that a safetensors file can carry
FORMAT = 1  # changes with what is in the header


def carry_our_code() -> None:
    """Let every later `learn.export()` of this process put our classes into the file, instead of their module's name.

    They are stored as bytecode, so that the file wants the minor version of Python that wrote it.
    """
    for module in (callbacks, data, images, model):
        cloudpickle.register_pickle_by_value(module)


def export(learn: Learner, path: Path) -> None:
    """`learn.export` to `path`, complete or not at all. The file holds no images, no optimiser and no augmentation."""
    carry_our_code()
    home = learn.path
    try:
        learn.path = Path(".")  # the folder's name on this machine is nobody's business
        with complete(path.absolute()) as beside:
            learn.export(beside)
    finally:
        learn.path = home


def save_safetensors(learn: Learner, path: Path, result: dict) -> None:
    """Write the weights and a JSON header to `path`, complete or not at all.

    result: what `result.json` holds. From it come the network's arguments, the classes, the data and the accuracies.
    """
    mean, std = learn.dls.train_ds.items.train_stats()
    header = {
        "format": FORMAT,
        "architecture": {"num_classes": len(result["classes"])}
        | {name: result[name] for name in ("width", "norm", "logit_scale")},
        "normalization": {"mean": mean, "std": std},  # of RGB in the range 0..1
        **{name: result[name] for name in ("classes", "source", "fingerprint", "recipe", "epochs", "seed", "valid")},
        **{name: result[name] for name in ("last_accuracy", "tta_accuracy", "versions")},
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in learn.model.state_dict().items()}
    with complete(path) as beside:
        beside.write_bytes(save(tensors, {"format": "pt", HEADER: json.dumps(header)}))


def load_safetensors(path: str | Path) -> tuple[CustomResNet, dict]:
    """The network on the CPU, in evaluation mode, and the header of a file that `save_safetensors` wrote.

    Nothing in the file is executed. Raises InputError where it is damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this version of the project reads {FORMAT}")
        with torch.device("meta"):  # takes no memory, whatever the header asks for; the weights are the file's own
            network = CustomResNet(**header["architecture"])
        types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        network.load_state_dict(tensors, assign=True)
        if types != {name: tensor.dtype for name, tensor in tensors.items()}:
            raise ValueError("weights of another type")
        _check_header(header)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from e
    except Exception as e:  # whatever a foreign file makes of the readers and the network
        reason = f"{type(e).__name__} {e}".splitlines()
        raise InputError(f"{path}: not a model.safetensors of this project ({reason[0][:80]})") from e
    return network.eval(), header


def _check_header(header: dict) -> None:
    """Raise ValueError unless the numbers and names that go with the network are such."""
    classes, (mean, std) = header["classes"], (header["normalization"][name] for name in ("mean", "std"))
    numbers = [header["architecture"]["logit_scale"], *mean, *std]
    if not all(isinstance(n, int | float) and isfinite(n) for n in numbers) or not len(mean) == len(std) == 3:
        raise ValueError("normalization or logit_scale are no numbers")
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not names or len(classes) != header["architecture"]["num_classes"]:
        raise ValueError("classes are not as many names as the network has outputs")
