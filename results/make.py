"""Make the tables of README and docs, and the pictures of this folder, from the figures in it.

    python results/make.py                             from what is there
    python results/make.py --runs runs/001-fast ...    copy the results of these runs here first

A test fails if a table or the data behind a picture is not what this makes.
"""

import hashlib
import json
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Annotated

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import scaling
from figures import HERE, file_name, results, take_in
from speed import PARTS, heading, section

from errors import parse
from options import Options
from recipes import RECIPES
from reporting.pictures import BLUE, MARKS, ORANGE, new_axes, save_comparison, save_figure, save_schedules
from reporting.tables import markdown_table
from training.lr_finder import default_method

ROOT = HERE.parent
# Of the network of 6.57 M parameters in 24 epochs: its source is in results/README.md
TO_BEAT = {
    "24 epochs, Page, all tricks": 94.68,
    "24 epochs, Page, plain": 93.92,
    "best of 24 epochs, what this project descends from": 91.63,
}
Results = dict[tuple, dict[str, list[dict]]]  # as `figures.results` has them
LOSSY = "cifar10-jpeg"
DATA = {"cifar10": "CIFAR-10", LOSSY: "CIFAR-10 as JPEG"}


def over_seeds(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def percent(runs: list[dict], key: str = "last_accuracy") -> list[float]:
    return [100 * r[key] for r in runs if r[key] is not None]


def accuracy_table(found: Results) -> str:
    """One line for each data set, recipe, network and precision: the last epoch's test accuracy over the seeds."""
    rows = []
    for (source, width, valid, precision), groups in found.items():
        for name, runs in groups.items():
            if valid == "test":
                last, tta = percent(runs), percent(runs, "tta_accuracy")
                network = f"width {width}, {runs[0]['parameters'] / 1e6:.2f} M"
                spread = (over_seeds(last), f"{min(last):.2f}, {max(last):.2f}", over_seeds(tta) if tta else "–")
                what = (DATA.get(source, source), name, network, precision, str(len(runs)))
                seconds, machine = epoch_time(runs)
                rows.append((*what, *spread, f"{seconds:.3g} s, {machine}"))
    names = ("data", "recipe", "network", "trained in", "seeds", "last epoch, %", "lowest, highest", "with TTA, %")
    names += ("an epoch",)
    return markdown_table(names, rows)


def unchanged(groups: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The groups of runs that trained a recipe unchanged."""
    names = (f"{name}, {recipe.epochs} epochs" for name, recipe in RECIPES.items())
    return {name: groups[name] for name in names if name in groups}


def front(found: Results) -> Results:
    """The runs of the README's first screen: unchanged recipes on CIFAR-10's test set, in the widest network of all."""
    tested = {
        place: unchanged(groups) for place, groups in found.items() if (place[0], place[2]) == ("cifar10", "test")
    }
    widest = max((place[1] for place, groups in tested.items() if groups), default=None)
    return {place: groups for place, groups in tested.items() if groups and place[1] == widest}


def front_table(found: Results) -> str:
    """The README's first table: one line for each recipe."""
    rows = []
    for (_, width, _, precision), groups in front(found).items():
        for name, runs in groups.items():
            last, tta = percent(runs), percent(runs, "tta_accuracy")
            network = f"{runs[0]['parameters'] / 1e6:.2f} M parameters" + ("" if width == 64 else f", width {width}")
            seconds, machine = epoch_time(runs)
            time = f"{seconds * runs[0]['epochs'] / 60:.3g} on {machine}, in {precision}"
            tta = over_seeds(tta) if tta else "–"
            rows.append((name, network, str(len(runs)), over_seeds(last), tta, time))
    names = ("recipe", "network", "n", "last epoch, %", "with TTA, %", "minutes")
    return markdown_table(names, rows)


def epoch_time(runs: list[dict]) -> tuple[float, str]:
    """The median seconds of an epoch on the fastest machine, and that machine."""
    seconds = defaultdict(list)
    for run in runs:
        machine = run["device_name"] + (", on one thread" if run.get("threads") == 1 else "")
        seconds[machine] += [row["seconds"] for row in run["history"]]
    return min((median(times), name) for name, times in seconds.items())


def ablation_tables(found: Results) -> str:
    """The effect of each changed setting on a hold-out: every line is compared with the one without its last change."""
    tables = []
    for (source, width, valid, precision), groups in found.items():
        if valid == "test":
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
        part = valid.partition(" ")[2] or f"{Options.valid_pct:.0%}"
        names = ("settings", "seeds", "last epoch, %", "more", "than", "with TTA, %")
        title = f"{DATA.get(source, source)}, {part} of the training set held out, width {width}, {precision}:"
        tables.append(f"{title}\n\n{markdown_table(names, rows)}")
    return "\n\n".join(tables)


def speeds() -> dict[str, dict]:
    """The figures of `benchmarks/speed.py`, by the names of their files."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((HERE / "speed").glob("*.json"))}


def speed_page() -> str:
    """A page with every table of `benchmarks/speed.py`."""
    lines = ["# Figures of `python benchmarks/speed.py --save FILE`"]
    for name, figures in speeds().items():
        lines += ["", f"## {name}", "", heading(figures)]
        for part in PARTS:
            if part in figures:
                lines += ["", PARTS[part], "", "```text", section(part, figures[part]), "```"]
    return "\n".join(lines) + "\n"


def save_peaks(sweep: dict, path: Path, comment: str | None = None) -> None:
    """The accuracy that each peak learning rate reaches, and the range test's suggestions.

    sweep: the content of one of the files in peaks.
    """
    arguments = sweep["arguments"]
    recipe = f"first {arguments['recipe']}"  # the sweeps are of `settings.FIRST_FAST`, and call it by its name of then
    title = f"{recipe}, {arguments['data']}, width {arguments['width']}, {arguments['epochs']} epochs"
    label = "peak learning rate; lines: what the methods suggest for seed 0"
    figure, axes = new_axes(title, label, "accuracy on the hold-out in %")
    axes.set_xscale("log")
    # A run whose loss was not finite has no accuracy.
    points = [(row["lr"], 100 * (row["last_accuracy"] or np.nan), row["suggested"]) for row in sweep["peaks"]]
    lrs = sorted({lr for lr, _, suggested in points if not suggested})
    if len(lrs) >= 5:  # between fewer, a line would show accuracies that nobody measured
        means = [np.mean([v for x, v, suggested in points if x == lr and not suggested]) for lr in lrs]
        axes.plot(lrs, means, color=BLUE)
    for suggested, marker, size in ((False, "o", 5), (True, "*", 11)):
        x, y = zip(*((x, v) for x, v, s in points if s is suggested), strict=True)
        label = "trained at the default suggestion" if suggested else None
        axes.plot(x, y, marker, ms=size, color=ORANGE if suggested else BLUE, label=label)
    default = default_method(sweep["suggestions"])
    for (name, lr), color in zip(sweep["suggestions"].items(), MARKS, strict=True):
        if lr is not None:
            label = f"{name}: {lr:.2g}" + (" (default suggestion)" if name == default else "")
            axes.axvline(lr, color=color, ls="-" if name == default else "--", label=label)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path, comment)


def save_front_curves(groups: dict[str, list[dict]], path: Path, comment: str | None = None) -> None:
    """The accuracy on CIFAR-10 over the epochs, with the figures to beat as lines."""
    save_comparison(groups, path, comment, TO_BEAT)


def made_texts() -> dict[Path, str]:
    """The content of each file that is made, in whole or in part."""
    loading = f"```text\n{section('loaders', speeds()['2-cores-loaders']['loaders'])}\n```"
    models = f"```text\n{section('models', speeds()['2-cores-models']['models'])}\n```"
    precision = f"```text\n{section('precision', speeds()['2-cores-precision']['precision'])}\n```"
    scaled = json.loads((HERE / "scaling.json").read_text())
    found = results()
    lossy = {place: groups for place, groups in found.items() if place[0] == LOSSY}
    exact = {place: groups for place, groups in found.items() if place[0] != LOSSY}
    parts = {
        ROOT / "README.md": {"results": front_table(found)},
        ROOT / "docs" / "speed.md": {"loading": loading, "precision": precision},
        ROOT / "docs" / "models.md": {"models": models},
        HERE / "README.md": {
            "accuracy": accuracy_table(exact),
            "ablation": ablation_tables(exact),
            "accuracy, lossy copy": accuracy_table(lossy),
            "ablation, lossy copy": ablation_tables(lossy),
        },
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
    """For each picture, the function that draws it, and its data."""
    cifar10 = {name: recipe for name, recipe in RECIPES.items() if recipe.data == "cifar10"}
    pictures = {HERE / "schedules.png": (save_schedules, cifar10)}
    for path in (HERE / "peaks").glob("*.json"):
        pictures[path.with_suffix(".png")] = (save_peaks, json.loads(path.read_text()))
    tested = {place: groups for place, groups in results().items() if place[2] == "test"}
    for place, groups in tested.items():
        if len(groups) > 1:
            pictures[HERE / f"{file_name(*place)}.png"] = (save_comparison, groups)
    if ours := front(tested):
        pictures[HERE / "curves.png"] = (save_front_curves, next(iter(ours.values())))
    return pictures


def digest(drawn) -> str:
    """A hash of a picture's data, stored in the picture's comment, to tell whether it is up to date."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True, default=str).encode()).hexdigest()


def main(
    runs: Annotated[str, {"nargs": "+"}] = (),  # Run folders whose results to copy here first
):
    """Make the tables of README and docs, and the pictures of this folder, from the figures in it."""
    for run in runs:
        take_in(Path(run))
    for path, text in made_texts().items():
        path.write_text(text)
    for path, (draw, drawn) in made_pictures().items():
        draw(drawn, path, digest(drawn))


if __name__ == "__main__":
    parse(main)
