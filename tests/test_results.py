"""The README and its pictures show the figures in `results/`, and those alone."""

import json
import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "results"))
import figures
import make

from errors import InputError
from recipes import RECIPES

RUN = {
    "recipe": "fast", "epochs": 24, "source": "cifar10", "width": 64, "valid": "test", "device_name": "a GPU",
    "parameters": 6_573_130, "norm": "batch", "seed": 0, "last_accuracy": 0.9, "tta_accuracy": 0.91,
    "options": {"out": "/home/me/run"}, "calibration_error": 0.01,
    "history": [{"epoch": n, "valid_accuracy": n / 3, "seconds": 4 - n} for n in (1, 2)],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A README and a folder of results that hold nothing yet, and a function that makes a run's folder."""
    monkeypatch.setattr(make, "ROOT", tmp_path)
    monkeypatch.setattr(make, "HERE", tmp_path / "results")
    monkeypatch.setattr(figures, "HERE", tmp_path / "results")
    (tmp_path / "results/runs").mkdir(parents=True)
    for name in (*(f"speed/2-cores-{part}.json" for part in ("loaders", "precision", "models")), "scaling.json"):
        (tmp_path / "results" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "results" / name).write_text((ROOT / "results" / name).read_text())
    every = [f"{name}{copy}" for copy in ("", ", lossy copy") for name in ("accuracy", "ablation")]
    made = {"README.md": ("results",), "results/README.md": every, "docs/models.md": ("models",)}
    made |= {"docs/speed.md": ("loading", "precision"), "docs/scaling.md": ("32 pixels", "224 pixels")}
    for path, names in made.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        marks = (f"<!-- made: {name} -->\nold\n<!-- end -->\nby hand\n" for name in names)
        (tmp_path / path).write_text("".join(marks))

    def run(**changes):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        recipe = vars(RECIPES.get(changes.get("recipe"), RECIPES["fast"])).copy()
        recipe["schedule"] = str(recipe["schedule"])
        (folder / "result.json").write_text(json.dumps(recipe | RUN | changes))
        return str(folder)

    return run


def test_the_readme_says_what_the_files_say():
    for path, text in make.made_texts().items():
        assert path.read_text() == text, "python results/make.py writes it anew"


def test_the_pictures_show_what_the_files_say():
    for path, (_, drawn) in make.made_pictures().items():
        assert Image.open(path).text["Comment"] == make.digest(drawn), "python results/make.py draws it anew"
        shown = ((ROOT / "README.md", ROOT), (ROOT / "results/README.md", ROOT / "results"))
        assert any(f"({path.relative_to(folder)})" in text.read_text() for text, folder in shown)


@pytest.mark.parametrize(("n", "line"), [(3, False), (8, True)])
def test_peaks_far_apart_are_not_joined_by_a_line(monkeypatch, n, line):
    sweep = json.loads((ROOT / "results/peaks/fast-cifar10-jpeg-16.json").read_text())
    figures = []
    monkeypatch.setattr(make, "save_figure", lambda figure, *_: figures.append(figure))
    suggested = [row for row in sweep["peaks"] if row["suggested"]]
    make.save_peaks(sweep | {"peaks": sweep["peaks"][:n] + suggested}, None)
    through = [len(drawn.get_xdata()) for drawn in figures[0].axes[0].lines if drawn.get_linestyle() == "-"]
    assert (n in through) is line


def test_runs_become_lines_and_a_picture(place, tmp_path):
    seed = place(recipe="seed", last_accuracy=0.8, tta_accuracy=None)
    make.main([seed, place(), place(seed=1, last_accuracy=0.92), place(width=16, last_accuracy=0.3)])
    readme = (tmp_path / "results/README.md").read_text()
    assert "old" not in readme
    assert readme.count("by hand") == 4
    front = (tmp_path / "README.md").read_text()
    assert "fast, 24 epochs | 6.57 M parameters | 2 | 91.00 ± 1.41 | 91.00 ± 0.00 | 1 on a GPU, in fp32" in front
    assert "30.00" not in front, "that of a narrower network"
    rows = [
        [cell.strip() for cell in line.split("|")[2:-1]] for line in readme.splitlines() if " epochs | width" in line
    ]
    assert rows == [
        [
            "fast, 24 epochs",
            "width 64, 6.57 M",
            "fp32",
            "2",
            "91.00 ± 1.41",
            "90.00, 92.00",
            "91.00 ± 0.00",
            "2.5 s, a GPU",
        ],
        ["seed, 24 epochs", "width 64, 6.57 M", "fp32", "1", "80.00", "80.00, 80.00", "–", "2.5 s, a GPU"],
        ["fast, 24 epochs", "width 16, 6.57 M", "fp32", "1", "30.00", "30.00, 30.00", "91.00", "2.5 s, a GPU"],
    ]
    kept = list((tmp_path / "results/runs").iterdir())
    assert len(kept) == 4
    assert all("options" not in json.loads(path.read_text()) for path in kept), "paths of the machine"
    pictures = make.made_pictures()
    assert [path.name for path in pictures] == ["schedules.png", "cifar10-64-test-fp32.png", "curves.png"]
    assert all(Image.open(path).text["Comment"] == make.digest(drawn) for path, (_, drawn) in pictures.items())

    result = tmp_path / "results/runs/seed-24-epochs-cifar10-64-test-fp32-seed-0.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "last_accuracy": 0.81}))
    assert make.made_texts()[tmp_path / "results/README.md"] != readme
    path, (_, drawn) = list(make.made_pictures().items())[1]
    assert Image.open(path).text["Comment"] != make.digest(drawn)


def test_a_changed_setting_is_named_and_compared_on_the_hold_out(place, tmp_path):
    changed, hold_out = {"wd": 0.0, "last_accuracy": 0.88}, {"valid": "holdout"}
    make.main([place(**hold_out), place(**hold_out, **changed), place(**hold_out, seed=1)])
    make.main([place(**hold_out, seed=1, **{**changed, "last_accuracy": 0.91}), place(**changed)])
    table = (tmp_path / "results/README.md").read_text()
    assert "| fast, 24 epochs | 2 | 90.00 ± 0.00 |  |  | 91.00 ± 0.00 |" in table
    assert "| fast, 24 epochs, wd 0.0 | 2 | 89.50 ± 2.12 | -0.50 ± 2.12 | fast, 24 epochs | 91.00 ± 0.00 |" in table
    assert "| fast, 24 epochs, wd 0.0 | width 64, 6.57 M | fp32 | 1 | 88.00 |" in table
    front = (tmp_path / "README.md").read_text()
    assert "90.00" not in front, "the hold-out's figures are not the test set's"
    assert "88.00" not in front, "a changed recipe is not the recipe"
    assert [path.name for path in make.made_pictures()] == ["schedules.png"]
    make.main([place()])
    front = (tmp_path / "README.md").read_text()
    assert "| 1 | 90.00 |" in front
    assert "88.00" not in front
    _, (_, drawn) = list(make.made_pictures().items())[-1]
    assert list(drawn) == ["fast, 24 epochs"]


def test_a_run_of_a_recipe_that_is_no_more_has_its_line(place, tmp_path):
    make.main([place(recipe="gone"), place(recipe="seed")])
    _, _, seed, gone, *_ = (tmp_path / "results/README.md").read_text().splitlines()[1:]
    assert seed.startswith("| CIFAR-10 | seed, 24 epochs | ")
    assert gone.startswith("| CIFAR-10 | gone, 24 epochs, schedule OneCycle(pct_start=0.2, div_final=10), ")


def test_the_same_run_again_takes_its_place(place, tmp_path):
    make.main([place(), place(last_accuracy=0.95)])
    assert "| 1 | 95.00 |" in (tmp_path / "README.md").read_text()


def test_a_folder_without_a_result_is_named(place, tmp_path):
    before = (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="empty: not the folder of a run that has finished"):
        make.main([str(tmp_path / "empty")])
    assert (tmp_path / "README.md").read_text() == before
