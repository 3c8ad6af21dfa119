"""Classify images with a trained model: a table to read, or rows for programs.

    python predict.py MODEL cat.png photos/ 'more/*.jpg'     the three most likely classes of each image
    find . -name '*.png' | python predict.py MODEL - --json  the files listed on stdin, one JSON object a line
    python predict.py MODEL FOLDER --eval                    the accuracy on FOLDER/<class>/ images, and of each class

MODEL is the folder of a run, or a model's .safetensors, .onnx, .pt2 or .pkl; loading a .pkl runs code in it. If some
images cannot be used, the others are still classified, and the exit code is 1.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from errors import InputError, parse, run_command
from names import TEST, printable, shortened


@dataclass(frozen=True)
class Options:
    """Classify images with a trained model."""

    model: str  # Folder of a run, or a model's .safetensors, .onnx, .pt2 or .pkl (loading it runs code)
    images: Annotated[str, {"nargs": "+"}]  # Image files, folders of them, quoted patterns, or - for a list on stdin
    json: bool = False  # Print a JSON object for each image
    csv: bool = False  # Print a CSV row for each image
    eval: bool = False  # Print the accuracy on images in folders named as the classes, and that of each class
    tta: bool = False  # Average the logits of each image and its mirror image
    device: str = "auto"  # For .safetensors and .pkl: auto, cpu, cuda, cuda:1 or mps

    def __post_init__(self):
        if self.json and self.csv:
            raise InputError("--json contradicts --csv; drop one of them")
        for word in self.images:
            test = next((name for name in TEST if os.path.isdir(Path(word) / name)), None)
            if self.eval and test and os.path.isdir(Path(word) / "train"):
                raise InputError(f"{word}: --eval on training images is optimistic; pass {Path(word) / test}")


if __name__ == "__main__":
    OPTIONS = parse(Options)

import csv
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from glob import glob, has_magic
from itertools import chain
from operator import itemgetter

import numpy as np

from images.decoding import read_image
from trained.loading import load_model
from trained.predictor import Model

BATCH = 256  # images; more are no faster on two cores, and take more memory
TOP = 3
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")  # in folders; a file that is named is always tried

Rows = Iterator[tuple[Path, list[tuple[str, float]]]]  # images, their classes and probabilities, the highest first


def complain(message: str) -> None:
    """Print one line on stderr."""
    print(f"predict.py: {printable(message)}", file=sys.stderr)


def find_images(words: Iterable[str], fail: Callable[[str], None]) -> Iterator[Path]:
    """The image files that `words` stand for: files, folders, patterns, and `-` for a list on stdin. Opens none."""
    for word in words:
        path = os.path.expanduser(word)  # the shell does not expand a ~ in quotes
        if word == "-":
            found = listed()
        elif os.path.isdir(path):
            found = sorted(images_in(path, fail))
        elif has_magic(word) and not os.path.exists(path):
            found = sorted(Path(name) for name in glob(path, recursive=True) if not os.path.isdir(name))
        else:
            found = [Path(path)]
        if not found:
            fail(f"{word}: no image there")
        yield from found


def listed() -> list[Path]:
    """The file names on stdin, one a line, which need not be valid text."""
    if sys.stdin is None:
        raise InputError("-: stdin is closed; pipe a list of images into it, or name them")
    try:
        return [Path(os.fsdecode(line)) for line in sys.stdin.buffer.read().split(b"\n") if line]
    except OSError as e:
        raise InputError(f"-: the list of images cannot be read ({e.strerror})") from e


def images_in(folder: str, fail: Callable[[str], None]) -> list[Path]:
    """The images in it and below, hidden ones aside; calls `fail` for a folder that cannot be read."""

    def refuse(e: OSError) -> None:
        fail(f"{e.filename}: cannot be read ({e.strerror})")

    found, seen = [], set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(where))  # a link may lead back
        below = [name for name in folders if os.path.realpath(os.path.join(where, name)) not in seen]
        folders[:] = [name for name in below if not name.startswith(".")]
        images = [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
        found += [Path(where, name) for name in images]
    return found


def predictions(model: Model, paths: list[Path], tta: bool, fail: Callable[[str], None]) -> Rows:
    """Each image that can be read, with its ranked classes; calls `fail` for the others."""
    for start in range(0, len(paths), BATCH):
        read, pixels = [], []
        for path in paths[start : start + BATCH]:
            try:
                pixels.append(read_image(path, lambda name: complain(f"{name}: animated; its first frame is taken")))
                read.append(path)
            except InputError as e:
                fail(str(e))
            except (OSError, ValueError) as e:  # ValueError for a name with a null byte
                fail(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})")
        probabilities = model.probabilities(np.stack(pixels), tta) if read else ()
        for path, p in zip(read, probabilities, strict=True):
            yield path, [(model.classes[i], float(p[i])) for i in (-p).argsort(kind="stable")]


def print_csv(names: Iterable[str], rows: Iterable[Iterable]) -> None:
    """Print the rows under a header of names."""
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # keeps the bytes of file names
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)


def print_predictions(rows: Rows, paths: list[Path], classes: list[str], options: Options) -> None:
    """Print the most probable classes of each image, one image a line; in JSON all of them, in that order."""
    top = min(TOP, len(classes))
    if options.json:
        for path, ranked in rows:
            every = {label: round(p, 6) for label, p in ranked}
            print(json.dumps({"image": str(path), "label": ranked[0][0], "probabilities": every}))
    elif options.csv:
        names = [f"{column}{i}" for i in range(1, top + 1) for column in ("label", "probability")]
        cells = ((path, *chain(*((label, round(p, 6)) for label, p in ranked[:top]))) for path, ranked in rows)
        print_csv(["image", *names], cells)
    else:
        short = {name: printable(shortened(name)) for name in classes}
        cell = max(map(len, short.values())) + 9
        width = max((len(printable(str(path))) for path in paths), default=0)
        if sys.stdout.isatty():  # cuts the beginning of long names
            width = min(width, max(12, shutil.get_terminal_size().columns - top * (cell + 2)))
        for path, ranked in rows:
            name = printable(str(path))
            name = name if len(name) <= width else f"…{name[1 - width :]}"
            cells = (f"{short[label]:<{cell - 8}}{100 * p:6.2f} %" for label, p in ranked[:top])
            print(f"{name:<{width}}  {'  '.join(cells)}")


def evaluation(rows: Rows, paths: list[Path], classes: list[str]) -> dict:
    """Number of images and accuracy, 0 to 1, of all and of each class, with the class that it is most often taken for.

    `accuracy` is None for a class without images, `taken_for` for one without mistakes. Raises InputError, before any
    image is read, for one whose folder is not named as a class.
    """
    for path in paths:
        if not os.path.lexists(path):
            raise InputError(f"{path}: no such file or folder")
        if path.absolute().parent.name not in classes:
            some = ", ".join(classes[:12]) + (" …" if len(classes) > 12 else "")
            raise InputError(f"{path}: --eval takes images in folders named as the model's classes: {some}")
    counts = Counter((path.absolute().parent.name, ranked[0][0]) for path, ranked in rows)

    def figures(names: list[str]) -> dict:
        n = sum(counts[name, other] for name in names for other in classes)
        right = sum(counts[name, name] for name in names)
        return {"images": n, "accuracy": right / n if n else None}

    result = figures(classes) | {"classes": {name: figures([name]) for name in classes}}
    for name, row in result["classes"].items():
        mistakes = [(counts[name, other], other) for other in classes if other != name]
        times, other = max(mistakes, key=itemgetter(0), default=(0, None))
        row |= {"taken_for": other if times else None, "times": times}
    return result


def print_evaluation(result: dict, options: Options) -> None:
    """Print a line for each class and one for all, whose name is empty in CSV; or one JSON object."""
    names = ("images", "accuracy", "taken_for", "times")
    rows = [*result["classes"].items(), ("" if options.csv else "all", result)]
    if options.json:
        print(json.dumps(result))
    elif options.csv:
        print_csv(("class", *names), ([name, *map(row.get, names)] for name, row in rows))
    else:
        width = max(len(printable(name)) for name in ("class", *result["classes"]))
        print(f"{'class':<{width}}  images  accuracy  most often taken for")
        for name, row in rows:
            accuracy = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
            often = "once" if row.get("times") == 1 else f"{row.get('times')} times"
            other = f"{printable(row['taken_for'])}, {often}" if row.get("taken_for") else ""
            print(f"{printable(name):<{width}}  {row['images']:>6}  {accuracy:>8}  {other}".rstrip())


def main(options: Options) -> None:
    """The command; exits with 1 if an image could not be used."""
    model, failures = load_model(options.model, options.device), []
    if options.tta and model.header.get("flip") == 0:
        raise InputError(f"--tta: {options.model} has never learned from mirror images; leave it out")

    def fail(message: str) -> None:
        complain(message)
        failures.append(message)

    paths = list(find_images(options.images, fail))
    rows = predictions(model, paths, options.tta, fail)
    if options.eval:
        print_evaluation(evaluation(rows, paths, model.classes), options)
    else:
        print_predictions(rows, paths, model.classes, options)
    if failures:
        complain(f"{len(failures)} could not be used")
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, OPTIONS)
