"""The pictures of runs, drawn on matplotlib's `Figure`, so that a notebook's figures and backend are left alone."""

from itertools import cycle
from pathlib import Path
from textwrap import fill

import numpy as np
from fastai.data.core import DataLoaders
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from files import complete
from names import shortened
from recipes import Curve, Recipe
from reporting.evaluation import Evaluation
from training.lr_finder import RangeTest

# Okabe and Ito's palette, for colour-blind readers, too
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
MARKS = (ORANGE, "black", GREEN, PURPLE, GREY)
COLORS = (BLUE, ORANGE, GREEN, PURPLE, GREY, "black", "#56B4E9", "#E69F00")
AS_IT_IS = {"parse_math": False}  # for texts with names in them: matplotlib would typeset what is between two dollars
MANY = 10  # images that it takes for a meaningful accuracy
BELOW = 6  # points of accuracy shown below the lowest marked line
LINE = 95  # characters of a legend that is as wide as the picture
MOST_CLASSES = 100  # in the picture of confusions: more could not be told apart


def save_figure(figure: Figure, path: Path, comment: str | None = None, svg: bool = False) -> None:
    """Write it to `path`, complete or not at all. `comment` goes into the file; `svg` writes an SVG file, too."""
    with complete(path) as beside:
        figure.savefig(beside, dpi=120, metadata={"Comment": comment} if comment else None)
    if svg:
        with complete(path.with_suffix(".svg")) as beside, rc_context({"svg.hashsalt": "the same twice"}):
            figure.savefig(beside, metadata={"Date": None})


