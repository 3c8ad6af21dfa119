"""A trained network as a function of pixels, from any of its files. The safe one needs torch and safetensors alone."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from errors import InputError
from images import SIZE
from model import CustomResNet

if TYPE_CHECKING:
    from fastai.learner import Learner

HEADER = "custom-resnet"  # the key of our JSON among the strings that a safetensors, ONNX or pt2 file can carry
FORMAT = 1  # changes with what is in the header


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within this a GPU convolves fp32 in full, as a CPU does; torch's default is TF32, good to three digits."""
    cudnn = import_module("torch.backends.cudnn")  # spelled as usual, it could not go into an exported learner
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


class Classifier(nn.Module):
    """uint8 (N, 32, 32, 3), as a decoder makes them → logits (N, classes): a network and its normalisation.

    mean, std: of each channel in the range 0..1. Raises ValueError for another shape or type.
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        device = next(network.parameters()).device
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, device=device).view(3, 1, 1))

    def normalized(self, images: Tensor) -> Tensor:
        """What the network takes, float (N, 3, 32, 32)."""
        if tuple(images.shape[1:]) != (SIZE, SIZE, 3) or images.dtype != torch.uint8:
            raise ValueError(
                f"images are {tuple(images.shape)} {images.dtype}: they must be (N, {SIZE}, {SIZE}, 3) uint8"
            )
        return (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.normalized(images))


def classifier_of(learn: "Learner") -> Classifier:
    """The learner's network, in evaluation mode, with the normalisation of its loader; shares the weights."""
    normalize = learn.dls.valid.after_batch.normalize
    return Classifier(learn.model.eval(), *(t.flatten().tolist() for t in (normalize.mean, normalize.std)))


