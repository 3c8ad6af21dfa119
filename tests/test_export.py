"""The files of a trained model, and that they load where and only where they should."""

import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from fastai.basics import noop
from PIL import Image
from safetensors.torch import load_file, save, save_file

from classifier import HEADER, load_safetensors
from errors import InputError
from export import export, save_safetensors

LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
from fastai.learner import load_learner
from PIL import Image
import numpy as np
from pathlib import Path
model, folder = sys.argv[1:]
learn = load_learner(model)
learn.remove_cb(learn.progress) if hasattr(learn, "progress") else None
paths = sorted(Path(folder).glob("*.png"))
logits, _ = learn.get_preds(dl=learn.dls.test_dl(paths, bs=64, num_workers=0))
names = [learn.dls.vocab[i] for i in logits.argmax(1)]
print("accuracy", sum(name == path.name[0] for name, path in zip(names, paths)) / len(paths))
for path, name in list(zip(paths, names))[:3]:
    image = Image.open(path)
    for item in (path, str(path), image, image.convert("RGBA"), np.array(image), path.read_bytes()):
        label, index, probabilities = learn.predict(item)
        assert label == name and abs(float(probabilities.sum()) - 1) < 1e-5, (path, type(item), label, name)
ours = {"train_fastai", "data", "images", "model", "aug", "export", "callbacks", "errors", "albumentations"}
assert not ours & set(sys.modules), ours & set(sys.modules)
"""
RESULT = {
    "classes": list("0123456789"), "width": 16, "norm": "batch", "logit_scale": 0.125, "source": "digits",
    "fingerprint": "ab", "recipe": "demo", "flip": 0.0, "epochs": 3, "seed": 0, "valid": "test", "last_accuracy": 0.98,
    "tta_accuracy": None, "versions": {"torch": torch.__version__},
}  # fmt: skip


def test_the_exported_learner_needs_nothing_of_this_project(learner, tmp_path):
    export(learner, tmp_path / "export.pkl")
    accuracy = learner.validate()[1]
    valid = learner.dls.valid_ds.items
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, item in enumerate(valid[j] for j in range(len(valid))):
        Image.fromarray(item.image).save(folder / f"{item.label}-{i:03}.png")
    # -I leaves out the current folder and PYTHONPATH; the test's own path must not help either.
    words = [sys.executable, "-I", "-c", LOAD, str(tmp_path / "export.pkl"), str(folder)]
    result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[1]) == pytest.approx(accuracy)
    assert accuracy > 0.9
    check = subprocess.run([sys.executable, "-I", "-c", "import model"], cwd=folder, capture_output=True, text=True)
    assert "ModuleNotFoundError" in check.stderr, "the project is not on the path of that process"
    assert find_spec("model") is not None


# The safe file


@pytest.fixture
def safe_file(learner, tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(learner, path, RESULT)
    return path


def test_the_safe_file_holds_the_network_and_what_goes_with_it(learner, safe_file):
    classifier, header = load_safetensors(safe_file)
    pixels, _ = learner.dls.valid_ds.items.batch(list(range(100)))
    expected, _ = learner.get_preds(act=noop)
    with torch.no_grad():
        assert torch.allclose(classifier(torch.from_numpy(pixels)), expected[:100], atol=1e-5)
    assert header["classes"] == RESULT["classes"]
    assert header["architecture"] == {"num_classes": 10, "width": 16, "norm": "batch", "logit_scale": 0.125}
    mean, std = learner.dls.train_ds.items.train_stats()
    assert header["normalization"] == {"mean": list(mean), "std": list(std)}
    assert (header["last_accuracy"], header["source"]) == (0.98, "digits")
    assert {path.name for path in safe_file.parent.iterdir()} == {"model.safetensors"}
    assert load_file(safe_file).keys() == classifier.network.state_dict().keys(), "others can read it"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def headed(change):
    """A function that rewrites the file with a header that `change` has had its hands on."""

    def rewrite(path):
        _, header = load_safetensors(path)
        change(header)
        save_file(load_file(path), path, {HEADER: json.dumps(header)})

    return rewrite


def other_type(path):
    _, header = load_safetensors(path)
    save_file({name: t.half() for name, t in load_file(path).items()}, path, {HEADER: json.dumps(header)})


HARMS = {
    "empty": lambda path: path.write_bytes(b""),
    "words": lambda path: path.write_text("these are words, and more of them"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "torch's format": lambda path: torch.save({"model": Evil()}, path),
    "somebody else's": lambda path: path.write_bytes(save({"weight": torch.ones(2)}, {"format": "pt"})),
    "no header": lambda path: path.write_bytes(save(load_file(path))),
    "header no JSON": lambda path: save_file(load_file(path), path, {HEADER: "{"}),
    "header a list": lambda path: save_file(load_file(path), path, {HEADER: "[1]"}),
    "header nested": lambda path: save_file(load_file(path), path, {HEADER: "[" * 100_000}),
    "another version": headed(lambda header: header.update(format=2)),
    "another width": headed(lambda header: header["architecture"].update(width=8)),
    "a huge width": headed(lambda header: header["architecture"].update(width=10**9)),
    "a width of words": headed(lambda header: header["architecture"].update(width="wide")),
    "another norm": headed(lambda header: header["architecture"].update(norm="layer")),
    "an unknown argument": headed(lambda header: header["architecture"].update(depth=3)),
    "a scale of words": headed(lambda header: header["architecture"].update(logit_scale="1")),
    "a scale of nan": headed(lambda header: header["architecture"].update(logit_scale=float("nan"))),
    "a class less": headed(lambda header: header["classes"].pop()),
    "classes no words": headed(lambda header: header.update(classes=list(range(10)))),
    "no mean": headed(lambda header: header["normalization"].pop("mean")),
    "a mean of two": headed(lambda header: header["normalization"].update(mean=[0.5, 0.5])),
    "weights of half the size": other_type,
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_safe_file_that_is_none_is_one_line_and_runs_nothing(safe_file, monkeypatch, harm):
    monkeypatch.chdir(safe_file.parent)
    harm(safe_file)
    with pytest.raises(InputError, match=r"model\.safetensors: not a \.safetensors file of this project \(.+\)$") as e:
        load_safetensors(safe_file)
    assert len(str(e.value)) < len(str(safe_file)) + 150
    assert {path.name for path in safe_file.parent.iterdir()} == {"model.safetensors"}


def test_a_safe_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.safetensors: cannot be read"):
        load_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r": cannot be read|not a .* file"):
        load_safetensors(tmp_path)
