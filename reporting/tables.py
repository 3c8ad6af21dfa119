"""Tables of results, for a terminal and in Markdown."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np


def markdown_table(names: Sequence[str], rows: Iterable[Sequence]) -> str:
    """The rows as a Markdown table, under the names of the columns."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in lines)


def runs_table(results: list[dict]) -> str:
    """The accuracies of several runs in percent, one a line; then mean, standard deviation, minimum and maximum."""
    names = {"last_accuracy": "last epoch", "tta_accuracy": "with TTA"}
    names = {key: name for key, name in names.items() if results[0][key] is not None}
    columns = [np.array([100 * result[key] for result in results]) for key in names]
    rows = [("seed", *names.values())]
    rows += [(result["seed"], *(f"{column[i]:.2f}" for column in columns)) for i, result in enumerate(results)]
    overall = (("mean", np.mean), ("std", partial(np.std, ddof=1)), ("min", np.min), ("max", np.max))
    for name, of in overall if len(results) > 1 else ():
        rows.append((name, *(f"{of(column):.2f}" for column in columns)))
    return "\n".join(f"{first!s:<6}" + "".join(f"{cell:>12}" for cell in rest) for first, *rest in rows)
