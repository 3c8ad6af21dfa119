"""What `predict.py` says of images, with each of the files of one model."""

import csv
import errno
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import RESULT, ROOT
from fastai.basics import accuracy
from PIL import Image
from safetensors.torch import load_file, save_file

import predict
from errors import parse, run_command
from images.decoding import read_image
from trained.header import HEADER
from trained.safe_file import load_safetensors
from training.precision import full_precision

FILES = ("model.safetensors", "model.onnx", "model.pt2", "model.pkl")


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that is the command line: its exit code, and what it printed and complained of."""

    def call(*words, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            run_command(predict.main, parse(predict.Options))
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


def rows(out):
    """What --json printed, by image."""
    return {row["image"]: row for row in map(json.loads, out.splitlines())}


def changed(trained, path, **change):
    """The safe file with another header."""
    _, header = load_safetensors(trained / "model.safetensors")
    save_file(load_file(trained / "model.safetensors"), path, {HEADER: json.dumps(header | change)})
    return path


@pytest.mark.parametrize("name", [*FILES, ""])
def test_every_file_and_the_folder_say_what_the_learner_says(learner, trained, run, name):
    code, out, err = run(trained / name, trained / "digits", "--json")
    assert (code, err) == (0, "")
    found = rows(out)
    with learner.no_bar(), learner.no_logging(), full_precision(learner):
        expected, labels = learner.get_preds()
    table = learner.dls.valid_ds.items
    names = [str(trained / "digits" / table[i].label / f"{i:03}.png") for i in range(len(table))]
    assert list(found) == sorted(names), "one row an image, in order"
    probabilities = np.array([[found[n]["probabilities"][c] for c in table.classes] for n in names])
    assert np.abs(probabilities - expected.numpy()).max() < 1e-4
    assert np.mean([found[n]["label"] == table[i].label for i, n in enumerate(names)]) == accuracy(expected, labels)
    first = list(found[names[0]]["probabilities"].values())
    assert first == sorted(first, reverse=True)


def test_images_folders_patterns_and_a_list_on_stdin(trained, run, tmp_path, monkeypatch):
    monkeypatch.chdir(trained / "digits")
    files = sorted(str(p.relative_to(trained / "digits")) for p in (trained / "digits/3").iterdir())
    pattern, folder = run(trained, "3/*.png", "--json"), run(trained, "3", "--json")
    listed = run(trained, "-", "--json", stdin="\n".join(files).encode() + b"\n\n")
    assert pattern == folder == listed == run(trained, *files, "--json")
    assert list(rows(folder[1])) == files
    deep = run(trained, "**/*0.png", "--json")
    assert list(rows(deep[1])) == sorted(str(p.relative_to(trained / "digits")) for p in (trained).rglob("*0.png"))
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_bytes(b"")
    Image.new("RGB", (50, 40)).save(tmp_path / "odd [1].gif")
    code, out, err = run(trained, tmp_path, "--json")
    assert (code, list(rows(out)), err) == (0, [str(tmp_path / "odd [1].gif")], "")
    assert list(rows(run(trained, tmp_path / "odd [1].gif", "--json")[1])) == [str(tmp_path / "odd [1].gif")]


def test_the_table_has_the_three_most_likely_classes(trained, run):
    path = next((trained / "digits/7").iterdir())
    probabilities = rows(run(trained, path, "--json")[1])[str(path)]["probabilities"]
    code, out, err = run(trained, path)
    top = "  ".join(f"{label:<2}{100 * p:6.2f} %" for label, p in list(probabilities.items())[:3])
    assert (code, out, err) == (0, f"{path}  {top}\n", "")


def test_csv_has_a_row_an_image(trained, run, tmp_path):
    path = tmp_path / 'a "name", with more.png'
    Image.new("RGB", (32, 32), "white").save(path)
    code, out, _ = run(trained, path, path, "--csv")
    probabilities = rows(run(trained, path, path, "--json")[1])[str(path)]["probabilities"]
    names, *lines = csv.reader(io.StringIO(out))
    assert names == ["image", "label1", "probability1", "label2", "probability2", "label3", "probability3"]
    cells = [str(cell) for pair in list(probabilities.items())[:3] for cell in pair]
    assert lines == [[str(path), *cells]] * 2
    assert code == 0


def test_images_that_cannot_be_used_are_named_and_counted_and_the_others_done(trained, run, tmp_path):
    good = next((trained / "digits/7").iterdir())
    (tmp_path / "words.png").write_text("these are words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    Image.new("1", (9000, 8000)).save(tmp_path / "huge.png")
    bad = ["words.png", "none.png", "empty", "no*.png", "cut.png", "huge.png"]
    code, out, err = run(trained, good, *(tmp_path / name for name in bad), good, "--json")
    assert code == 1
    assert [row["image"] for row in map(json.loads, out.splitlines())] == [str(good)] * 2
    lines = err.splitlines()
    assert len(lines) == 7
    assert lines[-1] == "predict.py: 6 could not be used"
    for name in bad:
        assert sum(line.startswith(f"predict.py: {tmp_path / name}: ") for line in lines) == 1, name
    assert run(trained, tmp_path / "words.png")[:2] == (1, "")


NAMES = ("~a.png", "b\fc\x85d\u2028e.png", "f\rg.png", os.fsdecode(b"h\xff.png"))


def test_any_name_that_a_file_can_have(trained, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / name).write_bytes(next((trained / "digits/7").iterdir()).read_bytes())
    listed = run(trained, "-", "--json", stdin=b"\n".join(map(os.fsencode, NAMES)))
    assert listed == run(trained, *NAMES, "--json")
    assert (listed[0], list(rows(listed[1])), listed[2]) == (0, list(NAMES), "")


def test_names_that_no_file_can_have_are_complained_of_one_by_one(trained, run, tmp_path):
    good = next((trained / "digits/7").iterdir())
    code, out, err = run(trained, "-", "x" * 300, "--json", stdin=b"a.png\0b.png\n" + os.fsencode(good))
    assert (code, list(rows(out))) == (1, [str(good)])
    first, second, last = err.splitlines()
    why = "stat: embedded null character in path" if sys.version_info >= (3, 13) else "embedded null byte"
    assert first == rf"predict.py: a.png\x00b.png: cannot be read ({why})"
    assert second == f"predict.py: {'x' * 300}: cannot be read (File name too long)"
    assert last == "predict.py: 2 could not be used"


def test_a_folder_that_cannot_be_read_is_named(trained, run, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").write_bytes(next((trained / "digits/7").iterdir()).read_bytes())
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):  # root, who may run this, reads everything
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, out, err = run(trained, tmp_path, "--json")
    assert (code, list(rows(out))) == (1, [str(tmp_path / "a.png")])
    assert err.splitlines()[0] == f"predict.py: {tmp_path}/locked: cannot be read (Permission denied)"


def test_closed_and_full_streams_are_one_line(trained, run, monkeypatch):
    good = next((trained / "digits/7").iterdir())
    assert run(trained, "-", stdin=None) == (
        2, "", "predict.py: error: -: stdin is closed; pipe a list of images into it, or name them\n",
    )  # fmt: skip
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        said = "predict.py: error: stdout: No space left on device; send it somewhere else\n"
        assert run(trained, good) == (2, "", said)
    monkeypatch.setattr(sys, "stdout", None)
    assert run(trained, good)[::2] == (2, "predict.py: error: stdout is closed; send it to a file, or to /dev/null\n")


def test_names_of_classes_where_a_terminal_knows_ascii_alone(trained, run, tmp_path, monkeypatch):
    model = changed(trained, tmp_path / "words.safetensors", classes=["ä", *RESULT["classes"][1:]])
    path, out = next((trained / "digits/0").iterdir()), {}
    for options in ((), ("--csv",)):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        assert run(model, path, *options)[::2] == (0, "")
        out[options] = written.getvalue()
    assert rb"\xe4" in out[()]
    assert "ä".encode() in out["--csv",], "for programs as it is"


def test_an_animated_image_is_said_to_be_one(trained, run, tmp_path):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    code, out, err = run(trained, tmp_path / "two.gif")
    assert (code, len(out.splitlines())) == (0, 1)
    assert err == f"predict.py: {tmp_path}/two.gif: animated; its first frame is taken\n"


def test_an_image_of_very_many_frames_is_no_slower(tmp_path):
    Image.new("P", (1, 1)).save(tmp_path / "one.gif")
    head, _, frame = (tmp_path / "one.gif").read_bytes().removesuffix(b";").rpartition(b",")
    (tmp_path / "many.gif").write_bytes(head + 500_000 * (b"," + frame) + b";")
    start, animated = time.perf_counter(), []
    assert read_image(tmp_path / "many.gif", animated.append).shape == (32, 32, 3)
    assert time.perf_counter() - start < 2, "to count them takes longer"
    assert animated == [str(tmp_path / "many.gif")]


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees, clockwise, to see it
    upright.rotate(90).save(tmp_path / "lying.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "lying.png", [].append), pixels)


def test_many_images_are_taken_in_batches(trained, run, monkeypatch):
    whole = rows(run(trained, trained / "digits", "--json")[1])
    monkeypatch.setattr(predict, "BATCH", 7)
    parts = rows(run(trained, trained / "digits", "--json")[1])
    assert list(whole) == list(parts)
    assert len(whole) == len(list((trained / "digits").rglob("*.png")))
    for name, row in whole.items():
        assert row["probabilities"] == pytest.approx(parts[name]["probabilities"], abs=1e-4)


def test_each_image_together_with_its_mirror_image(trained, run, tmp_path):
    model = changed(trained, tmp_path / "flipped.safetensors", flip=0.5)
    path = next((trained / "digits/2").iterdir())
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirror.png")
    plain = rows(run(model, path, tmp_path / "mirror.png", "--json")[1])
    both = rows(run(model, path, tmp_path / "mirror.png", "--json", "--tta")[1])
    logs = [{c: np.log(p + 1e-9) for c, p in row["probabilities"].items()} for row in plain.values()]
    mean = {c: np.exp((logs[0][c] + logs[1][c]) / 2) for c in RESULT["classes"]}
    for row in both.values():
        assert row["probabilities"] == pytest.approx({c: p / sum(mean.values()) for c, p in mean.items()}, abs=0.01)
    code, out, err = run(trained, path, "--tta")
    assert (code, out) == (2, "")
    assert "--tta" in err
    assert "has never learned from mirror images" in err


# Evaluation


def test_a_labelled_folder_gives_accuracy_and_a_table_of_classes(learner, trained, run):
    with learner.no_bar(), learner.no_logging(), full_precision(learner):
        probabilities, labels = learner.get_preds()
    right = (probabilities.argmax(1) == labels).numpy()
    code, out, err = run(trained, trained / "digits", "--eval", "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert (result["images"], result["accuracy"]) == (len(right), right.mean())
    for i, name in enumerate(RESULT["classes"]):
        mine, row = labels.numpy() == i, result["classes"][name]
        assert (row["images"], row["accuracy"]) == (mine.sum(), right[mine].mean())
    worst = min(result["classes"], key=lambda name: result["classes"][name]["accuracy"])
    taken = probabilities.argmax(1).numpy()[(labels.numpy() == int(worst)) & ~right]
    assert result["classes"][worst]["times"] == np.bincount(taken).max()
    lines = run(trained, trained / "digits", "--eval")[1].splitlines()
    assert lines[0].split() == ["class", "images", "accuracy", "most", "often", "taken", "for"]
    assert lines[-1].split() == ["all", str(len(right)), f"{100 * right.mean():.2f}", "%"]
    row = result["classes"][worst]
    often = "once" if row["times"] == 1 else f"{row['times']} times"
    assert lines[1 + int(worst)].endswith(f" %  {row['taken_for']}, {often}")
    table = list(csv.DictReader(io.StringIO(run(trained, trained / "digits", "--eval", "--csv")[1])))
    assert [row["class"] for row in table] == [*RESULT["classes"], ""]
    assert float(table[-1]["accuracy"]) == right.mean()


def test_images_that_cannot_be_used_are_left_out_of_the_accuracy(trained, run, tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/a.png").write_text("words")
    (tmp_path / "7/b.png").write_bytes(next((trained / "digits/7").iterdir()).read_bytes())
    code, out, err = run(trained, tmp_path, "--eval", "--json")
    assert code == 1
    assert json.loads(out)["images"] == json.loads(out)["classes"]["7"]["images"] == 1
    assert json.loads(out)["classes"]["8"]["accuracy"] is None
    assert err.endswith("predict.py: 1 could not be used\n")
    (tmp_path / "7/b.png").write_text("words")
    assert run(trained, tmp_path, "--eval")[0] == 1


def test_folders_that_are_no_classes_are_named_before_the_work_starts(trained, run, image_folder):
    root = image_folder(classes=("7", "cat"))
    code, out, err = run(trained, root, "--eval")
    assert (code, out) == (2, "")
    assert err == f"predict.py: error: {root}: --eval on training images is optimistic; pass {root}/test\n"
    (root / "test").rename(root / "val")
    assert run(trained, root, "--eval")[2].endswith(f"pass {root}/val\n")
    code, out, err = run(trained, root / "val", "--eval")
    assert (code, out) == (2, "")
    assert "val/cat/000.png: --eval takes images in folders named as the model's classes: 0, 1, 2" in err
    err = run(trained, "nowhere", "--eval")[2]
    assert err == "predict.py: error: nowhere: no such file or folder\n"


def test_linked_folders_count_and_hidden_ones_do_not(trained, run, tmp_path):
    """As they do in training."""
    three, seven = (next((trained / "digits" / name).iterdir()) for name in "37")
    for name, source in (("real", three), ("test/7", seven), ("test/7/.ipynb_checkpoints", seven)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(source.read_bytes())
    (tmp_path / "test/3").symlink_to(tmp_path / "real")
    (tmp_path / "real/back").symlink_to(tmp_path / "test")
    code, out, err = run(trained, tmp_path / "test", "--eval", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["images"] == found["classes"]["3"]["images"] + found["classes"]["7"]["images"] == 2


def test_an_empty_list_is_no_result(trained, run):
    assert run(trained, "-", "--eval", "--json")[0::2] == (
        1, "predict.py: -: no image there\npredict.py: 1 could not be used\n",
    )  # fmt: skip


# What goes wrong


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nosuch", "IMAGE"], "nosuch: no such file; pass a run folder, or a model's .safetensors, .pkl, .onnx, .pt2"),
        (["EMPTY", "IMAGE"], "not the folder of a run that has finished, no model.safetensors in it"),
        (["IMAGE", "IMAGE"], ".png: this takes a run folder, or a model's .safetensors, .pkl, .onnx, .pt2"),
        (["MODEL"], "the following arguments are required: images"),
        (["MODEL", "IMAGE", "--json", "--csv"], "--json contradicts --csv"),
        (["MODEL", "IMAGE", "--device", "abacus"], "--device abacus: no such device here"),
        (["MODEL", "IMAGE", "--jsn"], "unknown option --jsn (did you mean --json?)"),
        (["WORDS", "IMAGE"], "words.onnx: not a .onnx file of this project"),
    ],
)
def test_what_cannot_be_done_is_one_line(trained, run, tmp_path, words, line):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.onnx").write_text("words")
    stand_for = {
        "IMAGE": next((trained / "digits/7").iterdir()),
        "MODEL": trained,
        "EMPTY": tmp_path / "empty",
        "WORDS": tmp_path / "words.onnx",
    }
    code, out, err = run(*(stand_for.get(word, word) for word in words))
    assert (code, out) == (2, "")
    assert err.startswith("predict.py: error: ")
    assert line in err
    assert len(err.splitlines()) == 1


def test_names_cannot_move_the_cursor_of_a_terminal(trained, run, tmp_path):
    model = changed(trained, tmp_path / "evil.safetensors", classes=["\x1b[2J", *RESULT["classes"][1:]])
    for name in ("a\x1b[2Jb.png", "c\x1b[2Jd.png"):
        (tmp_path / name).write_bytes(next((trained / "digits/0").iterdir()).read_bytes())
    (tmp_path / "c\x1b[2Jd.png").write_text("words")
    for options in ([], ["--json"]):
        code, out, err = run(model, tmp_path, *options)
        assert code == 1
        assert "\x1b" not in out + err
        assert r"a\x1b[2Jb.png" in out or r"a\u001b[2Jb.png" in out


def test_a_reader_that_has_had_enough(trained):
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE); p.stdout.readline();"
    code += "p.stdout.close(); sys.exit(p.wait())"
    words = [sys.executable, "-c", code, sys.executable, "predict.py", str(trained), str(trained / "digits"), "--json"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (1, "")
