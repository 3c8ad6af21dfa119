"""What a trained model says of images: a table to read, or rows for programs.

    python predict.py MODEL cat.png photos/ 'more/*.jpg'     the three most likely classes of each image
    find . -name '*.png' | python predict.py MODEL - --json  of the files listed on stdin, a JSON object a line
    python predict.py MODEL FOLDER --eval                    accuracy on FOLDER/<class>/ images, and of each class

MODEL is the folder of a run, or a model's .safetensors, .onnx, .pt2 or .pkl; whoever loads a .pkl runs what its author
put in it. Exits with 1 where some images could not be used, after all others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from errors import InputError, parse, printable, run_command, shortened


@dataclass(frozen=True)
class Options:
    """Print what a trained model takes images for."""

    model: str  # Folder of a run, or a model's .safetensors, .onnx, .pt2 or .pkl (which runs what is in it)
    images: Annotated[str, {"nargs": "+"}]  # Image files, folders of them, quoted patterns, or - for a list on stdin
    json: bool = False  # Print a JSON object for each image
    csv: bool = False  # Print a CSV row for each image
    eval: bool = False  # Print the accuracy on images in folders named as the classes, and that of each class
    tta: bool = False  # Judge each image together with its mirror image
    device: str = "auto"  # For .safetensors and .pkl: auto, cpu, cuda, cuda:1 or mps

    def __post_init__(self):
        if self.json and self.csv:
            raise InputError("--json contradicts --csv; drop one of them")
        for word in self.images:
            if self.eval and all((Path(word) / split).is_dir() for split in ("train", "test")):
                raise InputError(f"{word}: --eval on training images flatters; pass {Path(word) / 'test'}")


if __name__ == "__main__":
    OPTIONS = parse(Options)

import csv
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from glob import glob, has_magic
from itertools import islice

import numpy as np

from images.decoding import read_image
from trained.loading import load_model
from trained.predictor import Model

BATCH = 256  # images; more are no faster on two cores, and take memory
TOP = 3
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")  # of images in a folder; a name given is always tried


class Failures:
    """Names each image that cannot be used on stderr, and counts them."""

    def __init__(self):
        self.count = 0

    def add(self, message: str) -> None:
        """One more of them."""
        self.count += 1
        print(f"predict.py: {printable(message)}", file=sys.stderr)


def find_images(words: Iterable[str], failures: Failures) -> list[Path]:
    """The files that images, folders, patterns, and `-` for a list on stdin stand for; none has been opened."""
    paths = []
    for word in words:
        if word == "-":
            sys.stdin.reconfigure(errors="surrogateescape")  # a name need not be text
            paths += [Path(line) for line in sys.stdin.read().splitlines() if line]
            continue
        path, found = Path(word).expanduser(), None
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        elif has_magic(word) and not path.exists():
            found = [p for p in map(Path, glob(str(path), recursive=True)) if not p.is_dir()]
        if found == []:
            failures.add(f"{word}: no image there")
        paths += [path] if found is None else sorted(found)
    return paths


def predictions(model: Model, paths: list[Path], tta: bool, failures: Failures) -> Iterator[tuple[Path, np.ndarray]]:
    """Each image that can be read, and the probability of each class, (classes,)."""
    rest = iter(paths)
    while batch := list(islice(rest, BATCH)):
        read, pixels = [], []
        for path in batch:
            try:
                pixels.append(read_image(path, warn_of_frames))
                read.append(path)
            except InputError as e:
                failures.add(str(e))
            except OSError as e:
                failures.add(f"{path}: cannot be read ({e.strerror or e})")
        if read:
            yield from zip(read, model.probabilities(np.stack(pixels), tta), strict=True)


def warn_of_frames(name: str) -> None:
    """On stderr."""
    print(f"predict.py: {printable(name)}: animated; its first frame is taken", file=sys.stderr)


def best(classes: list[str], probabilities: np.ndarray, n: int | None = None) -> list[tuple[str, float]]:
    """The `n` most probable classes, the most probable first; all by default."""
    order = (-probabilities).argsort(kind="stable")[:n]
    return [(classes[i], float(probabilities[i])) for i in order]


def print_table(rows: Iterator, classes: list[str], paths: list[Path]) -> None:
    """The most probable classes of each image; in a terminal, long names lose their beginning."""
    short = {name: printable(shortened(name)) for name in classes}
    top, cell = min(TOP, len(classes)), max(map(len, short.values())) + 9
    width = max((len(printable(str(path))) for path in paths), default=0)
    if sys.stdout.isatty():
        width = min(width, max(12, shutil.get_terminal_size().columns - top * (cell + 2)))
    for path, probabilities in rows:
        name = printable(str(path))
        name = name if len(name) <= width else f"…{name[1 - width :]}"
        cells = (f"{short[label]:<{cell - 8}}{100 * p:6.2f} %" for label, p in best(classes, probabilities, TOP))
        print(f"{name:<{width}}  {'  '.join(cells)}")


def print_csv(rows: Iterator, classes: list[str], paths: list[Path]) -> None:
    """The most probable classes of each image, a row each, under a line of names."""
    sys.stdout.reconfigure(errors="surrogateescape")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    numbers = range(1, min(TOP, len(classes)) + 1)
    writer.writerow(["image", *(f"{column}{i}" for i in numbers for column in ("label", "probability"))])
    for path, probabilities in rows:
        writer.writerow([path, *(v for label, p in best(classes, probabilities, TOP) for v in (label, round(p, 6)))])


def print_json(rows: Iterator, classes: list[str], paths: list[Path]) -> None:
    """A JSON object a line: the image, its most probable class, and the probability of each, the highest first."""
    for path, probabilities in rows:
        ordered = best(classes, probabilities)
        every = {label: round(p, 6) for label, p in ordered}
        print(json.dumps({"image": str(path), "label": ordered[0][0], "probabilities": every}))


def labels_of(paths: list[Path], classes: list[str]) -> list[int]:
    """The class whose name each image's folder has. Raises InputError where there is none."""
    numbers = {name: i for i, name in enumerate(classes)}
    names = [path.absolute().parent.name for path in paths]
    for path, name in zip(paths, names, strict=True):
        if name not in numbers:
            some = ", ".join(classes[:12]) + (" …" if len(classes) > 12 else "")
            raise InputError(f"{path}: --eval takes images in folders named as the model's classes: {some}")
    return [numbers[name] for name in names]