def new_axes(title: str, xlabel: str, ylabel: str, size: tuple[float, float] = (7, 4.2)) -> tuple[Figure, Axes]:
    """A figure and its single plot."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, **AS_IT_IS)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_augmentations(dls: DataLoaders, path: Path, columns: int = 8, draws: int = 4) -> None:
    """One image a column, under its class: the original, and below it the augmented image in each of `draws` epochs."""
    table, augment = dls.train_ds.items, dls.train.after_item.augment.pipeline
    rows = np.random.default_rng(0).permutation(len(table))[:columns].tolist()
    originals, labels = table.batch(rows)
    columns = len(rows)
    grid = [originals] + [augment(originals, epoch, range(columns), rows) for epoch in range(draws)]
    figure = Figure(figsize=(1.2 * columns, 1.2 * (draws + 1) + 0.5), layout="constrained")
    axes = figure.subplots(draws + 1, columns, squeeze=False)
    for i, images in enumerate(grid):
        for j, image in enumerate(images):
            axes[i, j].imshow(image, interpolation="nearest")
            axes[i, j].set(xticks=[], yticks=[])
            axes[i, j].spines[:].set_visible(False)
        axes[i, 0].set_ylabel("original" if i == 0 else f"draw {i}")
    for ax, label in zip(axes[0], labels, strict=False):
        ax.set_title(shortened(table.classes[label]), fontsize=10, **AS_IT_IS)
    save_figure(figure, path)


def save_lr_find(test: RangeTest, path: Path, chosen: float | None) -> None:
    """The range test's curve, each suggestion, and the peak learning rate that training uses, if there is one."""
    figure, axes = new_axes("Learning-rate range test", "learning rate", "training loss")
    axes.set_xscale("log")
    if chosen is not None:  # drawn first, to be first in the legend
        axes.axvline(chosen, color="black", lw=1.5, label=f"this run's peak: {chosen:.2g}")
    axes.plot(test.lrs, test.batch_losses, ".", ms=4, color=BLUE, alpha=0.5, label="each batch")
    axes.plot(test.lrs, test.losses, color=BLUE, label="smoothed, as fastai does")
    for (name, lr), marker, color in zip(test.suggestions.items(), "*os^D", MARKS, strict=True):
        if lr is not None:
            label = f"{name}: {lr:.2g}" + (" (default suggestion)" if name == test.default else "")
            axes.plot(lr, test.loss_at(lr), marker, color=color, ms=11 if name == test.default else 6, label=label)
    if test.losses:
        # Shown in full, the divergence at the end would flatten the valley.
        low, start = min(test.batch_losses), test.losses[0]
        axes.set_ylim(low - 0.15 * (start - low + 0.1), start + 0.6 * (start - low + 0.1))
    else:
        axes.text(0.5, 0.5, "the loss was not finite from the first batch on", ha="center", transform=axes.transAxes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", frameon=False, fontsize="small")
    save_figure(figure, path)


def save_history(history: list[dict], folder: Path, what: str, seed_curve: list[float] | None = None) -> None:
    """`loss.png` and `accuracy.png`: training and validation curves, the best and the last accuracy marked.

    seed_curve: the validation accuracy, 0 to 1, in each epoch of the recipe `seed`, for comparison.
    """
    epochs = [row["epoch"] for row in history]
    for kind, scale, unit in (("loss", 1, ""), ("accuracy", 100, " in %")):
        figure, axes = new_axes(f"{kind.capitalize()}: {what}", "epoch", kind + unit)
        train, valid = ([scale * row[f"{part}_{kind}"] for row in history] for part in ("train", "valid"))
        axes.plot(epochs, train, "o-", ms=3, color=BLUE, label="training, augmented images")
        axes.plot(epochs, valid, "s-", ms=3, color=ORANGE, label="validation")
        if kind == "accuracy":
            best = max(range(len(valid)), key=valid.__getitem__)
            also = ", and none is better" if valid[best] == valid[-1] else ""
            label = f"last epoch{also}: {valid[-1]:.2f} %"
            axes.plot(epochs[-1], valid[-1], "D", ms=9, mfc="none", color="black", label=label)
            if not also:
                label = f"best, chosen on the validation set: {valid[best]:.2f} % in epoch {epochs[best]}"
                axes.plot(epochs[best], valid[best], "o", ms=11, mfc="none", color=GREY, label=label)
            if seed_curve is not None:
                curve = 100 * np.array(seed_curve)
                axes.plot(range(1, len(curve) + 1), curve, lw=1, color=GREY, label="recipe seed, for comparison")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(history) == 1:  # matplotlib would mark hundredths of an epoch
            axes.set(xlim=(0, 2), xticks=[1])
        axes.legend(frameon=False)
        save_figure(figure, folder / f"{kind}.png", svg=True)


def save_comparison(
    groups: dict[str, list[dict]], path: Path, comment: str | None = None, marks: dict[str, float] | None = None
) -> None:
    """The validation accuracy in each epoch: the mean of each group's runs, with a band of ± one standard deviation.

    groups: name → the `result.json` contents of runs on the same data. marks: name → an accuracy in percent to draw as
    a line.
    """
    first = next(iter(groups.values()))[0]
    widths = {run["width"] for runs in groups.values() for run in runs}
    title = first["source"] + (f", width {first['width']}" if len(widths) == 1 else "")
    images = "test set" if first["valid"] == "test" else "hold-out"
    figure, axes = new_axes(title, "epoch", f"accuracy on the {images} in %", (7, 4.8))
    for (name, runs), color, marker in zip(groups.items(), cycle(COLORS), cycle("os^DvPX"), strict=False):
        curves = np.array([[100 * row["valid_accuracy"] for row in run["history"]] for run in runs])
        x, last = range(1, curves.shape[1] + 1), np.mean([100 * run["last_accuracy"] for run in runs])
        mean, std = curves.mean(0), curves.std(0, ddof=1) if len(runs) > 1 else 0
        low, high = np.clip((mean - std, mean + std), 0, 100)
        axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
        label = f"{name}: {last:.2f} % at the end, " + (f"{len(runs)} seeds ± std" if len(runs) > 1 else "1 seed")
        axes.plot(x, mean, f"{marker}-", ms=3, color=color, label=fill(label, LINE))
    for (name, accuracy), style in zip((marks or {}).items(), ("-", "--", ":"), strict=False):
        axes.axhline(accuracy, color="gray", lw=1, ls=style, label=f"{name}: {accuracy:.2f} %")
    if marks:
        axes.set_ylim(bottom=min(marks.values()) - BELOW)  # leaves out the first epochs, to spread the end
    axes.xaxis.get_major_locator().set_params(integer=True)
    columns = 1 if max(map(len, axes.get_legend_handles_labels()[1])) > 50 else 2
    legend = figure.legend(frameon=False, loc="outside lower center", ncols=columns, fontsize="small")
    lines = 0
    for text in legend.get_texts():
        text.set(**AS_IT_IS)
        lines += text.get_text().count("\n") + 1
    figure.set_figheight(max(4.8, 3.8 + 0.18 * lines / columns))  # what the legend needs, the curves keep
    save_figure(figure, path, comment)


def save_schedules(recipes: dict[str, Recipe], path: Path, comment: str | None = None, svg: bool = False) -> None:
    """The learning rate of each recipe over its epochs; a plateau schedule's initial one is dashed."""
    figure, axes = new_axes("Learning rate", "epoch", "learning rate")
    for (name, recipe), color in zip(recipes.items(), cycle(COLORS), strict=False):
        position = np.linspace(0, 1, 1000)
        if isinstance(recipe.schedule, Curve):
            lr, style = [recipe.schedule.lr(recipe.lr, p) for p in position], "-"
        else:
            lr, style, name = np.full(1000, recipe.lr), "--", f"{name}, until the loss stalls"
        axes.plot(position * recipe.epochs, lr, style, color=color, label=name)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path, comment, svg)


