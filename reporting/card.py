"""The run's README: a model card as the Hugging Face Hub shows it."""

import json
from dataclasses import fields
from pathlib import Path
from string import Template

from files import complete
from names import markdown
from options import Options
from recipes import Recipe
from reporting.tables import markdown_table

TEMPLATE = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
MOST_CLASSES = 100  # named in it
WITH_FASTAI = Template("""
With fastai, in Python $python (`pip install fastai huggingface_hub toml`):

```python
from huggingface_hub import from_pretrained_fastai

learn = from_pretrained_fastai("USER/NAME")  # the Hub's or this folder; it runs model.pkl: do you trust its author?
label, index, probabilities = learn.predict("picture.png")
```
""")
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


def write_card(run: Path, options: Options, result: dict) -> None:
    """The run's `README.md`: `card.md` with what is to be said of this run in its places."""
    n = result["images"]
    names, more = result["classes"][:MOST_CLASSES], " …" * (len(result["classes"]) > MOST_CLASSES)
    python = result["versions"]["python"].rpartition(".")[0]
    precision, earlier = result["precision"], result["best_epoch"] != result["epochs"]
    text = TEMPLATE.substitute(
        result | {name: markdown(result[name]) for name in ("source", "recipe")},
        index=json.dumps([model_index(result)]),
        n_train=f"{n['train']:,}",
        n_valid=f"{n['valid']:,}",
        n_classes=len(result["classes"]),
        classes=", ".join(map(markdown, names)) + more,
        parameters=f"{result['parameters']:,}",
        figures=markdown_table(("figure", "value", ""), figures(result)),
        images=f"{options.valid_pct:.0%} of the training set" if result["valid"] == "holdout" else "the test set",
        but=f", but for the best epoch in {precision}" if earlier and precision != "fp32" else "",
        command=options.command(result["processes"], out=None, resume=None, max_minutes=None),
        settings=markdown_table(("setting", "value"), settings(result)),
        seconds=f"{result['seconds']:.0f}",
        code=code(result),
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        with_fastai=WITH_FASTAI.substitute(python=python) if (run / "model.pkl").exists() else "",
        pictures=pictures(run),
    )
    with complete(run / "README.md") as beside:
        beside.write_text(text, encoding="utf-8")


def code(result: dict) -> str:
    """Where the code is, as far as git knows."""
    if not result["commit"]:
        return "this project's"
    address = result.get("repository")  # of an older run there is none
    where = f"[{address.removeprefix('https://')}]({address}), " if address else ""
    return f"{where}commit `{result['commit']}`{'' if result['clean'] else ', changed'}"


def model_index(result: dict) -> dict:
    """The accuracy as the Hub lists it."""
    measured = {
        "task": {"type": "image-classification"},
        "dataset": {"type": result["source"], "name": result["source"]},
        "metrics": [{"type": "accuracy", "value": result["last_accuracy"], "name": "after the last epoch"}],
    }
    return {"name": f"custom-resnet-{result['recipe']}", "results": [measured]}


def figures(result: dict) -> list[tuple[str, str, str]]:
    """Name, value and a word about each figure that there is."""
    best = f"epoch {result['best_epoch']}, chosen on these images: flattered"
    best = "the last one" if result["best_epoch"] == result["epochs"] else best
    rows = [
        ("accuracy after the last epoch", "last_accuracy", "the headline"),
        ("accuracy with TTA", "tta_accuracy", "each image together with its mirror image"),
        ("accuracy after the best epoch", "best_accuracy", best),
        ("expected calibration error", "calibration_error", "0 % is as sure as right"),
    ]
    return [(name, f"{100 * result[key]:.2f} %", how) for name, key, how in rows if result[key] is not None]


def settings(result: dict) -> list[tuple[str, object]]:
    """Name and value of each setting of the training."""
    names = [field.name for field in fields(Recipe) if field.name not in ("data", "lr", "width")]
    return [(name, result[name]) for name in ("peak_lr", *names, "norm", "precision", "seed")]


def pictures(run: Path) -> str:
    """Each picture that the run has, under its caption."""
    shown = {name: caption for name, caption in CAPTIONS.items() if (run / f"{name}.png").exists()}
    return "\n".join(f"## {caption}\n\n![{caption}]({name}.png)\n" for name, caption in shown.items())
