"""Draw the pictures and the README of a run again, or compare several runs.

    python report.py RUN            draw that run's pictures again, write its README, and a model.pkl if it has none
    python report.py RUN RUN ...    a table and a picture of their accuracies

RUN is the folder of a run that has finished.
"""

from dataclasses import dataclass
from typing import Annotated

from errors import InputError, parse, run_command


@dataclass(frozen=True)
class Options:
    """Draw the pictures of one run again and write its README, or compare several runs."""

    runs: Annotated[str, {"nargs": "+"}]  # Folders of runs that have finished
    picture: str = "comparison.png"  # File for the picture of several runs' curves
    device: str = "auto"  # Device to evaluate one run's network on: auto, cpu or cuda


if __name__ == "__main__":
    OPTIONS = parse(Options)

import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from names import printable
from reporting.pictures import save_comparison
from reporting.report import draw_again
from reporting.settings import how
from reporting.tables import runs_table
from training.run import Run


def grouped(results: list[dict]) -> dict[str, list[dict]]:
    """The results, grouped by their settings; of two with the same settings and seed, only the first."""
    groups = defaultdict(dict)
    for result in results:
        name = f"{how(result)}, width {result['width']}, {result['precision']}"
        if result["seed"] in groups[name]:
            print(printable(f"warning: {name}: two runs with seed {result['seed']}, one counts"), file=sys.stderr)
        groups[name].setdefault(result["seed"], result)
    return {name: list(group.values()) for name, group in groups.items()}


def compare(runs: list[Run], picture: Path) -> None:
    """Print a table of accuracies for each recipe, and draw the curves of all runs in one picture."""
    if picture.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise InputError(f"--picture {picture}: no kind of picture; end its name in .png, .svg, .pdf or .jpg")
    results = sorted((run.result() for run in runs), key=lambda result: (result["recipe"], result["seed"]))
    for name in ("source", "valid", *["valid_pct"] * (results[0]["valid"] == "holdout")):
        if len(values := {str(result[name]) for result in results}) > 1:
            raise InputError(f"{name} is {' in one, '.join(sorted(values))} in another; compare like with like")
    groups = grouped(results)
    for name, group in groups.items():
        print(printable(f"{name}: accuracy on {group[0]['source']} ({group[0]['valid']}), in %"))
        print(f"\n{runs_table(group)}\n")
    save_comparison(groups, picture)
    print(printable(f"see          {picture}"))


def main(options: Options) -> None:
    """The command."""
    runs = [Run(Path(folder)) for folder in options.runs]
    if len(runs) == 1:
        draw_again(runs[0], options.device)
        print(printable(f"see          {runs[0] / 'README.md'}"))
    else:
        compare(runs, Path(options.picture))


if __name__ == "__main__":
    run_command(main, OPTIONS)
