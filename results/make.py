"""Make the README's tables and pictures from the figures in this folder.

    python results/make.py                             from what is there
    python results/make.py --runs runs/001-fast ...    take in the results of these runs first

A test fails as long as the README or a picture shows anything else than what this makes.
"""

import hashlib
import json
import re
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from speed import PARTS, heading, section

from errors import InputError, run_command
from recipes import RECIPES
from report import save_comparison, save_schedules
from run import write_json

HERE = Path(__file__).parent
ROOT = HERE.parent
DATA = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 **as JPEG**"}


def file_name(*words) -> str:
    """The words with hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower())


def take_in(folder: Path) -> None:
    """Copy the run's result under a name of its own: one for each recipe, data, network, machine and seed."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except OSError as e:
        raise InputError(f"{folder}: not the folder of a run that has ended, no result.json ({e.strerror})") from e
    name = file_name(result["recipe"], result["epochs"], *where(result), "seed", result["seed"])
    write_json(HERE / "runs" / f"{name}.json", result)


def results() -> list[dict]:
    """All results, those that may be compared beside each other."""
    every = [json.loads(path.read_text()) for path in sorted((HERE / "runs").glob("*.json"))]
    order = list(RECIPES)
    return sorted(every, key=lambda r: (where(r), order.index(r["recipe"]), r["epochs"], r["seed"]))


def where(result: dict) -> tuple:
    """What two results must have in common to be compared."""
    return tuple(result[key] for key in ("source", "width", "valid", "device_name"))


def accuracy_table() -> str:
    """A line for each recipe, data, network and machine: the last epoch's accuracy over the seeds."""

    def over_seeds(values: list[float]) -> str:
        return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    lines = ["| data | recipe | network | seeds | last epoch, % | with TTA, % | lowest and highest | an epoch |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for _, group in groupby(results(), key=lambda r: (*where(r), r["recipe"], r["epochs"])):
        group = list(group)
        first, last = group[0], [100 * r["last_accuracy"] for r in group]
        tta = [100 * r["tta_accuracy"] for r in group if r["tta_accuracy"] is not None]
        cells = (
            DATA.get(first["source"], first["source"]) + (", hold-out" if first["valid"] == "holdout" else ""),
            f"`{first['recipe']}`, {first['epochs']} epochs",
            f"width {first['width']}, {first['parameters'] / 1e6:.2f} M",
            str(len(group)),
            over_seeds(last),
            over_seeds(tta) if tta else "–",
            f"{min(last):.2f}, {max(last):.2f}",
            f"{median(row['seconds'] for r in group for row in r['history']):.3g} s, {first['device_name']}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speeds() -> dict[str, dict]:
    """The figures of `benchmarks/speed.py`, by the name of their file."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "speed").glob("*.json"))}


def speed_page() -> str:
    """Every table of `benchmarks/speed.py`."""
    lines = ["# Figures of `python benchmarks/speed.py --save FILE`"]
    for name, figures in speeds().items():
        lines += ["", f"## {name}", "", heading(figures)]
        for part in PARTS:
            if part in figures:
                lines += ["", PARTS[part], "", "```text", section(part, figures[part]), "```"]
    return "\n".join(lines) + "\n"


def made_texts() -> dict[Path, str]:
    """What the files that are made, in whole or in part, should say."""
    readme = (ROOT / "README.md").read_text()
    blocks = {"accuracy": accuracy_table(), "loading": section("loaders", speeds()["2-cores"]["loaders"])}
    blocks["loading"] = f"```text\n{blocks['loading']}\n```"
    for name, text in blocks.items():
        pattern = f"(<!-- made: {name} -->\n).*?(<!-- end -->)"
        readme, found = re.subn(pattern, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme, flags=re.S)
        assert found == 1, f"the README has no place for {name}"
    return {ROOT / "README.md": readme, HERE / "speed" / "README.md": speed_page()}


def made_pictures() -> dict[Path, tuple]:
    """The function that draws each picture, and what it draws."""
    cifar10 = {name: recipe for name, recipe in RECIPES.items() if recipe.data == "cifar10"}
    pictures = {HERE / "schedules.png": (save_schedules, cifar10)}
    for place, group in groupby(results(), key=where):
        group = list(group)
        if len({r["recipe"] for r in group}) > 1:
            pictures[HERE / f"{file_name(*place)}.png"] = (save_comparison, group)
    return pictures


def digest(drawn) -> str:
    """Stands in a picture's comment, so that one can see whether it shows the figures of today."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True, default=str).encode()).hexdigest()


def main(
    runs: Annotated[str, {"nargs": "+"}] = (),  # Run folders whose results to take in first
):
    """Make the README's tables and pictures from the figures in this folder."""
    for run in runs:
        take_in(Path(run))
    for path, text in made_texts().items():
        path.write_text(text)
    for path, (draw, drawn) in made_pictures().items():
        draw(drawn, path, digest(drawn))


if __name__ == "__main__":
    run_command(main)
