"""What a run says about itself: the figures of its evaluation, its pictures, its README, and several runs compared."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, main
from matplotlib.axes import Axes
from PIL import Image

import report
import reporting.report
from errors import InputError, parse, run_command
from images.sources import load_images
from images.table import ImageTable
from options import Options
from recipes import ANCESTOR, RECIPES
from reporting import pictures
from reporting.card import CAPTIONS, write_card
from reporting.evaluation import Evaluation, evaluate
from reporting.pictures import save_comparison, save_confusion
from trained.classifier import classifier_of, grad_cam
from trained.safe_file import load_safetensors
from training.lr_finder import METHODS, RangeTest
from training.precision import full_precision

sys.path.insert(0, str(ROOT / "results"))
import pretrained

SMALL = {"data": "digits", "bs": 128, "width": 4, "epochs": 2, "lr": "0.1", "device": "cpu", "no_lr_find": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with all its pictures."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    main(**SMALL, recipe="fast", seed=3, tta=True, out=str(folder))
    return folder


def evaluation(probabilities, labels, classes=("cat", "dog", "owl")):
    n = len(labels)
    table = ImageTable(
        "t", classes, np.zeros((n, 32, 32, 3), np.uint8), np.array(labels), np.ones(n, bool), np.arange(n)
    )
    return Evaluation(table, np.array(labels), np.array(probabilities))


def test_the_figures_of_an_evaluation():
    e = evaluation(
        [[0.8, 0.1, 0.1], [0.6, 0.39, 0.01], [0.05, 0.9, 0.05], [0.4, 0.35, 0.25], [0.02, 0.03, 0.95]], [0, 1, 0, 2, 2]
    )
    assert e.right.tolist() == [True, False, False, False, True]
    assert e.confusion(range(3)).tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 1]]
    assert e.counts().tolist() == [[2, 1, 2], [1, 0, 1]], "images of each class, and those that are right"
    assert e.most_confused(2).tolist() == [0, 1]
    assert e.most_wrong(5).tolist() == [2, 1, 3], "the surest first, and no right one"
    assert e.most_wrong(1).tolist() == [2]
    assert e.most_uncertain(2).tolist() == [3, 1]
    close, low = [0.45, 0.44, 0.11], [0.4, 0.3, 0.3]
    assert evaluation([close, low], [0, 0]).most_uncertain(2).tolist() == [1, 0], "by the percentage that is shown"
    # each in a bin of its own
    assert e.calibration_error() == pytest.approx((0.2 + 0.6 + 0.9 + 0.4 + 0.05) / 5)


def test_of_many_classes_the_picture_shows_the_most_confused(tmp_path, monkeypatch):
    """The square of their number would not fit into memory."""
    n, counted, confusion = 150, [], Evaluation.confusion
    monkeypatch.setattr(Evaluation, "confusion", lambda e, classes: counted.extend(classes) or confusion(e, classes))
    probabilities = np.eye(n)
    probabilities[[3, 140]] = probabilities[[140, 3]]
    save_confusion(evaluation(probabilities, range(n), [f"class {i}" for i in range(n)]), tmp_path / "confusion.png")
    assert len(counted) == 100
    assert {3, 140} <= set(counted)


def test_calibration_is_counted_in_bins():
    confidence = np.array([0.91, 0.92, 0.93, 0.61, 0.66, 1.0])  # bins are 1/15 wide
    e = evaluation(np.stack([confidence, 1 - confidence], 1), [0, 1, 0, 0, 1, 0], ("cat", "dog"))
    assert [count for _, _, count in e.calibration()] == [2, 3, 1]
    low, high, _ = e.calibration()
    assert low[:2] == pytest.approx((0.635, 0.5))
    assert high[:2] == pytest.approx((0.92, 2 / 3))
    assert e.calibration_error() == pytest.approx((2 * 0.135 + 3 * (0.92 - 2 / 3) + 0) / 6)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved while a test runs, in place of their files."""
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, *args, **kwargs: figures.append(figure))
    return figures