def evaluation(rows: Iterator, paths: list[Path], classes: list[str]) -> dict:
    """Number of images and accuracy, 0 to 1, of all and of each class, and what it is most often taken for, if any."""
    labels, counts = dict(zip(paths, labels_of(paths, classes), strict=True)), np.zeros((len(classes),) * 2, int)
    for path, probabilities in rows:
        counts[labels[path], probabilities.argmax()] += 1
    right, n = counts.diagonal(), counts.sum(1)
    wrong = counts - np.diag(right)
    return {
        "images": int(n.sum()),
        "accuracy": float(right.sum() / n.sum()) if n.any() else None,
        "classes": {
            name: {
                "images": int(n[i]),
                "accuracy": float(right[i] / n[i]) if n[i] else None,
                "taken_for": classes[wrong[i].argmax()] if wrong[i].any() else None,
                "times": int(wrong[i].max()),
            }
            for i, name in enumerate(classes)
        },
    }


def print_evaluation(result: dict) -> None:
    """A line a class, and one for all."""
    width = max(len(printable(name)) for name in ("class", *result["classes"]))
    print(f"{'class':<{width}}  images  accuracy  most often taken for")
    for name, row in [*result["classes"].items(), ("all", result)]:
        accuracy = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
        other = f"{printable(row['taken_for'])}, {row['times']} times" if row.get("taken_for") else ""
        print(f"{printable(name):<{width}}  {row['images']:>6}  {accuracy:>8}  {other}".rstrip())


def print_evaluation_csv(result: dict) -> None:
    """The same as rows under a line of names; that of all has no class."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    names = ("images", "accuracy", "taken_for", "times")
    writer.writerow(["class", *names])
    for name, row in [*result["classes"].items(), ("", result)]:
        writer.writerow([name, *(row.get(key) for key in names)])


WRITERS: dict[str, tuple[Callable, Callable]] = {
    "table": (print_table, print_evaluation),
    "csv": (print_csv, print_evaluation_csv),
    "json": (print_json, lambda result: print(json.dumps(result))),
}


def main(options: Options) -> None:
    """The command; exits with 1 where an image could not be used."""
    model, failures = load_model(options.model, options.device), Failures()
    if options.tta and model.header.get("flip") == 0:
        raise InputError(f"--tta: {options.model} has never learned from mirror images; leave it out")
    paths = find_images(options.images, failures)
    rows = predictions(model, paths, options.tta, failures)
    print_rows, print_result = WRITERS["json" if options.json else "csv" if options.csv else "table"]
    if options.eval:
        print_result(evaluation(rows, paths, model.classes))
    else:
        print_rows(rows, model.classes, paths)
    if failures.count:
        print(f"predict.py: {failures.count} could not be used", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, OPTIONS)
