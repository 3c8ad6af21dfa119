"""The model that the project comes with: it is the one that its card describes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CIFAR_CLASSES, ROOT

import app
from trained.safe_file import load_safetensors

FOLDER = ROOT / "pretrained"
CIFAR10 = Path.home() / ".fastai/data/cifar10/test"


def predict(*words):
    return subprocess.run([sys.executable, "predict.py", *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def test_it_knows_a_cat():
    result = predict("pretrained", "pretrained/examples/cat.png", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["label"] == "cat"


def test_its_files_tell_the_same():
    result, (classifier, header) = (
        json.loads((FOLDER / "result.json").read_text()),
        load_safetensors(FOLDER / "model.safetensors"),
    )
    assert header["classes"] == result["classes"] == CIFAR_CLASSES
    assert sum(p.numel() for p in classifier.network.parameters()) == result["parameters"] == 6_573_130
    assert header["last_accuracy"] == result["last_accuracy"]
    assert f"{100 * result['last_accuracy']:.2f} %" in (FOLDER / "README.md").read_text()


def test_it_is_what_the_page_shows_where_no_other_is_named(tmp_path):
    app.main(app.Options(space=str(tmp_path / "space")))
    assert (tmp_path / "space/model.safetensors").read_bytes() == (FOLDER / "model.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "space/examples").iterdir()] == ["cat.png"]


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not here")
def test_its_accuracy_is_the_one_it_states():
    result = predict("pretrained", CIFAR10, "--eval")
    assert result.returncode == 0, result.stderr
    stated = 100 * json.loads((FOLDER / "result.json").read_text())["last_accuracy"]
    assert float(result.stdout.split()[-2]) == pytest.approx(stated, abs=0.02), "the last line, of all images"