def test_the_reliability_of_few_images_is_no_line(drawn, tmp_path):
    sure = [[0.95, 0.05]] * 20 + [[0.75, 0.25]] * 20 + [[0.55, 0.45]]  # one image, and it is wrong
    pictures.save_reliability(evaluation(sure, [0] * 40 + [1], ("cat", "dog")), tmp_path)
    upper, lower = drawn[0].axes
    lines = {line.get_label(): line for line in upper.lines}
    assert lines["this network"].get_ydata().tolist() == [1, 1]
    few = lines["this network, fewer than 10 images"]
    assert (few.get_ydata().tolist(), few.get_linestyle()) == ([0], "None")
    drawn[0].canvas.draw()
    assert [text.get_text() for text in lower.get_xticklabels()][:2] == ["0.0", "0.2"]
    assert [text.get_text() for text in lower.get_yticklabels() if text.get_text()][-2:] == ["10", "100"]


def test_the_pictures_name_what_is_true_and_what_is_predicted(drawn, tmp_path):
    e = evaluation([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.7, 0.2], [0.3, 0.6, 0.1]], [0, 1, 1, 1])
    pictures.save_examples(e, np.array([1, 2]), np.zeros((2, 32, 32)), "Some", tmp_path)
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert [title for title in titles if title] == ["cat, 80 %\ntrue: dog", "dog, 70 % ✓"]

    pictures.save_confusion(e, tmp_path)
    (axes,) = drawn[1].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    cells = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert cells == {((0, 0), "1"), ((0, 1), "1"), ((1, 1), "2")}, "a row for each true class"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "owl"]

    pictures.save_classes(e, tmp_path)
    (axes,) = drawn[2].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "cat"], "no owl was tried"
    assert [text.get_text() for text in axes.texts] == ["66.7 % of 3", "100.0 % of 1"]


@pytest.mark.parametrize(("n", "rows"), [(0, 0), (2, 1), (6, 1), (7, 2)])
def test_a_picture_of_examples_has_room_for_its_rows_and_title(drawn, tmp_path, n, rows):
    e = evaluation([[0.4, 0.6]] * 9, [0] * 9, ("cat", "dog"))
    pictures.save_examples(e, e.most_wrong(n), np.zeros((n, 32, 32)), "The most confident mistakes", tmp_path)
    assert drawn[0].get_figheight() == pytest.approx(3.1 * rows + (0.7 if rows else 0.3))
    assert len(drawn[0].axes) == 2 * rows * min(6, max(3, n))
    drawn[0].canvas.draw()
    title = drawn[0].texts[0].get_window_extent()
    assert 0 <= title.x0 < title.x1 <= drawn[0].bbox.width, "nothing of it is cut off"


def test_the_last_epoch_is_marked_also_where_it_is_the_only_one(drawn, tmp_path):
    names = ("train_loss", "train_accuracy", "valid_loss", "valid_accuracy")
    history = [{"epoch": i + 1, **dict.fromkeys(names, v)} for i, v in enumerate((0.5, 0.75, 0.625))]
    for rows, label in ((history, "last epoch: 62.50 %"), (history[:1], "last epoch, and none is better: 50.00 %")):
        pictures.save_history(rows, tmp_path, "digits")
        axes = drawn[-1].axes[0]
        (mark,) = (line for line in axes.lines if line.get_label() == label)
        assert mark.get_xydata().tolist() == [[len(rows), 100 * rows[-1]["valid_accuracy"]]]
    assert axes.get_xticks().tolist() == [1]


def test_the_range_test_leads_with_what_the_run_uses(drawn, tmp_path):
    test = RangeTest([0.1, 0.2], [2.0, 1.0], [2.0, 1.5], dict.fromkeys(METHODS, 0.2))
    pictures.save_lr_find(test, tmp_path, 0.15)
    assert drawn[0].axes[0].get_legend().get_texts()[0].get_text() == "this run's peak: 0.15"


