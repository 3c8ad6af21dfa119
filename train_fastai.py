"""Train a custom ResNet with fastai and albumentations, from images to an exported learner.

    python train_fastai.py --recipe demo      handwritten digits, a minute on two CPU cores, no download
    python train_fastai.py                    CIFAR-10, 24 epochs; wants a GPU

In a notebook:

    from data import get_dls
    from train_fastai import get_learner
    learn = get_learner(get_dls("digits", bs=64, flip=0), "demo")
    learn.lr_find()
    learn.fit_one_cycle(12, 0.1)
"""

from interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()  # from here on, Ctrl-C prints one line instead of a traceback

from errors import InputError, Stopped, lasting_streams, parse, run_command
from options import Options
from recipes import recipe_table

if __name__ == "__main__":
    OPTIONS = parse(Options)  # a wrong option is reported before the imports below, which take seconds
    if OPTIONS.list_recipes:
        print(recipe_table())
        raise SystemExit

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from fastai.callback.core import Callback
from fastai.learner import Learner

from files import locked
from names import printable
from reporting.evaluation import evaluate
from reporting.pictures import save_augmentations, save_lr_find
from reporting.report import draw_again, write_report
from reporting.tables import runs_table
from trained.device import check_device
from trained.learner_file import export
from trained.safe_file import save_safetensors
from training.callbacks import BatchLog, CompiledTraining, tta_accuracy
from training.checkpoint import Checkpoint, load_checkpoint
from training.description import describe, few_batches, keep_threads, print_config, print_result
from training.distributed import all_ranks, is_rank0, joined, on_rank0, own_folder
from training.faults import faults_explained, how_to_go_on, rest_can_wait, stops_heard
from training.history import Forecast, RunLog, save_weights
from training.learner import get_learner, new_learner  # noqa: F401  get_learner is for notebooks
from training.lr_finder import RangeTest, range_test, undisturbed
from training.run import Run, check_out, open_run


def train(options: Options, cbs: Sequence[Callback] = ()) -> dict | None:
    """Train in a new run folder, or resume one; returns the content of its `result.json`.

    `cbs` are extra callbacks. Returns None with `lr_find_only`, and after training in all processes but the first.
    """
    started, given = perf_counter(), options
    with joined():
        found = folder, options, result = on_rank0(find_run, given)
        if result:
            return finished(Run(folder), options, result)
        device = check_device(options.device, options.deterministic, options.sync_bn, options.compile)
        if folder:
            keep_threads(on_rank0(Run(folder).config), device)
        learn = new_learner(options, device)
        config = describe(learn, options)
        with in_its_folder(learn, on_rank0(open_run, folder, options, config)) as run:
            if on_rank0(find_run, given) == found:
                show_start(run, learn, options, config)
                peak = choose_peak(run, learn, options)
                if options.lr_find_only:
                    return None
                history = fit(run, learn, options, peak, cbs)
                return finish(run, learn, options, peak, history, started) if is_rank0() else None
        return train(given, cbs)  # another process changed the folder before this one had locked it


def find_run(options: Options) -> tuple[Path | None, Options, dict | None]:
    """The folder of the run to resume, the options it was started with, and its result if it has finished."""
    folder, options = options.resumed()
    if folder is None:
        check_out(options.out)
        return None, options, None
    return folder, options, Run(folder).result_if_ended()


def finished(run: Run, options: Options, result: dict) -> dict:
    """Report a run that has finished, and write what a kill or a fault left unwritten at its end; returns `result`."""
    print(f"finished     {printable(str(run))}: {result['last_accuracy']:.2%} accuracy after {result['epochs']} epochs")
    if is_rank0():
        with suppress(OSError, InputError), locked(run.folder):  # a read-only disk, or another process drawing
            run.tidy()
    pictures = not options.no_pictures and not on_rank0((run / "README.md").exists)
    if pictures or not on_rank0((run / "model.pkl").exists):
        with rest_can_wait(run):
            draw_again(run, options.device, pictures)
    return result


@contextmanager
def in_its_folder(learn: Learner, folder: Path) -> Iterator[Run]:
    """Within this, the run is locked, faults become one line, and no progress bar fills a log file."""
    # In a file or a pipe a progress bar is a heap of carriage returns. RunLog prints more than fastai's own log does.
    quiet = nullcontext() if sys.stdout.isatty() else learn.no_bar()
    bs = learn.dls.train.bs
    with own_folder(folder) as own, faults_explained(own, bs), locked(own), quiet, learn.no_logging():
        learn.path = own
        run = Run(own)
        run.tidy()
        yield run


def show_start(run: Run, learn: Learner, options: Options, config: dict) -> None:
    """Write and print the configuration, print the layers, draw augmented images; compile the network if asked to."""
    run.write("config", config)
    print_config(config)
    with undisturbed(learn):
        print(f"\n{learn.summary()}\n")
    if is_rank0() and (warning := few_batches(learn, options)):
        print(f"warning: {warning}", file=sys.stderr)
    if is_rank0() and not options.no_pictures:
        save_augmentations(learn.dls, run / "augmentations.png")
    if options.compile:
        learn.add_cb(CompiledTraining(learn))


