import csv

import pytest

from errors import InputError
from files import complete, write_csv, write_json
from recipes import RECIPES, get_recipe
from training.run import check_out, new_run_folder


def test_a_file_is_complete_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(RuntimeError, match="boom"), complete(path) as beside:
        beside.write_text("half")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []
    path.write_text("old")
    with path.open() as reader:
        with complete(path) as beside:
            beside.write_text("new")
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert reader.read() == "old", "the new file took the name; nobody wrote into the old one"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_json(path, {"no": object()})
    with pytest.raises(csv.Error):
        write_csv(path, ["a"], [3])
    assert path.read_text() == "new"


def test_runs_are_numbered_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(new_run_folder(recipe)) for recipe in ("fast", "demo", "fast")]
    assert names == ["runs/001-fast", "runs/002-demo", "runs/003-fast"]
    (tmp_path / "runs/041-mine").mkdir()
    assert str(new_run_folder("demo")) == "runs/042-demo"


def test_out_is_made_or_refused(tmp_path):
    assert new_run_folder("demo", str(tmp_path / "deep/er")).is_dir()
    (tmp_path / "file").write_text("mine")
    for out, why in ((tmp_path, "not empty"), (tmp_path / "file", "this is a file")):
        with pytest.raises(InputError, match=why):
            check_out(str(out))
    with pytest.raises(InputError, match="cannot be made"):
        new_run_folder("demo", "/proc/none")


def test_the_named_recipes():
    fast = RECIPES["fast"]
    assert (fast.epochs, fast.bs, fast.momentum, fast.lr, fast.wd) == (24, 512, 0.9, 0.4, 5e-4)
    assert (fast.logit_scale, fast.norm_bias_lr) == (0.125, 1), "a norm's biases are no faster behind ReLU"
    assert fast.label_smoothing > 0
    assert (RECIPES["demo"].data, RECIPES["demo"].width) == ("digits", 16)
    assert get_recipe("fast", epochs=3, lr=None).epochs == 3
    assert get_recipe("fast", epochs=3, lr=None).lr == 0.4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"speed": 3}, "no speed; it has data"),
        ({"momentum": 0}, "momentum is 0"),
        ({"lr": float("inf")}, "lr is inf"),
    ],
)
def test_a_recipe_out_of_range_is_refused(changes, why):
    with pytest.raises(InputError, match=why):
        get_recipe("fast", **changes)
    with pytest.raises(InputError, match="no recipe 'slow'; the recipes are fast, ancestor, seed"):
        get_recipe("slow")