def test_the_evaluation_is_that_of_the_validation_set(learner):
    e = evaluate(learner)
    with full_precision(learner):
        assert e.right.mean() == pytest.approx(learner.validate()[1])
    assert e.probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    images = [e.table[i] for i in range(len(e.table))]
    assert [item.label for item in images] == [e.table.classes[i] for i in e.labels]


def test_grad_cam_shows_what_the_prediction_rests_on(learner):
    """To grey out where it is hot costs the score more than to grey out as much where it is cold."""
    e = evaluate(learner)
    chosen = np.arange(0, 350, 5)
    images, _ = e.table.batch(chosen.tolist())
    maps = grad_cam(classifier_of(learner), images, e.predicted[chosen])
    assert maps.shape == (70, 32, 32)
    assert maps.min() >= 0
    assert maps.max() <= 1
    order, scores = maps.reshape(70, -1).argsort(1), []
    for part in (order[:, :256], order[:, -256:]):
        changed = images.copy().reshape(70, 1024, 3)
        changed[np.arange(70)[:, None], part] = 80  # the mean grey
        with learner.no_bar():
            probabilities, _ = learner.get_preds(dl=learner.dls.test_dl(list(changed.reshape(images.shape))))
        scores.append(probabilities[torch.arange(70), torch.from_numpy(e.predicted[chosen])].mean())
    cold, hot = scores
    assert hot < cold - 0.1


def test_a_run_shows_itself(run):
    result = json.loads((run / "result.json").read_text())
    text = (run / "README.md").read_text()
    for name in CAPTIONS:
        assert (name == "lr_find") or f"]({name}.png)" in text, name
    for picture in run.glob("*.png"):
        assert f"({picture.name})" in text
        assert np.asarray(Image.open(picture).convert("RGB")).std() > 10, f"{picture} shows something"
    command = "--data digits --epochs 2 --lr 0.1 --bs 128 --width 4 --seed 3 --device cpu --tta --no-lr-find"
    assert f"```sh\npython train_fastai.py {command}\n```" in text
    for value in (result["last_accuracy"], result["tta_accuracy"], result["calibration_error"]):
        assert f"| {100 * value:.2f} % |" in text
    assert ("| the last one |" if result["best_epoch"] == 2 else "chosen on these images: optimistic") in text
    assert text.startswith("---\nlibrary_name: fastai\n")
    assert "359 images, the test set" in text
    assert result["fingerprint"] in text


def test_the_card_says_how_to_use_the_model_and_that_works(run, tmp_path, monkeypatch):
    pytest.importorskip("toml", reason="huggingface_hub asks for it")
    text = (run / "README.md").read_text()
    head, snippets = text.split("---")[1], re.findall(r"```python\n(.*?)```", text, re.S)
    assert "license: apache-2.0\n" in head
    assert len(snippets) == 2
    (tmp_path / "USER/NAME").mkdir(parents=True)  # huggingface_hub takes a folder's path, too
    for file, to in (("model.pkl", "USER/NAME"), ("model.safetensors", "."), ("examples/03.png", "picture.png")):
        shutil.copy(run / file, tmp_path / to)
    monkeypatch.chdir(tmp_path)
    said = []
    for snippet in snippets:
        exec(snippet, place := {})
        said.append((place["label"], pytest.approx(float(max(place["probabilities"])), abs=1e-4)))
    assert said[0] == said[1]