def save_confusion(evaluation: Evaluation, path: Path) -> None:
    """The confusion matrix: a row for each true class, shaded by the fraction of that class's images.

    Of more than `MOST_CLASSES` classes, those with the most mistakes.
    """
    classes = evaluation.most_confused(MOST_CLASSES)
    counts, names = evaluation.confusion(classes), [shortened(evaluation.table.classes[i]) for i in classes]
    n = len(names)
    side = max(5.5, min(0.55 * n + 1.5, 14))
    title = "Confusions" if n == len(evaluation.table.classes) else f"Confusions: the {n} classes with the most"
    figure, axes = new_axes(title, "predicted class", "true class", (side + 0.5, side))
    axes.grid(False)
    shade = counts / evaluation.counts()[0, classes, None].clip(min=1)
    axes.imshow(shade, cmap="Blues", vmin=0, vmax=1)
    if n <= 25:  # labels of more would overlap
        axes.set_xticks(range(n), names, rotation=45, ha="right", **AS_IT_IS)
        axes.set_yticks(range(n), names, **AS_IT_IS)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if shade[row, column] > 0.5 else "black"
                axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    save_figure(figure, path)


def save_classes(evaluation: Evaluation, path: Path) -> None:
    """The accuracy of each class, the lowest first; of more than 40 classes, the lowest 40."""
    images, right = evaluation.counts()
    tried = np.flatnonzero(images)  # of a class of one image a hold-out has none
    accuracies = 100 * right / images.clip(min=1)
    order = tried[np.argsort(accuracies[tried], kind="stable")][:40]
    size = (7, max(2.5, 0.28 * len(order) + 1.2))
    title = f"Accuracy of each class, dashed: of all, {100 * evaluation.right.mean():.2f} %"
    figure, axes = new_axes(title, "accuracy in %", "", size)
    rows = range(len(order))
    axes.barh(rows, accuracies[order], color=BLUE)
    axes.set_yticks(rows, [shortened(evaluation.table.classes[i]) for i in order], **AS_IT_IS)
    for row, i in enumerate(order):
        axes.text(102, row, f"{accuracies[i]:.1f} % of {images[i]}", va="center", fontsize=8)
    axes.axvline(100 * evaluation.right.mean(), color="black", lw=1, ls="--")
    axes.invert_yaxis()
    axes.set(xlim=(0, 124), xticks=range(0, 101, 20))
    axes.grid(False, axis="y")
    save_figure(figure, path)


def save_reliability(evaluation: Evaluation, path: Path) -> None:
    """The reliability diagram: accuracy against confidence, and below it the number of images at each confidence.

    The line leaves out bins of few images, whose accuracy is chance.
    """
    confidence, accuracy, count = (np.array(part) for part in zip(*evaluation.calibration(), strict=True))
    title = f"Reliability: expected calibration error {100 * evaluation.calibration_error():.1f} %"
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes, parts = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color=GREY, ls="--", label="perfectly calibrated")
    for mask, style, label in (
        (count >= MANY, {"ls": "-"}, "this network"),
        (count < MANY, {"ls": "", "mfc": "none", "alpha": 0.5}, f"this network, fewer than {MANY} images"),
    ):
        if mask.any():
            axes.plot(confidence[mask], accuracy[mask], marker="o", color=BLUE, label=label, **style)
    parts.bar(confidence, count, width=0.03, color=BLUE)
    axes.set(title=title, ylabel="accuracy", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    parts.set(yscale="log", ylim=(0.7, 2 * max(MANY, count.max())), ylabel="images")
    parts.set_xlabel("confidence: probability of the predicted class")
    parts.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    for each in (axes, parts):
        each.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, path)


def save_examples(evaluation: Evaluation, chosen: np.ndarray, maps: np.ndarray, title: str, path: Path) -> None:
    """The `chosen` images with their predictions, and below each its heat map from `grad_cam`."""
    columns = min(6, max(3, len(chosen)))  # the title needs the width of three
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.4 * columns, 3.1 * rows + (0.7 if rows else 0.3)), layout="constrained")
    title += "\nbelow each: Grad-CAM" if rows else ": there are none"
    figure.suptitle(title, fontsize=12 if rows else 9)
    grid = figure.subplots(2 * rows, columns, squeeze=False) if rows else np.empty(0)
    for axes in grid.flat:
        axes.set_axis_off()
    names = [shortened(name, 11) for name in evaluation.table.classes]  # with a percentage, as wide as an image
    for k, (i, heat) in enumerate(zip(chosen, maps, strict=True)):
        top, bottom = grid[2 * (k // columns), k % columns], grid[2 * (k // columns) + 1, k % columns]
        image, is_label, label = evaluation.table[i].image, evaluation.labels[i], evaluation.predicted[i]
        right = " ✓" if is_label == label else f"\ntrue: {names[is_label]}"
        top.set_title(f"{names[label]}, {100 * evaluation.confidence[i]:.0f} %{right}", fontsize=9, **AS_IT_IS)
        top.imshow(image, interpolation="nearest")
        bottom.imshow(image.mean(2), cmap="gray", interpolation="nearest")
        bottom.imshow(heat, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
    save_figure(figure, path)
