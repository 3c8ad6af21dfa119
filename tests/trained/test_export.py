"""The files of a trained model, and that they load where and only where they should."""

import base64
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest
import torch
from conftest import RESULT, ROOT, main
from fastai.basics import noop
from fastai.learner import load_learner
from PIL import Image
from safetensors.torch import load_file, save, save_file

from data import get_dls
from errors import InputError
from recipes import get_recipe
from train_fastai import get_learner
from trained import onnx_file
from trained.header import HEADER
from trained.learner_file import export
from trained.loading import load_model
from trained.onnx_file import save_onnx
from trained.safe_file import load_safetensors, save_safetensors
from training.precision import full_precision

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
ours = {"train_fastai", "data", "loader", "images", "model", "aug", "export", "training", "trained", "errors"}
ours.add("albumentations")
assert not ours & set(sys.modules), ours & set(sys.modules)
"""


def test_the_exported_learner_needs_nothing_of_this_project(learner, tmp_path):
    export(learner, tmp_path / "model.pkl")
    with full_precision(learner):
        accuracy = learner.validate()[1]
    valid = learner.dls.valid_ds.items
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, item in enumerate(valid[j] for j in range(len(valid))):
        Image.fromarray(item.image).save(folder / f"{item.label}-{i:03}.png")
    # -I leaves out the current folder and PYTHONPATH; the test's own path must not help either.
    words = [sys.executable, "-I", "-c", LOAD, str(tmp_path / "model.pkl"), str(folder)]
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


def test_what_somebody_exports_with_our_loaders_needs_nothing_of_this_project_either(tmp_path):
    script = """
import sys
from fastai.learner import Learner, load_learner
from torch import nn
from data import get_dls
Learner(get_dls("digits", device="cpu"), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), nn.CrossEntropyLoss(),
        path=".").export()
root = sys.path.pop(0)
for name, module in list(sys.modules.items()):
    if (getattr(module, "__file__", None) or "").startswith(root):
        del sys.modules[name]
print(len(load_learner("export.pkl").dls.vocab), "loader" in sys.modules)
"""
    words = [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}\n{script}"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout == "10 False\n", result.stderr


def test_the_safe_file_holds_the_network_and_what_goes_with_it(learner, safe_file):
    classifier, header = load_safetensors(safe_file)
    pixels, _ = learner.dls.valid_ds.items.batch(list(range(100)))
    with full_precision(learner):
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


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_safe_file_keeps_the_norm(tmp_path, norm):
    learn = get_learner(get_dls("digits", bs=64, flip=0, device="cpu"), get_recipe("demo", width=2), norm)
    save_safetensors(learn, tmp_path / "model.safetensors", RESULT | {"width": 2, "norm": norm})
    classifier, _ = load_safetensors(tmp_path / "model.safetensors")
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(classifier.network(x), learn.model.eval()(x), atol=1e-5)


def test_a_run_on_a_hold_out_is_measured_as_its_files_answer(tmp_path, capsys):
    options = {"recipe": "demo", "width": 2, "epochs": 1, "device": "cpu", "precision": "fp32", "no_lr_find": True}
    held_out = {"valid": "holdout", "valid_pct": 0.4}
    run = tmp_path / "run"
    result = main(**options, **held_out, no_pictures=True, out=str(run))
    table = get_dls("digits", bs=64, device="cpu", **held_out).valid_ds.items
    pixels, labels = table.batch(range(len(table)))
    safe, learned = (load_model(run / name, "cpu").logits(pixels) for name in ("model.safetensors", "model.pkl"))
    assert np.allclose(safe, learned, atol=1e-4)
    assert (safe.argmax(1) == labels).mean() == pytest.approx(result["last_accuracy"], abs=1e-6)


def test_a_learner_that_was_just_trained_is_exported_for_evaluation(tmp_path):
    learn = get_learner(get_dls("digits", bs=64, flip=0, device="cpu"), get_recipe("demo", width=2), path=tmp_path)
    learn.model.train()
    export(learn, tmp_path / "model.pkl")
    model, (pixels, _) = load_model(tmp_path / "model.pkl", "cpu"), learn.dls.valid_ds.items.batch(range(8))
    assert np.allclose(model.logits(pixels)[:1], model.logits(pixels[:1]), atol=1e-5)
    assert load_learner(tmp_path / "model.pkl").path == Path("."), "no path of this machine"


def test_the_same_run_is_the_same_safe_file(learner, tmp_path):
    for i in range(8):
        save_safetensors(learner, tmp_path / f"{i}.safetensors", RESULT)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


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


def weights(change):
    """A function that rewrites the file with tensors that `change` has had its hands on."""

    def rewrite(path):
        _, header = load_safetensors(path)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {HEADER: json.dumps(header)})

    return rewrite


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
    "no accuracy": headed(lambda header: header.pop("last_accuracy")),
    "an accuracy of words": headed(lambda header: header.update(last_accuracy="best")),
    "a source of numbers": headed(lambda header: header.update(source=1)),
    "weights of half the size": other_type,
    "weights of nan": weights(lambda tensors: tensors["head.bias"].fill_(float("nan"))),
    "weights of inf": weights(lambda tensors: tensors["body.0.weight"][0, 0, 0].fill_(float("inf"))),
    "a variance below 0": weights(lambda tensors: tensors["body.1.running_var"][0].fill_(-0.5)),
    "a std of 0": headed(lambda header: header["normalization"].update(std=[0.2, 0, 0.2])),
    "a mean of truths": headed(lambda header: header["normalization"].update(mean=[True, False, True])),
    "a mean without end": headed(lambda header: header["normalization"].update(mean=[0.5, 0.5, float("inf")])),
    "a huge scale": headed(lambda header: header["architecture"].update(logit_scale=1e308)),
    "an accuracy of nan": headed(lambda header: header.update(last_accuracy=float("nan"))),
    "two classes of a name": headed(lambda header: header["classes"].__setitem__(1, "0")),
    "half a character": headed(lambda header: header["classes"].__setitem__(1, "\ud800")),
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


# Every file, where this project is not

READERS = {
    "model.pkl": """