def test_the_card_links_to_the_code(run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    for changes, line in (
        ({"clean": True, "repository": "https://h.org/a/b"}, "[h.org/a/b](https://h.org/a/b), commit `ab12`"),
        ({"clean": False, "repository": None}, "commit `ab12`, changed"),
        ({"commit": None}, "this project's"),
    ):
        write_card(tmp_path, Options(**result["options"]), result | {"commit": "ab12"} | changes)
        assert f"\nCode: {line}.\n" in (tmp_path / "README.md").read_text()


def test_the_hub_is_told_the_last_epochs_accuracy(run, tmp_path):
    result = json.loads((run / "result.json").read_text()) | {"last_accuracy": 0.25, "best_accuracy": 0.75}
    write_card(tmp_path, Options(**result["options"]), result)
    head = (tmp_path / "README.md").read_text().split("---")[1]
    assert '"value": 0.25' in head
    assert "0.75" not in head


def test_the_card_counts_the_time_of_all_starts(run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    history = [row | {"seconds": 100.0} for row in result["history"]]
    write_card(tmp_path, Options(**result["options"]), result | {"seconds": 1.0, "history": history})
    assert f"took {100 * len(history)} seconds on cpu" in (tmp_path / "README.md").read_text()


def test_a_run_keeps_an_image_of_each_class(run):
    table = load_images("digits")
    for label in range(10):
        kept = np.asarray(Image.open(run / f"examples/{label:02}.png"))
        mine = table.images[~table.is_train & (table.labels == label)]
        assert (mine == kept).all((1, 2, 3)).any(), "a validation image of that class"
    assert len(list((run / "examples").iterdir())) == 10


def test_the_recipe_seed_stands_beside_it_where_it_was_measured(run, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting.report, "RESULTS", tmp_path)
    result = json.loads((run / "result.json").read_text())
    settings = {name: str(value) for name, value in vars(RECIPES["seed"]).items() if name != "width"}
    changed = {"epochs": 3}
    for seed, (accuracies, more) in enumerate((((0.2, 0.4), {}), ((0.4, 0.8), {}), ((0.9, 0.9, 0.9), changed))):
        history = [{"valid_accuracy": accuracy} for accuracy in accuracies]
        (tmp_path / f"seed-{seed}.json").write_text(json.dumps(result | settings | {"history": history} | more))
    assert reporting.report.seed_curve(result) == pytest.approx([0.3, 0.6])
    assert reporting.report.seed_curve(result | {"recipe": "seed"}) is None, "that is the recipe itself"
    for name in ("source", "fingerprint", "width", "valid"):
        assert reporting.report.seed_curve(result | {name: "another"}) is None


def test_it_can_be_drawn_again(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".png", ".svg", ".md")}
    for path in before:
        path.unlink()
    report.main(report.Options([str(run)], device="cpu"))
    assert {path: path.read_bytes() for path in before} == before
    assert capsys.readouterr().out.splitlines()[-1] == f"see          {run / 'README.md'}"


def test_it_can_be_drawn_where_the_precision_and_the_cores_of_the_run_are_not(run, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(reporting.report, "write_report", lambda learn, options, *_: drawn.append(options))
    copy = shutil.copytree(run, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["options"] |= {"precision": "fp16", "workers": 10**6}
    (copy / "config.json").write_text(json.dumps(config))
    report.main(report.Options([str(copy)], device="cpu"))
    assert [options.precision for options in drawn] == ["fp16"], "the card has the command of the run"


def compare(folder, *results):
    """Compare runs that have these results; their folders and the picture are in `folder`."""
    runs = [folder / str(i) for i in range(len(results))]
    for run, result in zip(runs, results, strict=True):
        run.mkdir()
        (run / "result.json").write_text(json.dumps(result))
    report.main(report.Options(list(map(str, runs)), picture=str(folder / "comparison.png")))


def test_runs_are_compared(run, tmp_path, capsys):
    result = json.loads((run / "result.json").read_text())
    others = {"seed": 4, "last_accuracy": 0.5}, {"recipe": "seed", "last_accuracy": 0.25}
    compare(tmp_path, result, *(result | other for other in others))
    out = capsys.readouterr().out
    fast, seed = re.split(r"\nseed, 2 epochs, .*, width 4, (?:fp32|bf16): ", out)
    assert f"mean         {50 * (result['last_accuracy'] + 0.5):.2f}" in fast
    assert "25.00" in seed
    assert "mean" not in seed, "of one run"
    assert np.asarray(Image.open(tmp_path / "comparison.png").convert("RGB")).std() > 10


def test_the_same_seed_counts_once_and_other_settings_are_another_group(run, tmp_path, capsys):
    result = json.loads((run / "result.json").read_text())
    compare(tmp_path, result, result, result | {"wd": 0.5, "seed": 4})
    said = capsys.readouterr()
    name, rest = "fast, 2 epochs, bs 128, lr 0.1", f"width 4, {result['precision']}:"
    assert said.err == f"warning: {name}, {rest} two runs with seed 3, one counts\n"
    for group in (f"{name}, {rest}", f"{name}, wd 0.5, {rest}"):
        assert f"{group} accuracy on digits" in said.out
    assert "std" not in said.out, "of one seed each"


def test_another_norm_is_another_group(run, tmp_path, capsys):
    result = json.loads((run / "result.json").read_text())
    compare(tmp_path, result, result | {"norm": "layer", "seed": 4})
    said = capsys.readouterr().out
    assert said.count("accuracy on digits") == 2
    assert f", layer norm, width 4, {result['precision']}: accuracy on digits" in said


@pytest.mark.parametrize("name", [
    "ancestor-24-epochs-cifar10-16-test-bf16",
    "first-fast-24-epochs-cifar10-jpeg-16-test-fp32",
])  # fmt: skip
def test_a_setting_that_older_runs_lack_was_off(tmp_path, capsys, name):
    old = json.loads((ROOT / f"results/runs/{name}-seed-0.json").read_text())
    off = {name: value for name, value in vars(ANCESTOR).items() if name not in old}
    assert "muon" in off
    compare(tmp_path, old, old | off | {"seed": 1})
    said = capsys.readouterr().out
    assert said.count("accuracy on") == 1
    assert "mean" in said


def test_runs_of_a_recipe_that_is_no_more_are_compared(run, tmp_path, capsys):
    result = json.loads((run / "result.json").read_text()) | {"recipe": "gone"}
    compare(tmp_path, result, result | {"seed": 4}, result | {"wd": 0.5})
    said = capsys.readouterr().out
    assert len(re.findall("^gone, 2 epochs, .*: accuracy on digits", said, re.M)) == 2
    assert said.count(", wd 0.5, ") == 1


def test_a_band_stays_within_0_and_100_percent(run, tmp_path, monkeypatch):
    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda self, x, low, high, **how: bands.append((low, high)))
    result = json.loads((run / "result.json").read_text())
    runs = [result | {"history": [{"valid_accuracy": a}, {"valid_accuracy": b}]} for a, b in ((0.0, 1.0), (0.2, 0.9))]
    save_comparison({"fast": runs}, tmp_path / "comparison.png")
    (low, high) = bands[0]
    assert low == pytest.approx([0, 95 - 5 * 2**0.5])
    assert high == pytest.approx([10 + 10 * 2**0.5, 100])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, "not the folder of a run that has finished, no result.json"),
        ("words", "result.json: not that of a run of this version"),
        ({"source": "cifar10"}, "source is cifar10 in one, digits in another; compare like with like"),
        ({"valid": "holdout"}, "valid is holdout in one, test in another; compare like with like"),
    ],
)
def test_what_cannot_be_compared_is_one_line(run, tmp_path, monkeypatch, capsys, change, expected):
    if change:
        result = json.loads((run / "result.json").read_text())
        (tmp_path / "result.json").write_text(change if isinstance(change, str) else json.dumps(result | change))
    picture = tmp_path / "comparison.png"
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), str(tmp_path), "--picture", str(picture)])
    with pytest.raises(SystemExit) as stop:
        run_command(report.main, parse(report.Options))
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert expected in errors
    assert errors.count("\n") == 1
    assert not picture.exists()


