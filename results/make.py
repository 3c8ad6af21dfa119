"""Make the README's tables and pictures from the figures in this folder.

    python results/make.py                             from what is there
    python results/make.py --runs runs/001-fast ...    take in the results of these runs first

A test fails as long as the README or a picture shows anything else than what this makes.
"""

import hashlib
import json
import re
import sys
from dataclasses import fields
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling
from speed import PARTS, heading, section

from errors import InputError, run_command
from files import write_json
from pictures import save_comparison, save_peaks, save_schedules
from recipes import RECIPES
from report import markdown_table

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
    result.pop("arguments", None)  # paths of the machine; what counts of them stands beside them
    write_json(HERE / "runs" / f"{file_name(how(result), *where(result), 'seed', result['seed'])}.json", result)


def where(result: dict) -> tuple:
    """What two results must have in common to be compared."""
    return tuple(result[key] for key in ("source", "width", "valid", "device_name"))


def how(result: dict) -> str:
    """The recipe, and in what the run was not as the recipe is today."""
    recipe = RECIPES[result["recipe"]]
    words = [result["recipe"], f"{result['epochs']} epochs"]
    for name in (field.name for field in fields(recipe)):
        value = result.get(name, getattr(recipe, name))  # settings that came later were off
        if name not in ("data", "epochs", "width") and str(value) != str(getattr(recipe, name)):
            words.append(f"{name} {value}".replace("_", " "))
    if result.get("processes", 1) > 1:
        words.append(f"{result['processes']} processes")
    return ", ".join(
        words + ["layer norm"] * (result["norm"] == "layer") + ["group norm"] * (result["norm"] == "group")
    )


def results() -> dict[tuple, dict[str, list[dict]]]:
    """All results: where, then how, then in the order of their seeds."""
    every = [json.loads(path.read_text()) for path in (HERE / "runs").glob("*.json")]
    order = list(RECIPES)
    every.sort(key=lambda r: (where(r), order.index(r["recipe"]), r["epochs"], how(r), r["seed"]))
    return {place: {k: list(runs) for k, runs in groupby(group, how)} for place, group in groupby(every, where)}


def over_seeds(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def percent(runs: list[dict], key: str = "last_accuracy") -> list[float]:
    return [100 * r[key] for r in runs if r[key] is not None]


def accuracy_table() -> str:
    """A line for each recipe, data, network and machine: the last epoch's accuracy on the test set over the seeds."""
    rows = []
    for (source, width, valid, machine), groups in results().items():
        for name, runs in groups.items():
            if valid == "test":
                last, tta = percent(runs), percent(runs, "tta_accuracy")
                seconds = median(row["seconds"] for r in runs for row in r["history"])
                network = f"width {width}, {runs[0]['parameters'] / 1e6:.2f} M"
                spread = (over_seeds(last), f"{min(last):.2f}, {max(last):.2f}", over_seeds(tta) if tta else "–")
                time = f"{seconds:.3g} s, {machine}"
                rows.append((DATA.get(source, source), name, network, str(len(runs)), *spread, time))
    names = ("data", "recipe", "network", "seeds", "last epoch, %", "lowest, highest", "with TTA, %", "an epoch")
    return markdown_table(names, rows)


def ablation_tables() -> str:
    """What a change of a setting does on a hold-out: each line against that without the change, seed by seed."""
    tables = []
    for (source, width, valid, machine), groups in results().items():
        if valid != "holdout":
            continue
        rows = []
        for name, runs in groups.items():
            words = set(name.split(", "))
            less = max((n for n in groups if set(n.split(", ")) < words), key=lambda n: (n.count(","), n), default=None)
            base = {r["seed"]: r for r in groups[less]} if less else {}
            more = [100 * (r["last_accuracy"] - base[r["seed"]]["last_accuracy"]) for r in runs if r["seed"] in base]
            tta = percent(runs, "tta_accuracy")
            cells = (over_seeds(percent(runs)), over_seeds(more) if more else "", less if more else "")
            rows.append((name, str(len(runs)), *cells, over_seeds(tta) if tta else "–"))
        names = ("settings", "seeds", "last epoch, %", "more", "than", "with TTA, %")
        title = f"{DATA.get(source, source)}, a tenth of the training set held out, width {width}, {machine}:"
        tables.append(f"{title}\n\n{markdown_table(names, rows)}")
    return "\n\n".join(tables)


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
    loading = f"```text\n{section('loaders', speeds()['2-cores']['loaders'])}\n```"
    models = f"```text\n{section('models', speeds()['2-cores-models']['models'])}\n```"
    scaled = json.loads((HERE / "scaling.json").read_text())
    parts = {
        ROOT / "README.md": {"accuracy": accuracy_table(), "loading": loading, "models": models},
        HERE / "README.md": {"ablation": ablation_tables()},
        ROOT / "docs" / "scaling.md": {f"{size} pixels": scaling.table(scaled, size) for size in scaling.SIZES},
    }
    texts = {HERE / "speed" / "README.md": speed_page()}
    for path, blocks in parts.items():
        texts[path] = path.read_text()
        for name, block in blocks.items():
            pattern = f"(<!-- made: {name} -->\n).*?(<!-- end -->)"
            replaced = partial(lambda block, m: f"{m[1]}{block}\n{m[2]}", block)
            texts[path], found = re.subn(pattern, replaced, texts[path], flags=re.S)
            assert found == 1, f"{path} has no place for {name}"
    return texts


def made_pictures() -> dict[Path, tuple]:
    """The function that draws each picture, and what it draws."""
    cifar10 = {name: recipe for name, recipe in RECIPES.items() if recipe.data == "cifar10"}
    pictures = {HERE / "schedules.png": (save_schedules, cifar10)}
    for path in (HERE / "peaks").glob("*.json"):
        pictures[path.with_suffix(".png")] = (save_peaks, json.loads(path.read_text()))
    for place, groups in results().items():
        if place[2] == "test" and len(groups) > 1:
            pictures[HERE / f"{file_name(*place)}.png"] = (save_comparison, groups)
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
