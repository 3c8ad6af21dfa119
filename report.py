"""A run explains itself: its pictures and its README, drawn at its end, or anew; or several runs compared.

    python report.py RUN            draw the pictures of that run again and write its README
    python report.py RUN RUN ...    a table and a picture of their accuracies

RUN is the folder of a run that has ended.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

from errors import InputError, run_command
from files import complete
from options import command_line, defaults, get_device, recipe_of
from recipes import Recipe

if TYPE_CHECKING:
    from fastai.learner import Learner

    from evaluation import Evaluation

EXAMPLES = 12  # images in a picture of them
RESULTS = Path(__file__).parent / "results/runs"
CAPTIONS = {
    "accuracy": "Accuracy over the epochs",
    "loss": "Loss over the epochs",
    "schedule": "Learning rate over the epochs",
    "lr_find": "Learning-rate range test",
    "confusion": "Confusions",
    "classes": "Accuracy of each class",
    "reliability": "How often it is right where it is how sure",
    "wrong": "The most confident mistakes, and where in the image the network saw what it says (Grad-CAM)",
    "uncertain": "The images it cannot decide on",
    "augmentations": "What the network was trained on",
}


def write_report(learn: "Learner", result: dict, evaluation: "Evaluation") -> None:
    """Every picture of the training and the trained network into `learn.path`, and the README that shows them."""
    from classifier import classifier_of, grad_cam
    from pictures import save_classes, save_confusion, save_examples, save_history, save_reliability, save_schedules

    run, classifier = learn.path, classifier_of(learn)
    what = f"{result['source']}, recipe {result['recipe']}, width {result['width']}, seed {result['seed']}"
    save_history(result["history"], run, what, seed_curve(result))
    recipe = replace(recipe_of(result["arguments"]), lr=result["peak_lr"])
    save_schedules({result["recipe"]: recipe}, run / "schedule.png", svg=True)
    save_confusion(evaluation, run / "confusion.png")
    save_classes(evaluation, run / "classes.png")
    save_reliability(evaluation, run / "reliability.png")
    for name, chosen, title in (
        ("wrong", evaluation.most_wrong(EXAMPLES), "The most confident mistakes"),
        ("uncertain", evaluation.most_uncertain(EXAMPLES), "The least certain predictions"),
    ):
        images, _ = evaluation.table.batch(chosen.tolist())
        maps = grad_cam(classifier, images, evaluation.predicted[chosen]) if len(chosen) else []
        save_examples(evaluation, chosen, maps, title, run / f"{name}.png")
    save_first_images(evaluation, run / "examples")
    write_card(run, result)


def save_first_images(evaluation: "Evaluation", folder: Path) -> None:
    """One validation image of each of the first classes as PNG, for `app.py` to offer: the first, whatever it shows."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for label in range(min(EXAMPLES, len(evaluation.table.classes))):
        image = evaluation.table[int((evaluation.labels == label).argmax())].image
        with complete(folder / f"{label:02}.png") as beside:
            Image.fromarray(image).save(beside)


def seed_curve(result: dict) -> list[float] | None:
    """The mean accuracy in each epoch of the recipe `seed` on the same data and width, if it is among our results."""
    if result["recipe"] == "seed":
        return None
    same = ("source", "fingerprint", "width", "valid")
    others = [json.loads(path.read_text()) for path in RESULTS.glob("seed-*.json")]
    others = [other["history"] for other in others if all(other[name] == result[name] for name in same)]
    if not others:
        return None
    return [sum(row["valid_accuracy"] for row in epoch) / len(epoch) for epoch in zip(*others, strict=True)]