from fastai.basics import load_learner, noop
learn = load_learner(path)
learn.remove_cb(learn.progress) if hasattr(learn, "progress") else None
logits = learn.get_preds(dl=learn.dls.test_dl(list(images), bs=64), act=noop)[0]
""",
    # The network written down once more, as a stranger would who has the file's header and names
    "model.safetensors": """
import json, torch
from safetensors import safe_open
from torch.nn import functional as F
with safe_open(path, framework="pt") as file:
    header = json.loads(file.metadata()["custom-resnet"])
    w = {name: file.get_tensor(name) for name in file.keys()}
def layer(x, conv, norm, pool=False):
    x = F.conv2d(x, w[conv + ".weight"], padding=1)
    x = F.max_pool2d(x, 2) if pool else x
    return F.relu(F.batch_norm(x, *(w[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))))
def block(x, name):
    x = layer(x, name + ".stem.0", name + ".stem.2", pool=True)
    return x + layer(layer(x, name + ".res.0", name + ".res.1"), name + ".res.3", name + ".res.4")
mean, std = (torch.tensor(header["normalization"][key])[:, None, None] for key in ("mean", "std"))
x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
x = block(layer(x, "body.0", "body.1"), "body.3")
x = block(layer(x, "body.4", "body.6", pool=True), "body.8")
x = F.linear(F.max_pool2d(x, 4).flatten(1), w["head.weight"], w["head.bias"])
logits = x * header["architecture"]["logit_scale"]
""",
    "model.onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
logits = np.concatenate([session.run(None, {"images": part})[0] for part in np.split(images, [1, 8])])
""",
    "model.pt2": """
import torch
network = torch.export.load(path).module()
logits = torch.cat([network(torch.from_numpy(part)) for part in np.split(images, [1, 8])]).detach()
""",
}
IN_A_PROCESS_OF_ITS_OWN = """
import sys
import numpy as np
path, folder = sys.argv[1:]
images = np.load(folder + "/images.npy")
{}
ours = {{"train_fastai", "data", "loader", "images", "model", "trained", "export", "training", "errors", "files"}}
assert not ours & set(sys.modules), ours & set(sys.modules)
np.save(folder + "/logits.npy", np.asarray(logits))
"""


