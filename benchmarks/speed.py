"""Measure the loaders, the training steps, the start, the model files and their memory, and print tables.

    python benchmarks/speed.py                      everything, about half an hour on two cores
    python benchmarks/speed.py --only loaders       one part; --help names them

Run it on an idle machine. Only the ratios within one table can be compared with those of another machine. A file that
--save names keeps the other parts that are in it; they must be of the same device, commit and versions.
"""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))

from errors import InputError, parse
from files import write_json

PARTS = {
    "steps": "Training, batch 512: seconds per epoch of 97 steps on a GPU, 3 on a CPU",
    "precision": "Precision on the CPU, batch 512: training images/s",
    "waiting": "Idle threads, on the CPU: ms a bare training step, alone and beside one busy process",
    "memory": "Freed memory, on the CPU, batch 512: returned to the kernel as glibc does, and kept as ours does",
    "loaders": "Loading, on one core, batch 512",
    "profile": "Where our loader's time goes, on one core, batch 512",
    "growth": "Growth: our loader over more and more images, memory beyond the imports",
    "workers": "Memory of the whole process tree with four workers, 50,000 images, beyond the imports",
    "start": "Start, on the CPU, 60,000 images",
    "models": "The files of a trained model, full width, on the CPU",
    "predict": "10,000 PNG images of 32x32 pixels, a network of width 16, on the CPU",
}


def cell(value) -> str:
    """A cell of a table; floats have three digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value or "–"


def table(rows: list[dict]) -> str:
    """`rows` as a table, under a line of their keys."""
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in lines)


def section(part: str, rows: list[dict]) -> str:
    """The table of a part, and the ratios that matter."""
    import loaders
    import models
    import steps

    summary = {"steps": steps.summary, "loaders": loaders.summary, "predict": models.summary}.get(part)
    return table(rows) + (f"\n\n{summary(rows)}" if summary else "")


def heading(figures: dict) -> str:
    """The machine and the versions that the figures were measured with."""
    versions = (f"{package} {number}" for package, number in figures["versions"].items())
    return ", ".join([figures["device"], f"Python {figures['python']}", *versions])


def begun(save: Path, here: dict) -> dict:
    """`here`, which says what is measured (device, code, versions), with the figures that the file has already.

    Raises InputError if those are of another device, code or version.
    """
    if not save.exists():
        return here
    away = "move it away, or pass another --save"
    try:
        figures = json.loads(save.read_text())
        before, now = (f | f["versions"] for f in (figures, here))
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{save}: not a file of this benchmark; {away}") from None
    differ = [name for name in now if name != "versions" and before.get(name) != now[name]]
    if differ:
        what = ", ".join(f"{name} {before.get(name)} there and {now[name]} here" for name in differ)
        raise InputError(f"{save}: its figures are not comparable, {what}; {away}")
    return figures


def main(
    only: Annotated[str, {"choices": list(PARTS)}] = None,  # One part [all of them]
    device: str = "auto",  # For the training steps: auto, cpu or cuda
    width: int = 64,  # Of the network in the training steps
    rounds: int = 4,  # How often each way of loading and of training is timed
    compile: bool = False,  # Time the training steps with torch.compile too
    save: str = None,  # Write the figures to this JSON file as well, beside the parts that it has
):
    """Measure the loaders, whole training steps, how cost grows with the data, and the start."""
    for option, value in (("--width", width), ("--rounds", rounds)):
        if value < 1:
            raise InputError(f"{option} is {value}: it must be at least 1")
    if save and not Path(save).absolute().parent.is_dir():
        raise InputError(f"--save {save}: there is no folder of that name to write to; make it first")
    import growth
    import loaders
    import models
    import processors
    import start
    import steps
    import torch

    from trained.device import get_device
    from training.description import code_version, processor

    device = get_device(device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else processor()
    versions = {package: version(package) for package in ("torch", "fastai", "albumentations", "torchvision", "numpy")}
    figures = {"device": name, **code_version(), "python": platform.python_version(), "versions": versions}
    if save:
        figures = begun(Path(save), figures)
    print(heading(figures))
    parts = {
        "steps": lambda: steps.steps(device, width, 50_000 if gpu else 1536, rounds, compile),
        "precision": lambda: processors.precision(rounds),
        "waiting": processors.waiting,
        "memory": processors.memory,
        "loaders": lambda: loaders.loaders(rounds=rounds),
        "profile": loaders.profile,
        "growth": growth.growth,
        "workers": growth.workers,
        "start": start.start,
        "models": models.models,
        "predict": models.predict,
    }
    for part, measure in parts.items():
        if only in (None, part):
            print(f"\n{PARTS[part]}\n", flush=True)
            figures[part] = measure()
            print(section(part, figures[part]), flush=True)
            if save:
                write_json(Path(save), figures)


if __name__ == "__main__":
    parse(main)