def write_card(run: Path, result: dict) -> None:
    """The run's `README.md`, a model card as the Hugging Face Hub shows it."""
    from train_fastai import main

    unlike = {"out": None, "resume": None, "max_minutes": None}
    command = command_line(main, result["arguments"], result["processes"], **unlike)
    n, classes, best = result["images"], result["classes"], result["best_epoch"]
    where = "a tenth of the training set, held out" if result["valid"] == "holdout" else "the test set"
    figures = [
        ("accuracy after the last epoch", result["last_accuracy"], "the headline"),
        ("accuracy with TTA", result["tta_accuracy"], "each image together with its mirror image"),
        ("accuracy after the best epoch", result["best_accuracy"], f"epoch {best}, chosen on these images: flattered"),
        ("expected calibration error", result["calibration_error"], "0 % is as sure as right"),
    ]
    figures = [(name, f"{100 * value:.2f} %", how) for name, value, how in figures if value is not None]
    names = [field.name for field in fields(Recipe) if field.name not in ("data", "lr", "width")]
    settings = [(name, result[name]) for name in ("peak_lr", *names, "norm", "precision", "seed")]
    code = f"Code: commit `{result['commit']}`{'' if result['clean'] else ', changed'}. " if result["commit"] else ""
    trained_in = "" if best == result["epochs"] else f", but for the best epoch in {result['precision']}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    measured = {
        "task": {"type": "image-classification"},
        "dataset": {"type": result["source"], "name": result["source"]},
        "metrics": [{"type": "accuracy", "value": result["last_accuracy"], "name": "after the last epoch"}],
    }
    model = {"name": f"custom-resnet-{result['recipe']}", "results": [measured]}
    pictures = "\n".join(
        f"## {caption}\n\n![{caption}]({name}.png)\n"
        for name, caption in CAPTIONS.items()
        if (run / f"{name}.png").exists()
    )
    text = f"""---
library_name: fastai
pipeline_tag: image-classification
tags: [image-classification, fastai, resnet]
metrics: [accuracy]
model-index: {json.dumps([model])}
---

# Custom ResNet, recipe {result["recipe"]}, on {result["source"]}

A residual network of {result["parameters"]:,} parameters (width {result["width"]}) that tells {len(classes)} classes
apart: {", ".join(classes)}.

{markdown_table(("figure", "value", ""), figures)}

All on {n["valid"]:,} images, {where}, in fp32{trained_in}; trained in {result["precision"]}.

## Use

```python
from fastai.learner import load_learner

learn = load_learner("export.pkl")  # a program: only if you trust its author
label, index, probabilities = learn.predict("picture.png")
```

`model.safetensors` holds the same weights as data, with architecture, classes and normalisation in its header.

## Training

```sh
{command}
```

{markdown_table(("setting", "value"), settings)}

Data: {result["source"]}, {n["train"]:,} images to train on; SHA-256 over classes, labels, split and pixels
`{result["fingerprint"]}`. It took {result["seconds"]:.0f} seconds on {result["device"]} ({result["device_name"]}),
all included. {code}Versions: {versions}.

## Limits

Whatever a picture shows, the answer is one of the {len(classes)} classes. The network sees 32x32 pixels: larger
pictures are squeezed. This is one training with one seed; another seed gives another figure.

{pictures}"""
    with complete(run / "README.md") as beside:
        beside.write_text(text)


def markdown_table(names: Sequence[str], rows: Iterable[Sequence]) -> str:
    """The rows under the names of the columns."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


def read_result(run: Path) -> dict:
    """What is in the run's `result.json`. Raises InputError where there is none."""
    from train_fastai import main

    try:
        result = json.loads((run / "result.json").read_text())
        if result["arguments"].keys() != defaults(main).keys() or "calibration_error" not in result:
            raise KeyError
    except OSError as e:
        raise InputError(f"{run}: not the folder of a run that has ended, no result.json ({e.strerror})") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{run}/result.json: not that of a run of this version of the project") from e
    return result


def draw_again(run: Path, device: str) -> None:
    """All pictures of the run and its README, from its weights and the images it was trained on."""
    from evaluation import evaluate
    from lr_finder import RangeTest
    from pictures import save_augmentations, save_lr_find
    from train_fastai import new_learner

    result = read_result(run)
    given = result["arguments"]
    learn = new_learner(SimpleNamespace(**given), recipe_of(given), get_device(device))
    if learn.dls.train_ds.items.fingerprint() != result["fingerprint"]:
        raise InputError(f"{run}: the images in {given['data'] or result['data']} are not those that it was trained on")
    learn.path = run
    learn.load("last", with_opt=False)
    save_augmentations(learn.dls, run / "augmentations.png")
    if test := RangeTest.load(run):
        save_lr_find(test, run / "lr_find.png", result["peak_lr"])
    write_report(learn, result, evaluate(learn))
    print(f"see          {run / 'README.md'}")


def compare(runs: list[Path], picture: Path) -> None:
    """A table of the runs' accuracies for each recipe, and their curves in one picture."""
    from pictures import runs_table, save_comparison

    results = sorted((read_result(run) for run in runs), key=lambda result: (result["recipe"], result["seed"]))
    for name in ("source", "valid"):
        if len(values := {result[name] for result in results}) > 1:
            raise InputError(f"{name} is {' in one, '.join(sorted(values))} in another; compare like with like")
    groups = defaultdict(list)
    for result in results:
        name = f"{result['recipe']}, width {result['width']}, {result['epochs']} epochs, {result['precision']}"
        groups[name].append(result)
    for name, group in groups.items():
        print(f"{name}: accuracy on {group[0]['source']} ({group[0]['valid']}), in %\n\n{runs_table(group)}\n")
    save_comparison(groups, picture)
    print(f"see          {picture}")


def main(
    runs: Annotated[str, {"nargs": "+"}],  # Folders of runs that have ended
    picture: str = "comparison.png",  # Where to draw several runs' curves
    device: str = "auto",  # To test one run's network on: auto, cpu or cuda
):
    """Draw the pictures of one run again and write its README, or compare several runs."""
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # fastai's import
    folders = [Path(run) for run in runs]
    if len(folders) == 1:
        draw_again(folders[0], device)
    else:
        compare(folders, Path(picture))


if __name__ == "__main__":
    run_command(main)