def choose_peak(run: Run, learn: Learner, options: Options) -> float | None:
    """The peak learning rate: the recipe's, or the range test's suggestion; None with `lr_find_only`."""
    peak = options.settings().lr
    if options.no_lr_find:
        return peak
    with all_ranks(learn, options.sync_bn):
        test = on_rank0(RangeTest.load, run.folder) or range_test(learn)
    peak = test.suggestion if options.lr == "auto" else peak
    chosen = None if options.lr_find_only else peak
    test.save(run.folder, chosen)
    if is_rank0() and not options.no_pictures:
        save_lr_find(test, run / "lr_find.png", chosen)
    print(f"range test   {test}")
    if options.lr_find_only:
        fresh = {"out": None, "resume": None, "max_minutes": None}
        again = options.command(run.config()["processes"], lr="LR", lr_find_only=False, **fresh)
        curve = run / ("lr_find.csv" if options.no_pictures else "lr_find.png")
        print(f"see          {printable(str(curve))}\ntrain        {again}")
    elif peak is None:
        raise InputError("--lr auto: the range test's curve is too short for a suggestion; pass --lr NUMBER")
    return chosen


def fit(run: Run, learn: Learner, options: Options, peak: float, cbs: Sequence[Callback] = ()) -> RunLog:
    """Train from the start, or from the last checkpoint. Raises Stopped, or InputError if the loss is not finite."""
    settings, config = options.settings(), run.config()
    state = on_rank0(load_checkpoint, run.folder, learn.model)
    log = RunLog()
    checkpoint = Checkpoint(log, state, options.max_minutes)
    print(f"training     {settings.epochs} epochs, peak learning rate {peak:.3g}{checkpoint}")
    own = [log, Forecast(), checkpoint]
    if options.log and is_rank0():
        own.append(BatchLog(options.log, run.folder, config, resume=state is not None))
    with all_ranks(learn, options.sync_bn), stops_heard(checkpoint.ask_to_stop):
        settings.schedule.fit(learn, settings.epochs, peak, [*own, *cbs], checkpoint.first_epoch)
    if checkpoint.stopped:
        raise Stopped(f"stopped {checkpoint.stopped}; {how_to_go_on(run.folder)}", checkpoint.code)
    if log.failure:
        high = f"a peak learning rate of {peak:.3g} is too high here, lower --lr"
        raise InputError(f"{log.failure}: {high}; {run} keeps the history")
    return log


def finish(run: Run, learn: Learner, options: Options, peak: float, log: RunLog, started: float) -> dict:
    """Measure the model, write its files and pictures; returns the content of `result.json`."""
    save_weights(learn, "last")
    print(f"measuring    {len(learn.dls.valid_ds):,} images, in fp32")
    with learn.no_bar():
        averaged = tta_accuracy(learn) if options.tta else None
    evaluation = evaluate(learn)
    last, best = round(float(evaluation.right.mean()), 6), log.history[(log.best_epoch or 1) - 1]
    test = RangeTest.load(run.folder)
    result = {
        **run.config(),
        "peak_lr": peak,
        "suggestions": test and test.suggestions,
        "last_accuracy": last,
        "tta_accuracy": averaged and round(averaged, 6),
        "calibration_error": round(evaluation.calibration_error(), 6),
        "best_accuracy": last if best is log.history[-1] else best["valid_accuracy"],
        "best_epoch": best["epoch"],
        "seconds": round(perf_counter() - started, 2),
        "history": log.history,
    }
    save_safetensors(learn, run / "model.safetensors", result)
    run.write("result", result)
    run.tidy()
    try:
        with rest_can_wait(run):
            export(learn, run / "model.pkl")
            if not options.no_pictures:
                write_report(learn, options, result, evaluation)
    finally:
        print_result(run, options, result)
    return result


def train_seeds(options: Options, cbs: Sequence[Callback] = ()) -> None:
    """Train several seeds one after the other, and print a table of their accuracies."""
    results = []
    for number in range(options.runs):
        print(f"{number + 1} of {options.runs} runs\n")
        seed = options.seed + number
        out = options.out and f"{options.out}/seed-{seed}"
        results.append(train(replace(options, runs=1, seed=seed, out=out), cbs))
        gc.collect()  # a Learner has reference cycles; this frees its device memory and ends its loaders' processes
        print()
    if None not in results:  # they are None in all processes but the first
        print(f"accuracy on the validation set, in %\n\n{runs_table(results)}")


def main(options: Options, cbs: Sequence[Callback] = ()) -> None:
    """The command."""
    with lasting_streams():
        if options.runs > 1:
            with joined():
                train_seeds(options, cbs)
        else:
            train(options, cbs)


if __name__ == "__main__":
    run_command(main, OPTIONS)
