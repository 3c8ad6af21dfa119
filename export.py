"""The trained model's files: what a run leaves behind, and what can be made of that.

    python export.py RUN --to onnx              RUN/model.onnx, for onnxruntime and whatever else reads ONNX
    python export.py RUN --to pt2               RUN/model.pt2, for `torch.export.load`
    python export.py RUN --push USER/NAME       the folder, with its model card, to the Hugging Face Hub

RUN is the folder of a run that has ended. Both files take pixels as they come out of a decoder, uint8 (N, 32, 32, 3).
"""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from errors import InputError, run_command
from files import complete

if TYPE_CHECKING:
    from fastai.learner import Learner

    from classifier import Classifier


def carry_our_code() -> None:
    """Let every later `learn.export()` of this process put our classes into the file, instead of their module's name.

    They are stored as bytecode, so that the file wants the minor version of Python that wrote it.
    """
    import cloudpickle

    import callbacks
    import classifier
    import data
    import images
    import model
    import precision

    for module in (callbacks, classifier, data, images, model, precision):
        cloudpickle.register_pickle_by_value(module)


def export(learn: "Learner", path: Path) -> None:
    """`learn.export` to `path`, complete or not at all. The file holds no images, no optimiser and no augmentation."""

    carry_our_code()
    home = learn.path
    try:
        learn.path = Path(".")  # the folder's name on this machine is nobody's business
        with complete(path.absolute()) as beside:
            learn.export(beside)
    finally:
        learn.path = home


def save_safetensors(learn: "Learner", path: Path, result: dict) -> None:
    """Write the weights and a JSON header to `path`, complete or not at all.

    result: what `result.json` holds. From it come the network's arguments, the classes, the data and the accuracies.
    """
    from safetensors.torch import save

    from classifier import FORMAT, HEADER

    mean, std = learn.dls.train_ds.items.train_stats()
    header = {
        "format": FORMAT,
        "architecture": {"num_classes": len(result["classes"])}
        | {name: result[name] for name in ("width", "norm", "logit_scale")},
        "normalization": {"mean": mean, "std": std},  # of RGB in the range 0..1
        **{name: result[name] for name in ("classes", "source", "fingerprint", "recipe", "epochs", "seed", "valid")},
        **{name: result[name] for name in ("flip", "last_accuracy", "tta_accuracy", "versions")},
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in learn.model.state_dict().items()}
    with complete(path) as beside:
        beside.write_bytes(save(tensors, {"format": "pt", HEADER: json.dumps(header)}))


def save_onnx(classifier: "Classifier", header: dict, path: Path) -> None:
    """Write the classifier as ONNX to `path`, complete or not at all: `images`, uint8 (n, 32, 32, 3) → `logits`.

    header: travels in its metadata, as JSON.
    """
    import torch

    from classifier import HEADER

    if missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]:
        raise InputError(f"--to onnx: {missing[0]} is not installed; pip install -r requirements-onnx.txt")
    program = torch.onnx.export(
        classifier, (_example(),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    program.model.metadata_props[HEADER] = json.dumps(header)
    with complete(path) as beside:
        program.save(beside, external_data=False)


def save_pt2(classifier: "Classifier", header: dict, path: Path) -> None:
    """Write the classifier as torch's exported program to `path`, complete or not at all; arguments as above."""
    import torch

    from classifier import HEADER

    program = torch.export.export(classifier, (_example(),), dynamic_shapes=({0: torch.export.Dim("n")},))
    with complete(path) as beside:
        torch.export.save(program, beside, extra_files={HEADER: json.dumps(header)})


def send(run: Path, repo: str, private: bool = False) -> str:
    """Send what is in `run`, but for hidden files and logs, to `repo` on the Hugging Face Hub; returns its address.

    Raises InputError where the run has no model card, or the Hub cannot be reached or will not take it.
    """
    if not (run / "result.json").is_file():  # whatever else lies in a folder is not for all to see
        raise InputError(f"--push: {run} is not the folder of a run that has ended, no result.json in it")
    if not (run / "README.md").is_file():
        raise InputError(f"--push: {run} has no model card; python report.py {run} writes it")
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise InputError("--push: huggingface_hub is not installed; pip install huggingface_hub") from None
    if get_token() is None:
        raise InputError(
            "--push: there is no token for the Hugging Face Hub; log in with hf auth login, or set HF_TOKEN"
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        ignored = [".*", "*/.*", "tensorboard/*", "wandb/*"]
        api.upload_folder(repo_id=repo, folder_path=run, ignore_patterns=ignored, commit_message=f"Add {run.name}")
    except Exception as e:  # no network, no right, a wrong name: each is of another type, and they change
        raise InputError(f"--push {repo}: the Hub does not take it ({type(e).__name__}: {e})") from e
    return f"{api.endpoint}/{repo}"


def _example():
    import torch

    return torch.zeros(2, 32, 32, 3, dtype=torch.uint8)  # of one, torch would take the one for a constant


WRITERS: dict[str, Callable] = {"onnx": save_onnx, "pt2": save_pt2}


def main(
    run: str,  # Folder of a run that has ended
    to: Annotated[str, {"choices": list(WRITERS)}] = None,  # Write RUN/model.onnx or RUN/model.pt2
    push: str = None,  # Send the folder to USER/NAME on the Hugging Face Hub, for all to see
    private: bool = False,  # With --push: for yourself alone, if there is no such repository yet
):
    """Make another file of a trained model, or publish it."""
    if not to and not push:
        raise InputError(f"nothing to do; pass --to {' or --to '.join(WRITERS)}, or --push USER/NAME")
    if private and not push:
        raise InputError("--private goes with --push; drop it, or pass both")
    from classifier import load_safetensors, model_file

    file = model_file(run)
    if to:
        path = file.with_suffix(f".{to}")
        WRITERS[to](*load_safetensors(file), path)
        print(f"see          {path}, {path.stat().st_size / 1e6:.1f} MB")
    if push:
        print(f"see          {send(Path(run), push, private)}")


if __name__ == "__main__":
    run_command(main)