@pytest.mark.parametrize("name", READERS)
def test_each_file_gives_the_learners_logits_where_this_project_is_not(learner, trained, tmp_path, name):
    images = learner.dls.train_ds.items.images[:1000]
    with learner.no_bar(), full_precision(learner):
        expected, _ = learner.get_preds(dl=learner.dls.test_dl(list(images), bs=64), act=noop)
    np.save(tmp_path / "images.npy", images)
    code = IN_A_PROCESS_OF_ITS_OWN.format(READERS[name])
    words = [sys.executable, "-I", "-W", "ignore", "-c", code, str(trained / name), str(tmp_path)]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    logits = np.load(tmp_path / "logits.npy")
    assert logits.shape == (1000, 10)
    assert np.abs(logits - expected.numpy()).max() <= 1e-4
    assert expected.std() > 0.5, "they are not all the same"


@pytest.mark.parametrize("name", READERS)
def test_each_file_is_read_back_with_what_goes_with_it(trained, name):
    model = load_model(trained / name, "cpu")
    assert model.classes == RESULT["classes"]
    assert name == "model.pkl" or model.header == load_safetensors(trained / "model.safetensors")[1]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("harm", ["empty", "words", "cut off", "a pickle", "somebody else's", "torch's format"])
def test_a_file_of_any_kind_that_is_none_is_one_line(trained, tmp_path, monkeypatch, name, harm):
    path = tmp_path / name
    monkeypatch.chdir(tmp_path)
    path.write_bytes((trained / name).read_bytes())
    HARMS[harm](path)
    with pytest.raises(InputError, match=rf"{re.escape(name)}: not a {path.suffix} file of this project \(.+\)$") as e:
        load_model(path)
    assert len(str(e.value)) < len(str(path)) + 150
    assert name == "model.pkl" or not (tmp_path / "evil").exists(), "what is in it has been run"


def test_an_onnx_file_of_somebody_else_is_refused(trained, tmp_path):
    model = onnx.load(trained / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"other\.onnx: not a \.onnx file of this project"):
        load_model(tmp_path / "other.onnx")


ONNX_HEADER = {
    "format": 1, "architecture": {"num_classes": 2, "logit_scale": 1.0}, "normalization": {"mean": [0.5] * 3,
    "std": [0.5] * 3}, "classes": ["a", "b"], "source": "digits", "valid": "test", "last_accuracy": 0.5,
}  # fmt: skip


def onnx_graph(path, name="images", kind=onnx.TensorProto.UINT8, shape=("n", 32, 32, 3), nodes=(), tensors=()):
    """Write a model of our header that says of an image how red and how green it is, and whatever `nodes` add."""
    make = onnx.helper
    steps = [
        make.make_node("Cast", [name], ["floats"], to=onnx.TensorProto.FLOAT),
        make.make_node("ReduceMean", ["floats", "sides"], ["means"], keepdims=0),
        make.make_node("Gather", ["means", "channels"], ["red" if nodes else "logits"], axis=1),
    ]
    arrays = {"sides": np.array([1, 2]), "channels": np.array([0, 1]), "true": np.array(True), "one": np.float32(1)}
    initializers = [onnx.numpy_helper.from_array(value, key) for key, value in arrays.items()]
    taken = make.make_tensor_value_info(name, kind, shape)
    given = make.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 2])
    graph = make.make_graph([*steps, *nodes], "graph", [taken], [given], [*initializers, *tensors])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    model.metadata_props.add(key=HEADER, value=json.dumps(ONNX_HEADER))
    path.write_bytes(model.SerializeToString())
    return path


def test_an_onnx_file_takes_what_ours_take(tmp_path):
    red = np.full((1, 32, 32, 3), [4, 2, 0], np.uint8)
    path = tmp_path / "a.onnx"
    assert load_model(onnx_graph(path)).logits(red).tolist() == [[4, 2]]
    for other in (
        {"name": "x"},
        {"kind": onnx.TensorProto.FLOAT},
        {"shape": ("n", 3, 32, 32)},
        {"shape": (2, 32, 32, 3)},
    ):
        with pytest.raises(InputError, match=r"a\.onnx: not .* \(ValueError it does not make floats of images, uint8"):
            load_model(onnx_graph(path, **other))


