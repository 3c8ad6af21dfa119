"""The results of runs in this folder: the names of their files, and how they are grouped."""

import json
import re
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from files import write_json
from options import Options
from recipes import RECIPES
from reporting.settings import how
from training.run import Run

HERE = Path(__file__).parent


def file_name(*words) -> str:
    """The words with hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")


def result_of(folder: Path) -> dict:
    """The run's result without its options, which contain paths; the settings are in the result itself as well."""
    return {name: value for name, value in Run(folder).result().items() if name != "options"}


def take_in(folder: Path, results: Path | None = None) -> Path:
    """Copy the run's result to `results`, under a name made of its recipe, data and seed."""
    result = result_of(folder)
    path = (results or HERE / "runs") / f"{file_name(how(result), *where(result), 'seed', result['seed'])}.json"
    write_json(path, result)
    return path


def where(result: dict) -> tuple:
    """What two results must share to be comparable: data, width, validation set, precision."""
    valid = result["valid"]
    if (part := result.get("valid_pct", Options.valid_pct)) != Options.valid_pct:
        valid += f" {part:.0%}"
    return result["source"], result["width"], valid, result.get("precision", "fp32")  # older ones are


def results() -> dict[tuple, dict[str, list[dict]]]:
    """All results by `where`, the widest network first, then by `how`, in the order of their seeds."""
    every = [json.loads(path.read_text()) for path in (HERE / "runs").glob("*.json")]
    order = {name: i for i, name in enumerate(RECIPES)}

    def key(r: dict) -> tuple:
        place = order.get(r["recipe"], len(order))  # one that is no more comes last
        return r["source"], -r["width"], *where(r)[2:], place, r["epochs"], how(r), r["seed"]

    every.sort(key=key)
    return {place: {k: list(runs) for k, runs in groupby(group, how)} for place, group in groupby(every, where)}
