"""Make `pretrained/`, the model that this project comes with, from a run.

    python results/pretrained.py runs/001-fast

Its weights are rounded to fp16. Its pictures are those of the run that show no image of the data, which is not ours to
license.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from figures import result_of

from errors import parse
from files import write_json
from options import read_config
from reporting.card import write_card
from trained.loading import model_file
from trained.safe_file import load_safetensors, save_half

NOTE = "The weights in `model.safetensors` are rounded to fp16; the figures were measured before that."
PICTURES = ("accuracy", "loss", "schedule", "confusion", "classes", "reliability")


def main(
    run: str,  # Folder of a run that has finished
    out: str = "pretrained",  # Folder to make
):
    """Make pretrained/ from a run."""
    run, out = Path(run), Path(out)
    file, result = model_file(run, [".safetensors"]), result_of(run)
    _, options = read_config(run)
    out.mkdir(exist_ok=True)
    save_half(*load_safetensors(file), out / "model.safetensors")
    write_json(out / "result.json", result)
    for name in PICTURES:
        shutil.copy(run / f"{name}.png", out)
    write_card(out, options, result, NOTE)


if __name__ == "__main__":
    parse(main)