def test_hold_outs_of_another_size_are_not_compared(run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    with pytest.raises(InputError, match=r"^valid_pct is 0\.1 in one, 0\.2 in another; compare like with like$"):
        compare(tmp_path, *(result | {"valid": "holdout", "valid_pct": part} for part in (0.1, 0.2)))


@pytest.mark.parametrize("name", ["comparison", "comparison.doc"])
def test_a_picture_of_no_known_format_is_one_line(run, tmp_path, name):
    with pytest.raises(InputError, match=f"^--picture {name}: no kind of picture; end its name in .png, "):
        report.main(report.Options([str(run), str(run)], picture=name))


def test_every_group_is_drawn(drawn, run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    save_comparison({str(i): [result] for i in range(12)}, tmp_path / "comparison.png")
    (axes,) = drawn[0].axes
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == 12


@pytest.mark.parametrize("n", [1, 20])
def test_no_name_of_a_group_is_cut_off_and_the_curves_have_room(drawn, tmp_path, n):
    run = json.loads((ROOT / "results/runs/fast-8-epochs-cifar10-16-holdout-20-bf16-seed-0.json").read_text())
    name = ", ".join(f"{key} {value}" for key, value in vars(RECIPES["fast"]).items())
    save_comparison({f"{i}, {name}": [run] for i in range(n)}, tmp_path / "comparison.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    legend, curves = figure.legends[0].get_window_extent(), figure.axes[0].bbox
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
    assert 0 <= legend.y0 < legend.y1 < curves.y0
    assert curves.height > 2 * figure.dpi, "two inches"


def test_no_name_is_markup(image_folder, tmp_path, capsys):
    """Neither that of a class nor that of the data's folder, in pictures, in the card and on a terminal."""
    source, classes = "a$\\b$c \x1b[2J\udcff![x](http:", ["$_$", "![x](y) <b>", "www.a|b"]
    root = image_folder(classes, train=2, root=tmp_path / source)
    main(**{**SMALL, "data": str(root), "bs": 2, "epochs": 1, "width": 1}, out=str(tmp_path / "run"))
    card = (tmp_path / "run/README.md").read_text()
    assert "apart: \\!\\[x\\]\\(y\\) \\<b\\>, \\$\\_\\$, www\\.a\\|b.\n" in card
    assert card.count(r"a\$\\b\$c \\x1b\[2J\\udcff\!\[x\]\(http\:") == 2, "in the title, and where the data is said"
    assert "\x1b" not in card + "".join(capsys.readouterr())
    result = json.loads((tmp_path / "run/result.json").read_text())
    save_comparison({"$_$": [result]}, tmp_path / "comparison.png")


def test_other_images_are_not_those_of_the_run(tmp_path, image_folder):
    root = image_folder()
    options = {**SMALL, "data": str(root), "bs": 2, "epochs": 1}
    main(**options, out=str(tmp_path / "run"))
    assert len(list((tmp_path / "run").glob("*.png"))) == 9, "few images, and classes without a mistake, are drawn too"
    (root / "train/cat/000.png").write_bytes((root / "train/dog/000.png").read_bytes())
    with pytest.raises(InputError, match="are not those that it was trained on"):
        report.main(report.Options([str(tmp_path / "run")], device="cpu"))


def test_of_a_run_a_model_to_come_with_the_project_is_made(run, tmp_path):
    pretrained.main(str(run), str(tmp_path / "made"))
    (half, header), (whole, _) = (load_safetensors(f / "model.safetensors") for f in (tmp_path / "made", run))
    for name, weights in whole.state_dict().items():
        assert half.state_dict()[name].sub(weights).abs().max() <= 1e-3 * max(1, weights.abs().max())
    assert (tmp_path / "made/model.safetensors").stat().st_size < 0.6 * (run / "model.safetensors").stat().st_size
    card = (tmp_path / "made/README.md").read_text()
    assert f"{100 * header['last_accuracy']:.2f} %" in card
    assert "model.safetensors" in card
    assert "fastai" not in card.split("---")[1], "the Hub would tell its visitors to load a model.pkl"
    assert "from_pretrained_fastai" not in card, "there is no model.pkl"
    assert f". {pretrained.NOTE}\n" in card
    shown = {line.split("(")[1].rstrip(")") for line in card.splitlines() if line.startswith("![")}
    assert (
        shown
        == {path.name for path in (tmp_path / "made").glob("*.png")}
        == {f"{name}.png" for name in pretrained.PICTURES}
    )
    assert str(run) not in (tmp_path / "made/result.json").read_text(), "no path of the machine"
