"""Make another file of a trained model, or publish it.

    python export.py RUN --to onnx              RUN/model.onnx, for onnxruntime and anything else that reads ONNX
    python export.py RUN --to pt2               RUN/model.pt2, for `torch.export.load`
    python export.py RUN --to half              RUN/model.half.safetensors, with fp16 weights
    python export.py RUN --push USER/NAME       the folder, with its model card, to the Hugging Face Hub

RUN is the folder of a run that has finished. ONNX and pt2 models take decoded pixels, uint8 (N, 32, 32, 3).
"""

from dataclasses import dataclass
from typing import Annotated

from errors import InputError, parse, run_command


@dataclass(frozen=True)
class Options:
    """Make another file of a trained model, or publish it."""

    run: str  # Folder of a run that has finished
    to: Annotated[str, {"choices": ["onnx", "pt2", "half"]}] = None  # Write RUN/model.onnx, .pt2 or .half.safetensors
    push: str = None  # Send the folder to USER/NAME on the Hugging Face Hub, for all to see
    private: bool = False  # With --push: make the repository private, if it does not exist yet

    def __post_init__(self):
        if not self.to and not self.push:
            raise InputError("nothing to do; pass --to onnx, pt2 or half, or --push USER/NAME")
        if self.private and not self.push:
            raise InputError("--private goes with --push; drop it, or pass both")


if __name__ == "__main__":
    OPTIONS = parse(Options)

import sys
from collections.abc import Callable
from pathlib import Path

from names import printable
from reporting.card import CAPTIONS
from trained.loading import model_file
from trained.onnx_file import save_onnx
from trained.pt2_file import save_pt2
from trained.safe_file import load_safetensors, save_half

PUBLIC = [
    "README.md", "config.json", "history.csv", "result.json", "lr_find.csv", "lr_find.json", "examples/[0-9][0-9].png",
    *(f"{picture}.{suffix}" for picture in CAPTIONS for suffix in ("png", "svg")),
    *(f"model.{suffix}" for suffix in ("safetensors", "half.safetensors", "pkl", "onnx", "pt2")), "models/last.pth", "models/best.pth",
]  # fmt: skip
WRITERS: dict[str, Callable] = {"onnx": save_onnx, "pt2": save_pt2, "half.safetensors": save_half}  # by suffix


def send(run: Path, repo: str, private: bool = False) -> str:
    """Send the public files of `run` to `repo` on the Hugging Face Hub; returns its address.

    The card that is sent names `repo`. Raises InputError if `run` has no result or no model card, huggingface_hub or a
    token is missing, or the Hub cannot be reached or rejects it.
    """
    if not (run / "result.json").is_file():  # do not publish another kind of folder
        raise InputError(f"--push: {run} is not the folder of a run that has finished, no result.json in it")
    if not (run / "README.md").is_file():
        raise InputError(f"--push: {run} has no model card; python report.py {run} writes it")
    try:
        from huggingface_hub import CommitOperationAdd, HfApi, get_token
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise InputError("--push: huggingface_hub is not installed; pip install huggingface_hub") from None
    if get_token() is None:
        raise InputError(
            "--push: there is no token for the Hugging Face Hub; log in with hf auth login, or set HF_TOKEN"
        )
    if not sys.stderr.isatty():
        disable_progress_bars()
    card = (run / "README.md").read_text(encoding="utf-8").replace('"USER/NAME"', f'"{repo}"').encode()
    paths = {path.relative_to(run).as_posix(): path for pattern in PUBLIC for path in run.glob(pattern)}
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, path) for name, path in (paths | {"README.md": card}).items()]
        api.create_commit(repo, files, commit_message=f"Add {run.name}")
    except Exception as e:  # no network, no permission, a wrong name: the types are many, and change
        raise InputError(f"--push {repo}: the Hub does not take it ({type(e).__name__}: {e})") from e
    return f"{api.endpoint}/{repo}"


def main(options: Options) -> None:
    """The command."""
    file = model_file(options.run, [".safetensors"])
    if options.to:
        suffix = "half.safetensors" if options.to == "half" else options.to
        path = file.with_suffix(f".{suffix}")
        WRITERS[suffix](*load_safetensors(file), path)
        print(f"see          {printable(str(path))}, {path.stat().st_size / 1e6:.1f} MB")
    if options.push:
        print(f"see          {send(Path(options.run), options.push, options.private)}")


if __name__ == "__main__":
    run_command(main, OPTIONS)
