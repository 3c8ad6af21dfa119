"""A web page on which the trained model classifies a picture and shows where in it the answer comes from.

    python app.py [RUN]                the page, on http://127.0.0.1:7860
    python app.py --space DIR [RUN]    a folder that is ready to be a Space of the Hugging Face Hub

RUN is the folder of a run, or a model.safetensors; without it, the model that comes with this project is used. Needs
the packages in requirements-app.txt.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from errors import InputError, Stopped, parse, run_command


@dataclass(frozen=True)
class Options:
    """Show a web page on which a trained model classifies pictures."""

    model: str = None  # Folder of a run, or a model.safetensors [the model that comes with this file]
    space: str = None  # Write a folder for a Space of the Hugging Face Hub, and stop
    host: str = None  # Address to listen at; 0.0.0.0 lets others in [GRADIO_SERVER_NAME, or 127.0.0.1]
    port: int = None  # Port to listen at [the first free one from 7860 on]


if __name__ == "__main__":
    OPTIONS = parse(Options, pos=["model"])

import json
import os
import shlex
import shutil
import socket
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from images.decoding import FORMATS, MAX_PIXELS, read_image
from interrupts import Interrupted, stops_taken
from names import markdown, printable
from trained.classifier import Classifier, grad_cam
from trained.loading import model_file
from trained.predictor import Model
from trained.safe_file import load_safetensors

if TYPE_CHECKING:
    import gradio

MAX_UPLOAD = 10 * 2**20  # bytes in one request
LOCAL = ("127.0.0.1", "localhost")
TOP = 5
SIDE = 320  # pixels of the picture with the heat map
UNREADABLE = f"This cannot be read as a picture: it must be one of {', '.join(FORMATS)}, of at most {MAX_PIXELS // 10**6} megapixels."
CSS = "#picture img {width: 100%; height: 100%; object-fit: contain}"  # enlarges small pictures
FILES = (
    "app.py", "errors.py", "files.py", "interrupts.py", "model.py", "names.py", "startup.py", "images/__init__.py", "images/decoding.py", "trained/__init__.py",
    *(f"trained/{name}.py" for name in ("classifier", "device", "header", "loading", "predictor", "safe_file")),
)  # fmt: skip


def heat_map(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 (32, 32, 3) in grey under the (32, 32) map of `grad_cam` → uint8 (SIDE, SIDE, 3)."""
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST))
    heat = np.asarray(Image.fromarray(heat).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return (0.45 * grey[..., None] + 0.55 * 255 * colormaps["inferno"](heat)[..., :3]).astype(np.uint8)


def look(classifier: Classifier, model: Model, path: Path) -> tuple[dict[str, float], np.ndarray, str]:
    """The probability of each class, the picture under its heat map, and how long it took.

    Raises InputError or OSError if the file is not a readable image.
    """
    times = [perf_counter()]
    pixels = np.stack([read_image(path, lambda name: None)])
    times.append(perf_counter())
    probabilities = model.probabilities(pixels)[0]
    times.append(perf_counter())
    heat = grad_cam(classifier, pixels, probabilities.argmax(keepdims=True))
    picture = heat_map(pixels[0], heat[0])
    times.append(perf_counter())
    read, saw, drew = 1000 * np.diff(times)
    took = f"{read:.0f} ms to read the picture, {saw:.1f} ms to classify it, {drew:.0f} ms for the map (Grad-CAM)"
    return dict(zip(model.classes, probabilities.tolist(), strict=True)), picture, took


def about(header: dict) -> str:
    """A paragraph about what the network was trained on, and how it answers about anything else."""
    classes, kind = header["classes"], "held-out" if header["valid"] == "holdout" else "test"
    names = ", ".join(map(markdown, classes[:20])) + (" …" if len(classes) > 20 else "")
    return (
        f"It was trained on {len(classes)} classes, on pictures of 32x32 pixels: {names}. **Of anything else it knows "
        f"nothing, and still answers with one of them, sure of itself at times.** "
        f"On the {kind} images of {markdown(header['source'])} it is right {100 * header['last_accuracy']:.2f}\u00a0% "
        f"of the time."
    )


def examples_of(file: Path) -> list[Path]:
    """The pictures in the folder `examples` beside a model file. No links, which could lead to private files."""
    folder = file.parent / "examples"
    found = [] if folder.is_symlink() else folder.glob("*.png")
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


class Limited:
    """ASGI middleware that refuses requests of more than `MAX_UPLOAD` bytes, as gradio's own limit is for each file."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        headers = dict(scope.get("headers", ()))
        if int(headers.get(b"content-length", 0)) > MAX_UPLOAD or b"transfer-encoding" in headers:  # of unknown length
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body", "body": b"too large"})
        else:
            await self.app(scope, receive, send)


def page(file: Path) -> "gradio.Blocks":
    """The page for a model.safetensors, with the examples in the folder `examples` beside it."""
    import gradio as gr
    from gradio.utils import get_upload_folder

    classifier, header = load_safetensors(file)
    model, grey = Model.of_torch(classifier, header, torch.device("cpu")), np.full((1, 32, 32, 3), 128, np.uint8)
    grad_cam(classifier, grey, model.probabilities(grey).argmax(1))  # warm-up: the first time takes 0.1 s longer

    uploads = Path(get_upload_folder()).resolve()

    def shown(upload):
        if upload is None:
            return None, None, ""
        try:
            path = Path(upload["path"] or "").resolve()
            if not path.is_relative_to(uploads):  # gradio looks only at a path that is marked as one, `meta`
                raise InputError(f"{path}: was not uploaded")
            return look(classifier, model, path)
        except (InputError, OSError, ValueError) as e:  # its own message would show a path of the server
            raise gr.Error(UNREADABLE, print_exception=False) from e

    with gr.Blocks(title="Custom ResNet", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:  # seconds
        gr.Markdown(f"# What is in the picture?\n\n{about(header)}", latex_delimiters=[])  # names may contain $
        with gr.Row():
            with gr.Column(min_width=240):
                gr.Markdown("### Drop, paste or take a picture")
                picture = gr.Image(
                    show_label=False, height=SIDE, elem_id="picture", sources=["upload", "clipboard", "webcam"]
                )
            with gr.Column(min_width=240):
                gr.Markdown("### Prediction")
                label = gr.Label(show_label=False, num_top_classes=TOP, elem_id="answer")
            with gr.Column(min_width=240):
                gr.Markdown("### Where the answer comes from")
                seen = gr.Image(show_label=False, height=SIDE, interactive=False, format="png", buttons=[])
        took = gr.Markdown(elem_id="took")
        # Without gradio's preprocessing, whose error for a file that is no picture prints a traceback.
        picture.change(shown, picture, [label, seen, took], api_name="predict", preprocess=False)
        if examples := examples_of(file):
            gr.Examples(
                list(map(str, examples)), picture, label="Examples: images it was not trained on", examples_per_page=12
            )
    return blocks


def own_model() -> Path:
    """The model that comes with this file: in a Space, beside it; in the project, in the folder `pretrained`."""
    here = Path(__file__).parent
    return here / ("model.safetensors" if (here / "model.safetensors").exists() else "pretrained")


def write_space(model: Path, folder: Path) -> None:
    """Write to `folder`, new or empty, all that a Space needs to show the page. Raises InputError if it cannot."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--space {folder}: it is there already; name a new or an empty folder")
    _, header = load_safetensors(model)
    settings = {
        "title": f"Custom ResNet on {header['source']}", "sdk": "gradio", "sdk_version": version("gradio"),
        "python_version": "3.11", "app_file": "app.py", "license": "apache-2.0",
    }  # fmt: skip
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items())
    here, beside = Path(__file__).parent, folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        for name in FILES:
            (beside / name).parent.mkdir(exist_ok=True)
            shutil.copy(here / name, beside / name)
        shutil.copy(here / "requirements-app.txt", beside / "requirements.txt")
        shutil.copy(model, beside / "model.safetensors")
        (beside / "examples").mkdir()
        for example in examples_of(model):
            shutil.copy(example, beside / "examples", follow_symlinks=False)
        text = f"---\n{lines}\n---\n\n# What is in the picture?\n\n{about(header)}\n"
        (beside / "README.md").write_text(text, encoding="utf-8")
        beside.replace(folder)
    except OSError as e:
        raise InputError(f"--space {folder}: cannot be written ({e.strerror}); name another folder") from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def main(options: Options) -> None:
    """The command."""
    if find_spec("gradio") is None:
        raise InputError("gradio is not installed; pip install -r requirements-app.txt")
    file = model_file(options.model or own_model(), [".safetensors"])
    if options.space:
        write_space(file, Path(os.path.expanduser(options.space)).resolve())
        space = printable(shlex.quote(options.space))
        print(f"see          {space}\npublish      hf upload USER/NAME {space} --repo-type space")
        return

    def stop(number: int):
        asked = Interrupted(number)
        raise Stopped(str(asked), asked.code)  # gradio would catch `asked`, a KeyboardInterrupt, and exit with 0

    uploads = TemporaryDirectory(prefix="custom-resnet-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    with stops_taken(stop), uploads as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        show(page(file), options.host, options.port)


def show(blocks: "gradio.Blocks", host: str | None, port: int | None) -> None:
    """Show the page until it is stopped. Raises InputError if it cannot listen at that address."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    around = [Middleware(Limited)]
    if (host or os.environ.get("GRADIO_SERVER_NAME", LOCAL[0])) in LOCAL:  # against DNS rebinding by other pages
        around.append(Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL))
    try:
        family = socket.AF_INET6 if ":" in (host or "") else socket.AF_INET
        # Fails at once, where gradio would try 100 ports for five seconds each.
        socket.create_server((host or LOCAL[0], port or 0), family=family).close()
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, max_file_size=MAX_UPLOAD, ssr_mode=False,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no fonts from Google
            css=CSS, footer_links=["api", "gradio"], show_error=True, quiet=True, prevent_thread_lock=True,
            app_kwargs={"middleware": around},
        )  # fmt: skip
    except (OSError, OverflowError) as e:
        given = {"--host": host, "--port": port}
        where = " ".join(f"{option} {value}" for option, value in given.items() if value is not None)
        raise InputError(f"{where or 'no free port'}: cannot listen there ({e}); pass others") from e
    print(f"see          {url}")
    blocks.block_thread()


if __name__ == "__main__":
    run_command(main, OPTIONS)