def test_an_onnx_file_that_never_ends_is_one_line(tmp_path, monkeypatch, capfd):
    make, kinds = onnx.helper, onnx.TensorProto
    values = {"i": (kinds.INT64, []), "go": (kinds.BOOL, []), "sum": (kinds.FLOAT, None)}
    step = [make.make_node("Identity", ["go"], ["on"]), make.make_node("Add", ["sum", "one"], ["more"])]
    given = {"on": (kinds.BOOL, []), "more": (kinds.FLOAT, None)}
    ends = [[make.make_tensor_value_info(name, *value) for name, value in part.items()] for part in (values, given)]
    loop = make.make_node("Loop", ["", "true", "red"], ["logits"], body=make.make_graph(step, "step", *ends))
    monkeypatch.setattr(onnx_file, "SECONDS", 0.3)
    model = load_model(onnx_graph(tmp_path / "a.onnx", nodes=[loop]))
    with pytest.raises(InputError, match=r"a\.onnx: not .* \(TimeoutError no answer in 0\.3 s\)"):
        model.logits(np.zeros((1, 32, 32, 3), np.uint8))
    assert capfd.readouterr() == ("", "")


def test_an_answer_that_is_no_number_is_one_line(tmp_path):
    nodes = [onnx.helper.make_node("Log", ["red"], ["logits"])]
    with pytest.raises(InputError, match="the network's answer is not a finite number for each class"):
        load_model(onnx_graph(tmp_path / "a.onnx", nodes=nodes)).probabilities(np.zeros((1, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "link"])
def test_an_onnx_file_reads_no_other_file(tmp_path, place):
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to("../secret")
    tensor = onnx.TensorProto(name="more", data_type=onnx.TensorProto.FLOAT, dims=[2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": place, "offset": "0", "length": "8"}.items():
        tensor.external_data.add(key=key, value=value)
    nodes = [onnx.helper.make_node("Add", ["red", "more"], ["logits"])]
    with pytest.raises(InputError, match=r"a\.onnx: not a \.onnx file of this project"):
        load_model(onnx_graph(tmp_path / "in/a.onnx", nodes=nodes, tensors=[tensor]))


def test_what_runs_on_the_cpu_refuses_another_device(trained):
    for name in ("model.onnx", "model.pt2"):
        with pytest.raises(InputError, match=r"--device cuda: .* runs on the CPU"):
            load_model(trained / name, "cuda")


# The command


def export_command(*arguments, **env):
    words = [sys.executable, "export.py", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


@pytest.fixture
def run(trained, tmp_path):
    """The folder of a run that has finished, as far as `export.py` wants it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("model.safetensors", "model.pkl"):
        (folder / name).write_bytes((trained / name).read_bytes())
    (folder / "README.md").write_text('# card of "USER/NAME"\n')
    (folder / "result.json").write_text("{}")
    Image.new("RGB", (2, 2)).save(folder / "loss.png")
    for name in (".lock", ".loss.7.png", "checkpoint.pth", "notes.txt"):  # whose business it is not
        (folder / name).write_text("")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard/events").write_text("many")
    return folder


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_the_command_writes_the_file_beside_the_safe_one(run, trained, to):
    result = export_command(run, "--to", to)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"see          {run}/model.{to}, 1.")
    x = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    written, other = load_model(run / f"model.{to}"), load_model(trained / "model.safetensors")
    assert np.allclose(written.logits(x), other.logits(x), atol=1e-4)
    assert not list(run.glob(f".model*{to}"))


def test_weights_of_16_bits_take_half_the_room_and_answer_alike(run, trained, learner):
    result = export_command(run, "--to", "half")
    path, whole = run / "model.half.safetensors", run / "model.safetensors"
    assert (result.returncode, result.stderr) == (0, "")
    assert path.stat().st_size < 0.51 * whole.stat().st_size
    images = learner.dls.valid_ds.items.batch(list(range(300)))[0]
    model, other = load_model(path, "cpu"), load_model(whole, "cpu")
    assert model.header == other.header
    difference = np.abs(model.probabilities(images) - other.probabilities(images)).max()
    assert 0 < difference < 0.01
    assert (model.logits(images).argmax(1) == other.logits(images).argmax(1)).mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nosuch", "--to", "onnx"], "nosuch: no such file"),
        ([".", "--to", "onnx"], r"\.: not the folder of a run that has finished"),
        (["RUN"], "nothing to do; pass --to onnx, pt2 or half, or --push USER/NAME"),
        (["RUN", "--to", "tflite"], "invalid choice: 'tflite'"),
        (["RUN", "--private", "--to", "onnx"], "--private goes with --push"),
        (["RUN", "--push", "me/x"], "no token for the Hugging Face Hub; log in with hf auth login, or set HF_TOKEN"),
        (["RUN/model.safetensors", "--push", "me/x"], "not the folder of a run that has finished"),
    ],
)
def test_what_cannot_be_exported_is_one_line(run, tmp_path, arguments, line):
    words = [word.replace("RUN", str(run)) for word in arguments]
    result = export_command(*words, HF_HOME=str(tmp_path), HF_TOKEN="")
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(f"export.py: error: .*{line}.*\n", result.stderr), result.stderr


def test_onnx_without_its_packages_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnx is not installed; pip install -r requirements-onnx\.txt"):
        save_onnx(*load_safetensors(run / "model.safetensors"), run / "model.onnx")


# Publishing, against a stub of the Hub's API: the Hub itself has not been tried


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does when a repository is made and files are committed, as far as that goes."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        store, path = self.server.store, self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            store["made"] = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/me/x", "id": "me/x"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/me/x/preupload/main":
            lfs = (".safetensors", ".pkl")
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(lfs) else "regular" for name in files}
            self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif path == "/me/x.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            put = {o["oid"]: f"http://{self.headers['Host']}/put/{o['oid']}" for o in objects}
            found = [{**o, "actions": {"upload": {"href": put[o["oid"]]}}} for o in objects]
            self.answer({"transfer": "basic", "objects": found})
        elif path == "/api/models/me/x/commit/main":
            store["commit"] = [json.loads(line) for line in body.splitlines()]
            self.answer(
                {"success": True, "commitOid": "1", "commitUrl": f"http://{self.headers['Host']}/me/x/commit/1"}
            )
        else:
            self.answer({"error": f"the stub does not know {path}"}, 404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.store.setdefault("put", {})[self.path.removeprefix("/put/")] = body
        self.answer({})

    def do_GET(self):
        self.answer({"error": "not there"}, 404)

    do_HEAD = do_GET

    def answer(self, content, code=200):
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.store = {}
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def push(run, hub, token="hf_good", *more):
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    return export_command(run, "--push", "me/x", *more, HF_TOKEN=token, HF_HOME=str(run.parent), **where)


def test_a_run_is_sent_with_its_card_and_without_logs(run, hub):
    result = push(run, hub)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"see          http://127.0.0.1:{hub.server_port}/me/x\n"
    made, (header, *files) = hub.store["made"], hub.store["commit"]
    assert (made["name"], made["organization"]) == ("x", "me")
    assert not made.get("private")
    assert header["value"]["summary"] == "Add run"
    sent_names = {"README.md", "result.json", "model.safetensors", "model.pkl", "loss.png"}
    assert {file["value"]["path"] for file in files} == sent_names
    card = next(file["value"] for file in files if file["value"]["path"] == "README.md")
    assert base64.b64decode(card["content"]) == b'# card of "me/x"\n'
    sent = {hashlib.sha256(body).hexdigest() for body in hub.store["put"].values()}
    assert sent == {file["value"]["oid"] for file in files if file["key"] == "lfsFile"}
    assert hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest() in sent


def test_a_repository_can_be_private(run, hub):
    assert push(run, hub, "hf_good", "--private").returncode == 0
    assert hub.store["made"].get("private") or hub.store["made"].get("visibility") == "private"


def test_what_the_hub_refuses_is_one_line(run, hub):
    result = push(run, hub, token="hf_wrong")
    assert result.returncode == 2
    assert re.fullmatch(r"export.py: error: --push me/x: the Hub does not take it \(.*401.*\)\n", result.stderr)
    hub.shutdown()
    hub.server_close()
    result = push(run, hub)
    assert result.returncode == 2
    assert re.fullmatch(r"export.py: error: --push me/x: the Hub does not take it \(ConnectError.*\)\n", result.stderr)


def test_a_run_without_a_card_is_not_sent(run, hub):
    (run / "README.md").unlink()
    result = push(run, hub)
    assert result.returncode == 2
    assert "has no model card; python report.py" in result.stderr
    assert hub.store == {}