def grad_cam(classifier: Classifier, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Where uint8 (n, 32, 32, 3) `images` speak for `classes` (n,), as the last block sees it: (n, 32, 32), 0 to 1.

    Source: Selvaraju et al., "Grad-CAM" (2017), section 3.
    """
    network, device = classifier.network, classifier.mean.device
    x = classifier.normalized(torch.from_numpy(images).to(device))
    with torch.enable_grad():
        activations = network.body(x)
        scores = network.classify(activations).gather(1, torch.from_numpy(classes).to(device)[:, None])
        (gradients,) = torch.autograd.grad(scores.sum(), activations)
    maps = F.relu((gradients.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True)).detach()
    maps = F.interpolate(maps, size=x.shape[2:], mode="bilinear")[:, 0]
    return (maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu().numpy()


def load_safetensors(path: str | Path) -> tuple[Classifier, dict]:
    """The classifier on the CPU, in evaluation mode, and the header of a file that `export.save_safetensors` wrote.

    Nothing in the file is executed. Raises InputError where it is damaged, or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        with torch.device("meta"):  # takes no memory, whatever the header asks for; the weights are the file's own
            network = CustomResNet(**header["architecture"])
        types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        network.load_state_dict(tensors, assign=True)
        if types != {name: tensor.dtype for name, tensor in tensors.items()}:
            raise ValueError("weights of another type")
        _check_header(header)
        if len(header["classes"]) != header["architecture"]["num_classes"]:
            raise ValueError("classes are not as many as the network's outputs")
        mean, std = (header["normalization"][name] for name in ("mean", "std"))
        numbers = [header["architecture"]["logit_scale"], header["last_accuracy"], *mean, *std]
        if not all(isinstance(n, int | float) and isfinite(n) for n in numbers) or not len(mean) == len(std) == 3:
            raise ValueError("normalization, logit_scale or last_accuracy are no numbers")
        if not all(isinstance(header[name], str) for name in ("source", "valid")):
            raise ValueError("source or valid are no words")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from e
    except Exception as e:  # whatever a foreign file makes of the readers and the network
        raise _foreign(path, e) from e
    return Classifier(network, mean, std).eval(), header


def _check_header(header: dict) -> None:
    """Raise ValueError unless it is of this format and has classes."""
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, this version of the project reads {FORMAT}")
    classes = header["classes"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are no names")


def _foreign(path: str | Path, e: Exception) -> InputError:
    reason = f"{type(e).__name__} {e}".splitlines()[0]
    return InputError(f"{path}: not a {Path(path).suffix} file of this project ({reason[:80]})")


@dataclass(frozen=True)
class Model:
    """What there is to say of the network (`classes` at least), and its logits (n, classes) of uint8 (n, 32, 32, 3)."""

    header: dict
    logits: Callable[[np.ndarray], np.ndarray]

    @property
    def classes(self) -> list[str]:
        """Their names, in the order of the logits."""
        return self.header["classes"]

    def probabilities(self, images: np.ndarray, tta: bool = False) -> np.ndarray:
        """Float (n, classes) of uint8 (n, 32, 32, 3); with `tta` each image counts together with its mirror image."""
        logits = self.logits(images)
        if tta:
            logits = (logits + self.logits(np.ascontiguousarray(images[:, :, ::-1]))) / 2
        return F.softmax(torch.from_numpy(logits), 1).numpy()


def model_file(path: str | Path) -> Path:
    """The file itself, or the safe one in the folder of a run. Raises InputError where there is none."""
    path = Path(path).expanduser()
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        what = "not the folder of a run that has ended, no model.safetensors in it" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; pass a run folder, or a model's {', '.join(LOADERS)}")
    return file


def load_model(path: str | Path, device: str = "auto") -> Model:
    """The model in a file of any kind, or in the folder of a run.

    A `.pkl` runs what its author put in it, and so may a `.pt2`. ONNX and pt2 files run on the CPU. Raises InputError.
    """
    file = model_file(path)
    if file.suffix not in LOADERS:
        raise InputError(f"{file}: a model ends in {', '.join(LOADERS)}")
    return LOADERS[file.suffix](file, device)


def _of_torch(classifier: nn.Module, header: dict, device: torch.device) -> Model:
    classifier.to(device, memory_format=torch.channels_last)  # as the pixels lie

    @torch.inference_mode()
    @without_tf32()
    def logits(images: np.ndarray) -> np.ndarray:
        return classifier(torch.from_numpy(images).to(device)).cpu().numpy()

    return Model(header, logits)


def _load_safe(path: Path, device: str) -> Model:
    from options import get_device

    on = get_device(device)
    classifier, header = load_safetensors(path)
    return _of_torch(classifier, header, on)


def _load_pkl(path: Path, device: str) -> Model:
    import warnings

    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # fastai's import
    warnings.filterwarnings("ignore", message="load_learner` uses Python's insecure pickle")  # the README says so
    from fastai.learner import load_learner

    from options import get_device

    on = get_device(device)
    try:
        learn = load_learner(path)
        return _of_torch(classifier_of(learn), {"classes": [str(name) for name in learn.dls.vocab]}, on)
    except Exception as e:  # a pickle can raise anything
        raise _foreign(path, e) from e


def _load_onnx(path: Path, device: str) -> Model:
    _cpu_only(path, device)
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path}: reading it takes a package more: pip install onnxruntime") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        header = json.loads(session.get_modelmeta().custom_metadata_map[HEADER])
        _check_header(header)
    except Exception as e:
        raise _foreign(path, e) from e
    return Model(header, lambda images: session.run(None, {"images": images})[0])


def _load_pt2(path: Path, device: str) -> Model:
    _cpu_only(path, device)
    extra = {HEADER: ""}
    try:
        classifier = torch.export.load(path, extra_files=extra).module()
        header = json.loads(extra[HEADER])
        _check_header(header)
    except Exception as e:
        raise _foreign(path, e) from e
    return _of_torch(classifier, header, torch.device("cpu"))


def _cpu_only(path: Path, device: str) -> None:
    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: a {path.suffix} file runs on the CPU; pass the run's model.safetensors")


LOADERS = {".safetensors": _load_safe, ".pkl": _load_pkl, ".onnx": _load_onnx, ".pt2": _load_pt2}
