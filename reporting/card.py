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
MOST_CLASSES = 100  # that the card names
WITH_FASTAI = Template("""
With fastai, in Python $python (`pip install fastai huggingface_hub toml`):

```python
from huggingface_hub import from_pretrained_fastai

learn = from_pretrained_fastai("USER/NAME")  # the Hub's; it runs the code in model.pkl: do you trust its author?
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
    "reliability": "Reliability: accuracy at each confidence",
    "wrong": "The most confident mistakes, and where in the image they come from (Grad-CAM)",
    "uncertain": "The least certain predictions",
    "augmentations": "Augmented training images",
}


def write_card(run: Path, options: Options, result: dict, note: str = "") -> None:
    """Write the run's `README.md`, from the template `card.md`; `note` is a sentence about the figures."""
    n = result["images"]
    names, more = result["classes"][:MOST_CLASSES], " …" * (len(result["classes"]) > MOST_CLASSES)
    python = result["versions"]["python"].rpartition(".")[0]
    precision, earlier = result["precision"], result["best_epoch"] != result["epochs"]
    has_learner = (run / "model.pkl").exists()
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
        library="fastai" if has_learner else "pytorch",
        note=note and f" {note}",
        but=f", but for the best epoch in {precision}" if earlier and precision != "fp32" else "",
        command=options.command(result["processes"], out=None, resume=None, max_minutes=None),
        settings=markdown_table(("setting", "value"), settings(result)),
        seconds=f"{sum(row['seconds'] for row in result['history']):.0f}",
        code=code(result),
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        with_fastai=WITH_FASTAI.substitute(python=python) if has_learner else "",
        pictures=pictures(run),
    )
    with complete(run / "README.md") as beside:
        beside.write_text(text, encoding="utf-8")


def code(result: dict) -> str:
    """The code's repository and commit, as far as git knows."""
    if not result["commit"]:
        return "this project's"
    address = result.get("repository")  # older runs have none
    where = f"[{address.removeprefix('https://')}]({address}), " if address else ""
    return f"{where}commit `{result['commit']}`{'' if result['clean'] else ', changed'}"


def model_index(result: dict) -> dict:
    """The accuracy, in the Hub's format."""
    measured = {
        "task": {"type": "image-classification"},
        "dataset": {"type": result["source"], "name": result["source"]},
        "metrics": [{"type": "accuracy", "value": result["last_accuracy"], "name": "after the last epoch"}],
    }
    return {"name": f"custom-resnet-{result['recipe']}", "results": [measured]}


def figures(result: dict) -> list[tuple[str, str, str]]:
    """Name, value and a comment for each accuracy and the calibration error."""
    optimistic = result["best_accuracy"] > result["last_accuracy"]
    best = f"epoch {result['best_epoch']}{', chosen on these images: optimistic' if optimistic else ''}"
    best = "the last one" if result["best_epoch"] == result["epochs"] else best
    rows = [
        ("accuracy after the last epoch", "last_accuracy", "the headline"),
        ("accuracy with TTA", "tta_accuracy", "logits averaged over each image and its mirror image"),
        ("accuracy after the best epoch", "best_accuracy", best),
        ("expected calibration error", "calibration_error", "0 %: confidence equals accuracy"),
    ]
    return [(name, f"{100 * result[key]:.2f} %", how) for name, key, how in rows if result[key] is not None]


def settings(result: dict) -> list[tuple[str, object]]:
    """Name and value of each training setting."""
    names = [field.name for field in fields(Recipe) if field.name not in ("data", "lr", "width")]
    return [(name, result[name]) for name in ("peak_lr", *names, "norm", "precision", "seed")]


def pictures(run: Path) -> str:
    """The run's pictures in Markdown, each under its caption."""
    shown = {name: caption for name, caption in CAPTIONS.items() if (run / f"{name}.png").exists()}
    return "\n".join(f"## {caption}\n\n![{caption}]({name}.png)\n" for name, caption in shown.items())
