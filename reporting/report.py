"""All pictures of a run, and the model card that shows them."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from fastai.learner import Learner, load_model
from PIL import Image

from errors import InputError
from files import complete, locked
from options import Options, read_config
from recipes import RECIPES
from reporting.card import CAPTIONS, write_card
from reporting.evaluation import Evaluation, evaluate
from reporting.pictures import (
    save_augmentations,
    save_classes,
    save_confusion,
    save_examples,
    save_history,
    save_lr_find,
    save_reliability,
    save_schedules,
)
from reporting.settings import changes
from trained.classifier import classifier_of, grad_cam
from trained.device import get_device
from trained.learner_file import export
from training.distributed import is_rank0, on_rank0
from training.learner import new_learner
from training.lr_finder import RangeTest
from training.run import Run

EXAMPLES = 12  # images in each picture of examples
RESULTS = Path(__file__).parents[1] / "results/runs"


def write_report(learn: Learner, options: Options, result: dict, evaluation: Evaluation) -> None:
    """Write all pictures of the training and the trained network to `learn.path`, and the README that shows them."""
    run, classifier = learn.path, classifier_of(learn)
    print(f"pictures     {len(CAPTIONS)} of them, and the README that shows them")
    what = f"{result['source']}, recipe {result['recipe']}, width {result['width']}, seed {result['seed']}"
    mixed = "" if result["precision"] == "fp32" else f", in {result['precision']}"  # the files' figures are in fp32
    save_history(result["history"], run, what + mixed, seed_curve(result))
    recipe = replace(options.settings(), lr=result["peak_lr"])
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
    write_card(run, options, result)


def draw_again(run: Run, device: str, pictures: bool = True) -> None:
    """Draw all pictures of a finished run and write its README, from its weights and images; first `model.pkl`, if
    there is none.

    device: its name. pictures: False for `model.pkl` only. If there are several processes, all call this, and the first
    does it. Raises InputError if the run has not finished, or the images have changed.
    """
    result = on_rank0(run.result)
    _, options = on_rank0(read_config, run.folder)
    with locked(run.folder) if is_rank0() else nullcontext():
        # In fp32, as the figures are measured, and without workers: this machine may be another than the run's.
        learn = new_learner(replace(options, precision="fp32", workers=0), get_device(device))  # images in turns
        if not is_rank0():
            return
        if learn.dls.train_ds.items.fingerprint() != result["fingerprint"]:
            raise InputError(f"{run}: the images in {result['data']} are not those that it was trained on")
        learn.path = run.folder
        load_model(run / "models/last.pth", learn.model, None, with_opt=False)  # `learn.load` waits for all processes
        if not (run / "model.pkl").exists():
            export(learn, run / "model.pkl")
        if not pictures:
            return
        save_augmentations(learn.dls, run / "augmentations.png")
        if test := RangeTest.load(run.folder):
            save_lr_find(test, run / "lr_find.png", result["peak_lr"])
        write_report(learn, options, result, evaluate(learn))


def save_first_images(evaluation: Evaluation, folder: Path) -> None:
    """Write the first validation image of each of the first classes as PNG, as examples for `app.py`."""
    folder.mkdir(exist_ok=True)
    for label in range(min(EXAMPLES, len(evaluation.table.classes))):
        image = evaluation.table[int((evaluation.labels == label).argmax())].image
        with complete(folder / f"{label:02}.png") as beside:
            Image.fromarray(image).save(beside)


def seed_curve(result: dict) -> list[float] | None:
    """The mean accuracy of the unchanged recipe `seed` in each epoch, on the same data, width and norm.

    None if `results/` has no such run, or if this run's own recipe is `seed`.
    """
    if result["recipe"] == "seed":
        return None
    same = ("source", "fingerprint", "width", "valid", "norm")
    others = [json.loads(path.read_text()) for path in RESULTS.glob("seed-*.json")]
    alike = [o for o in others if all(o[name] == result[name] for name in same) and not changes(o, RECIPES["seed"])]
    curves = ([row["valid_accuracy"] for row in other["history"]] for other in alike)
    return [sum(epoch) / len(epoch) for epoch in zip(*curves, strict=True)] or None
