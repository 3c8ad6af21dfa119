"""What fastai's users do, the same lines with a stock learner and with ours; what they see has to be the same."""

import copy
import pickle
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, CancelTrainException
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader, fa_collate
from fastai.data.transforms import GrandparentSplitter, ItemGetter, Normalize, get_image_files, parent_label
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import Adam
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import Flip
from fastai.vision.core import PILImage, image2tensor
from fastai.vision.data import ImageBlock
from fastcore.basics import noop
from fasttransform import Transform
from matplotlib import pyplot as plt
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from data import get_dls
from errors import InputError
from images.sources import load_images
from model import CustomResNet
from recipes import get_recipe
from train_fastai import get_learner
from training.events import StepLearner
from training.optimizer import body_and_head

CLASSES, BATCHES = 10, 3  # of 16 images each
plt.switch_backend("agg")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """train/<class>/ and test/<class>/ with five and two digits of each class as PNG files."""
    root, table = tmp_path_factory.mktemp("digits"), load_images("digits")
    for split, is_train, n in (("train", True, 5), ("test", False, 2)):
        for label in range(CLASSES):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for row in np.flatnonzero((table.is_train == is_train) & (table.labels == label))[:n]:
                Image.fromarray(table.images[row]).save(folder / f"{row}.png")
    return root


def stock_loaders(root, **getters):
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        splitter=GrandparentSplitter(valid_name="test"),
        batch_tfms=[Flip(), Normalize.from_stats([0.5] * 3, [0.3] * 3, cuda=False)],
        **{"get_items": get_image_files, "get_y": parent_label, **getters},
    )
    return block.dataloaders(root, bs=16, device="cpu", num_workers=0)


def stock(root, path):
    """fastai's own learner, with our network."""
    import fastai.vision.learner  # noqa: F401  tells fastai how to draw its results; ours does so by itself

    set_seed(0)
    return Learner(
        stock_loaders(root), CustomResNet(CLASSES, 2), CrossEntropyLossFlat(), metrics=accuracy, path=path, lr=0.01,
        splitter=body_and_head,
    )  # fmt: skip


def ours(root, path, precision="fp32", bs=16, recipe="fast"):
    set_seed(0)
    return get_learner(get_dls(root, bs=bs, device="cpu"), get_recipe(recipe, width=2), precision=precision, path=path)


@contextmanager
def quiet(learn):
    with learn.no_bar(), learn.no_logging():
        yield
    plt.close("all")


def kinds(values):
    """What a user sees of tensors and the like."""
    return [(type(v).__name__, tuple(v.shape)) if hasattr(v, "shape") else type(v).__name__ for v in values]


def titles():
    return [ax.get_title() for ax in plt.gcf().axes if ax.images]


# The lines. What a function returns has to be the same for both learners; it asserts what has to be true of each.


def show_batch_of_one_image(learn, root):
    for dl in learn.dls.loaders:
        dl.show_batch(unique=True)
        assert len(titles()) == 9
        assert len(set(titles())) == 1
    learn.fit(1)
    assert len(learn.dls.train.one_batch()[1].unique()) > 1, "no longer one image alone"


def tta(learn, root):
    preds, targets = learn.get_preds()
    averaged, same = learn.tta(n=2)
    (augmented, plain), _ = learn.tta(n=1, beta=None)
    assert torch.equal(targets, same)
    assert torch.allclose(plain, preds, atol=1e-5)
    assert (averaged - preds).abs().max() > 1e-7
    return kinds([averaged, augmented, learn.tta(n=1, use_max=True)[0]])


def tta_of_the_training_set(learn, root):
    (augmented, plain), targets = learn.tta(ds_idx=0, n=1, beta=None)
    again = learn.tta(ds_idx=0, n=1, beta=None)[0][0]
    assert plain.shape == (len(learn.dls.train_ds), 10)
    assert 0 < (augmented - again).abs().max() < 0.5, "another draw, of the same images in the same order"
    preds, same = learn.get_preds(ds_idx=0)
    assert torch.equal(targets, same)
    assert targets.tolist() == [int(y) for _, y in learn.dls.train_ds], "in the order of the training set"
    return kinds([augmented, plain, preds])


def tta_of_other_images(learn, root):
    dl = learn.dls.test_dl(get_image_files(root / "test"))
    draws = [learn.tta(dl=dl, n=1, beta=None)[0][0] for _ in range(4)]
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:]), "another draw each time"
    assert (draws[0] - learn.get_preds(dl=dl)[0]).abs().max() > 1e-7
    return kinds(draws)


def test_dl(learn, root):
    files = get_image_files(root / "test")
    preds = [
        learn.get_preds(dl=learn.dls.test_dl(o, bs=7))
        for o in (files, files.map(str), [np.array(Image.open(files[0]))])
    ]
    assert torch.equal(preds[0][0], preds[1][0])
    return [kinds(p) for p in preds]


def test_dl_with_labels(learn, root):
    files = get_image_files(root / "test")
    dl = learn.dls.test_dl(files, with_labels=True)
    preds, targets = learn.get_preds(dl=dl)
    assert targets.tolist() == [int(file.parent.name) for file in files]
    assert list(learn.validate(dl=dl)) == pytest.approx(list(learn.validate()), abs=1e-5)
    return kinds([preds, targets]), ClassificationInterpretation.from_learner(learn, dl=dl).confusion_matrix().sum()


def test_dl_of_pairs(learn, root):
    pairs = [(file, file.parent.name) for file in get_image_files(root / "test")]
    if type(learn) is Learner:  # a stock DataBlock takes files or pairs
        everything = [(file, file.parent.name) for file in get_image_files(root)]
        splits = [
            [i for i, (file, _) in enumerate(everything) if (split in str(file))] for split in ("/train/", "/test/")
        ]
        getters = {"get_x": ItemGetter(0), "get_y": ItemGetter(1), "get_items": None, "splitter": lambda _: splits}
        block = DataBlock(blocks=(ImageBlock, CategoryBlock), **getters)
        learn.dls = block.dataloaders(everything, bs=16, device="cpu", num_workers=0)
    preds, targets = learn.get_preds(dl=learn.dls.test_dl(pairs, with_labels=True))
    assert targets.tolist() == [int(label) for _, label in pairs]
    return kinds([preds, targets]), kinds(learn.get_preds(dl=learn.dls.test_dl(pairs)))


def an_item_transform_more(learn, root):
    seen = []

    class Spy(Transform):
        def encodes(self, image: PILImage):
            seen.append(image.size)
            return image

    learn.dls.train.after_item.add(Spy())
    learn.fit(1)
    assert len(seen) >= 16 * BATCHES
    return set(seen)


def a_batch_transform_more(learn, root):
    seen = []

    class Spy(Transform):
        def encodes(self, x: torch.Tensor):
            seen.append(tuple(x.shape))
            return x

    learn.dls.add_tfms([Spy()], "after_batch", "train")
    learn.fit(1)
    assert (16, 3, 32, 32) in seen


def reduce_lr_on_plateau(learn, root):
    learn.fit(3, 0.01, cbs=ReduceLROnPlateau(min_delta=1e6, factor=4, min_lr=0.002))
    return [round(float(lr), 6) for lr in learn.recorder.lrs], round(float(learn.opt.hypers[-1]["lr"]), 6)


def tensorboard(learn, root):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learn.fit(1, cbs=TensorBoardCallback(log_dir=learn.path / "log"))
    events = EventAccumulator(str(learn.path / "log")).Reload()
    tags = events.Tags()
    scalars = {name for name in tags["scalars"] if name not in ("eps_0", "eps_1", "eps_2", "lr_2", "mom_2", "wd_2")}
    scalars = {name for name in scalars if not name.startswith("sqr_mom")}  # Adam's
    assert events.Scalars("lr_0")[-1].value > 0
    return scalars, tags["images"], tags["graph"]


def wandb(learn, root):
    wandb = pytest.importorskip("wandb")
    from fastai.callback import wandb as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "init_args", lambda o: {})  # fastcore's new one takes no numbers, whatever the learner
        run = wandb.init(project="p", dir=learn.path, mode="offline", settings=wandb.Settings(silent=True))
        learn.fit(1, cbs=module.WandbCallback(n_preds=4))
        logged = {name for name in run.summary.keys() if not name.startswith("_")}  # noqa: SIM118
        wandb.finish()
    return {name for name in logged if name[-2:] != "_2" and not name.startswith(("sqr_mom", "eps"))}


def freeze(learn, root):
    def changed():
        before = {name: p.detach().clone() for name, p in learn.model.named_parameters()}
        learn.fit(2, 0.1)
        return {name for name, p in learn.model.named_parameters() if not torch.equal(p, before[name])}

    convolutions = {name for name, p in learn.model.named_parameters() if p.ndim == 4}
    learn.freeze()
    assert "head.weight" in (trained := changed())
    assert not trained & convolutions
    learn.unfreeze()
    assert changed() >= convolutions


def fine_tune(learn, root):
    learn.fine_tune(1, 0.01)
    assert learn.model.body[0].weight.requires_grad
    return len(learn.recorder.lrs), round(float(learn.recorder.lrs[0]), 6), learn.opt.frozen_idx


def rates_that_differ(learn, root):
    learn.fit_one_cycle(1, slice(1e-4, 1e-2), pct_start=0.01)
    rates = [float(hypers["lr"]) for hypers in learn.opt.hypers]
    assert rates[-1] == pytest.approx(100 * rates[0])
    return rates[-1]


def schedules(learn, root):
    learn.fit_sgdr(2, 1, lr_max=0.1)
    rates = list(map(float, learn.recorder.lrs))
    learn.fit_flat_cos(2, 0.1)
    rates += map(float, learn.recorder.lrs)
    learn.fit_one_cycle(2, 0.1)
    learn.recorder.plot_sched()
    return [round(rate, 5) for rate in (*rates, *map(float, learn.recorder.lrs))], list(learn.recorder.hps)


def lr_find(learn, root):
    weights = {name: v.clone() for name, v in learn.model.state_dict().items()}
    found = learn.lr_find(num_it=20, suggest_funcs=tuple(getattr(SuggestionMethod, n) for n in ("Minimum", "Steep")))
    assert all(torch.equal(v, weights[name]) for name, v in learn.model.state_dict().items())
    return found._fields


def callbacks_come_and_go(learn, root):
    calls = []

    class Count(Callback):
        def after_batch(self):
            calls.append(self.training)

    count = Count()
    assert learn.add_cb(count) is learn
    assert learn.count is count
    learn.fit(1)
    learn.remove_cb(Count)
    learn.fit(1, cbs=Callback(before_batch=lambda self: calls.append("batch")))
    return calls


def another_optimizer(learn, root):
    learn.opt_func = Adam
    learn.create_opt()
    learn.fit_one_cycle(1, 0.001)
    learn.opt.set_hypers(lr=0.5)
    return [sorted(hypers) for hypers in learn.opt.hypers], [hypers["lr"] for hypers in learn.opt.hypers]


def settings_of_a_fit(learn, root):
    learn.fit_one_cycle(1, 0.01, moms=(0.95, 0.85, 0.95), wd=0.3)
    moms = [round(float(mom), 5) for mom in learn.recorder.hps["mom"]]
    assert len(set(moms)) == BATCHES
    decay = [hypers["wd"] for hypers in learn.opt.hypers]
    learn.fit(3, 0.02, start_epoch=1, reset_opt=True)
    return moms, decay[-1], len(learn.recorder.lrs), [len(values) for values in learn.recorder.values]


def copies(learn, root):
    images = kinds(pickle.loads(pickle.dumps(learn.dls)).one_batch())
    seen = []
    for copied in (copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))):
        before = [p.detach().clone() for p in learn.model.parameters()]
        with quiet(copied):
            copied.fit(1, 0.1)
        assert all(torch.equal(*pair) for pair in zip(before, learn.model.parameters(), strict=True))
        assert not all(torch.equal(*pair) for pair in zip(before, copied.model.parameters(), strict=True))
        seen.append(len(copied.recorder.lrs))
    return images, seen


def a_fit_that_fails(learn, root):
    seen = []
    for error in (KeyboardInterrupt, ZeroDivisionError):

        class Fail(Callback):
            def after_batch(self, error=error):
                if self.training and self.iter == 1:
                    raise error("as asked")

        with pytest.raises(error, match="as asked"):
            learn.fit(1, cbs=Fail())
        assert not learn.cbs.argwhere(lambda cb, kind=Fail: isinstance(cb, kind)), "it has left with its fit"
        learn.fit(1)
        seen.append((len(learn.recorder.lrs), len(learn.validate())))
    return seen


def short_epochs(learn, root):
    seen = []
    learn.fit(2, cbs=[ShortEpochCallback(0.4), Callback(after_batch=lambda self: seen.append(self.training))])
    return seen


def gradient_accumulation(learn, root):
    events = []
    spy = Callback(
        before_step=lambda self: events.append("asked"),
        after_step=lambda self: events.append("step"),
        after_cancel_step=lambda self: events.append("cancelled"),
    )
    learn.fit(2, cbs=[GradientAccumulation(32), GradientClip(1.0), spy])
    return events


def cancelled(learn, root):
    class Cancel(Callback):
        def before_batch(self):
            if self.training and self.iter == 1:
                raise (CancelBatchException if self.epoch == 0 else CancelTrainException)

    learn.fit(2, cbs=Cancel())
    return len(learn.recorder.lrs), len(learn.recorder.values)


def mixes(learn, root):
    losses = []
    for cb in (MixUp(), CutMix()):
        learn.fit(1, cbs=[cb, Callback(after_loss=lambda self: losses.append(tuple(self.loss.shape)))])
    assert isinstance(learn.loss_func, CrossEntropyLossFlat), "it is back after the fit"
    return losses


def save_model(learn, root):
    learn.fit(2, cbs=SaveModelCallback(monitor="accuracy", fname="best", with_opt=True))
    best = max(values[2] for values in learn.recorder.values)
    assert learn.validate()[1] == pytest.approx(best)
    learn.fit(2, cbs=SaveModelCallback(every_epoch=True, fname="each"))
    learn.load("best")
    assert learn.validate()[1] == pytest.approx(best)
    return sorted(path.name for path in (learn.path / "models").iterdir())


def early_stopping(learn, root):
    learn.fit(9, cbs=EarlyStoppingCallback(min_delta=1e6, patience=2))
    return len(learn.recorder.values)


def csv_logger(learn, root):
    log = CSVLogger()
    learn.logger = print  # what it stands in for
    learn.add_cb(log)
    learn.fit(2)
    table = log.read_log()
    return list(table.columns), len(table)


def interpretation(learn, root):
    found = ClassificationInterpretation.from_learner(learn)
    found.plot_confusion_matrix()
    found.plot_top_losses(4)
    losses, items = found.top_losses(3)
    found.show_results([0, 1])
    return (
        found.confusion_matrix().sum(),
        kinds([losses, items]),
        kinds(Interpretation.from_learner(learn).top_losses()),
    )


def predictions(learn, root):
    everything = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    of_training = learn.get_preds(dl=learn.dls.train)
    smaller = learn.get_preds(dl=learn.dls.valid.new(bs=7))
    assert torch.allclose(smaller[0], everything[1], atol=1e-5)
    assert torch.equal(smaller[1], everything[2])
    learn.show_results(max_n=4)
    shown = len(titles())
    file = get_image_files(root / "test")[0]
    image = PILImage.create(file)
    every = [file, str(file), file.read_bytes(), image, np.array(image), TensorImage(image2tensor(image))]
    assert len({str(learn.predict(one)[2]) for one in every}) == 1, "whatever the image is handed over as"
    return kinds(everything), kinds(of_training), shown, kinds(learn.predict(file, with_input=True))


def loaders_like_these(learn, root):
    dls = learn.dls
    plain, mixed = dls.train.new(shuffle=False, bs=8), dls.valid.new(shuffle=True)
    assert mixed.one_batch()[1].tolist() != dls.valid.one_batch()[1].tolist()
    assert plain.one_batch()[1].tolist() == plain.one_batch()[1].tolist()
    same = (dls.c, dls.bs, dls.n_inp, list(dls.vocab), len(dls.train), len(dls.valid), str(dls.device))
    return kinds(plain.one_batch()), len(plain), len(mixed), len(dls.new_empty().train), same


def a_loader_of_another_kind(learn, root):
    train = learn.dls.train
    weights = np.eye(1, len(train.dataset))[0]  # one image alone
    transforms = {"after_item": list(train.after_item.fs), "after_batch": list(train.after_batch.fs)}
    dl = WeightedDL(train.dataset, bs=16, wgts=weights, shuffle=True, device="cpu", **transforms)
    x, y = dl.one_batch()
    assert len(y.unique()) == 1
    assert len(x.unique(dim=0)) > 1, "each time it is drawn it is another image"
    part = train.new(cls=PartialDL, partial_n=32)
    assert sum(len(y) for _, y in part) == 32
    return kinds([x, y]), len(part), type(part).__name__


def items(learn, root):
    train, valid = learn.dls.loaders
    assert [int(y) for _, y in train.dataset[:3]] == [int(train.dataset[i][1]) for i in range(3)]
    at_once = train.dataset[[1, 0]]
    assert [int(y) for _, y in at_once] == [int(train.dataset[i][1]) for i in (1, 0)]
    return kinds(at_once[0]), kinds(train.dataset[0]), kinds(train.do_item(0)), kinds(valid.do_item(0))


def devices_by_name(learn, root):
    learn.dls.to("cpu")
    learn.fit(1)
    learn.dls = DataLoaders(*learn.dls.loaders, device="cpu")
    learn.fit(1)
    return str(learn.dls.device), len(learn.get_preds(dl=learn.dls.test_dl(get_image_files(root / "test")))[0])


def export(learn, root):
    learn.fit(1)
    learn.export()
    loaded, file = load_learner(learn.path / "export.pkl"), get_image_files(root / "test")[0]
    there, here = loaded.predict(file), learn.predict(file)
    assert there[0] == here[0]
    assert torch.allclose(there[2], here[2], atol=1e-5)
    dl = loaded.dls.test_dl(get_image_files(root / "test"), with_labels=True)
    assert loaded.validate(dl=dl)[1] == pytest.approx(learn.validate()[1])
    learn.fit(1)
    return loaded.dls.vocab == learn.dls.vocab, kinds(there), len(learn.recorder.lrs)


class Look(Callback):
    """Does something with the learner at these events in the middle of a training."""

    def __init__(self, do, *events):
        self.do, self.looking = do, False
        for event in events:
            setattr(self, event, self.look)

    def look(self):
        if not self.looking:  # what it does has such events, too
            self.looking = True
            self.do(self.learn)
            self.looking = False


def predict(learn):
    learn.predict(learn.dls.valid_ds[0][0])


def validate(learn):
    assert len(learn.validate()) == 2


PARTS = ("before_epoch", "after_train", "after_validate", "after_epoch")


def predictions_by_a_callback(learn, root):
    for event in PARTS:
        learn.fit(2, cbs=Look(predict, event))
    return kinds(learn.get_preds())


def an_order_of_ones_own(learn, root):
    train, counts = learn.dls.train, []
    for n in (20, 50, 80):
        dl = train.new(drop_last=False)
        dl.get_idxs = lambda n=n: [i % 50 for i in range(n)]
        counts.append(sum(len(y) for _, y in dl))
    some = train.new(dataset=Subset(train.dataset, range(20)))
    assert counts == [20, 50, 80]
    return sum(len(y) for _, y in some), kinds(some.one_batch())


def functions_of_ones_own(learn, root):
    called = Counter()

    def noted(name, function):
        return lambda x: called.update([name]) or function(x)

    learn.dls.add_tfms([Transform(noted("before_batch", noop))], "before_batch", "train")
    assert [len(y) for _, y in learn.dls.train] == [16] * BATCHES
    assert called == {"before_batch": BATCHES}
    train = learn.dls.train.new(create_batch=noted("create_batch", fa_collate), shuffle_fn=noted("shuffle_fn", list))
    assert [kinds(batch) for batch in train] == [kinds(train.one_batch())] * BATCHES
    return called


def loaders_without_a_device(learn, root):
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    for kind in (torch.utils.data.DataLoader, DataLoader):
        learn.dls = DataLoaders(*(kind(TensorDataset(images, labels), batch_size=16) for _ in range(2)))
        learn.fit(1)
    return len(learn.validate())


def hyper_parameters(learn, root):
    learn.fit(1, 0.02)
    (first, *_), rates = learn.opt.hypers, learn.opt.hypers.itemgot("lr")
    assert first.copy()["lr"] == first["lr"] == 0.02
    assert "'lr': 0.02" in repr(learn.opt.hypers)
    return rates, learn.to_channelslast(use_amp=False) is learn


def metrics(learn, root):
    learn.metrics = [accuracy, error_rate]
    learn.recorder.train_metrics = True
    learn.fit(1)
    learn.recorder.plot_loss()
    return list(learn.recorder.metric_names), len(learn.validate())


LINES = [
    show_batch_of_one_image, tta, tta_of_the_training_set, tta_of_other_images, test_dl, test_dl_with_labels,
    test_dl_of_pairs, an_item_transform_more, a_batch_transform_more, reduce_lr_on_plateau, tensorboard, wandb, freeze,
    fine_tune, rates_that_differ, schedules, lr_find, callbacks_come_and_go, another_optimizer, settings_of_a_fit,
    copies, a_fit_that_fails, short_epochs, gradient_accumulation, cancelled, mixes, save_model, early_stopping,
    csv_logger, interpretation, predictions, loaders_like_these, a_loader_of_another_kind, items, devices_by_name,
    export, predictions_by_a_callback, an_order_of_ones_own, functions_of_ones_own, loaders_without_a_device,
    hyper_parameters, metrics,
]  # fmt: skip
for lines in LINES:
    lines.__test__ = False


@pytest.mark.parametrize("lines", LINES, ids=lambda lines: lines.__name__)
def test_it_does_what_a_stock_learner_does(digits, tmp_path, lines):
    seen = []
    for make in (ours, stock):
        path = tmp_path / make.__name__
        path.mkdir()
        learn = make(digits, path)
        with quiet(learn):
            seen.append(lines(learn, digits))
    assert seen[0] == seen[1]


def test_loaders_of_fastais_own_train_by_a_recipe_that_does_not_whiten(digits, tmp_path):
    dls = stock_loaders(digits)
    with pytest.raises(InputError, match="whiten: the images must come from get_dls"):
        get_learner(dls, get_recipe("fast", width=2))
    learn = get_learner(dls, get_recipe("fast", width=2, whiten=0), path=tmp_path)
    with quiet(learn):
        learn.fit(1)
        assert len(learn.validate()) == 2


class Scalers(Callback):
    """Keeps the gradient scalers that the training had."""

    def __init__(self):
        self.had = set()

    def after_step(self):
        self.had.add(self.scaler)


@pytest.mark.parametrize(
    ("recipe", "do", "events"),
    [
        ("ancestor", predict, PARTS),
        ("fast", predict, PARTS),
        ("fast", validate, PARTS),
        ("fast", lambda learn: learn.tta(n=1), PARTS[1:]),  # it counts in `epoch`
    ],
    ids=["predict", "predict, averaged", "validate", "tta"],
)
def test_looks_by_a_callback_change_no_training(digits, tmp_path, recipe, do, events):
    weights, records, scalers = [], [], Scalers()
    for cbs in ([], [Look(do, *events), scalers]):
        learn = ours(digits, tmp_path, bs=7, recipe=recipe)
        with quiet(learn):
            set_seed(0)
            learn.fit_one_cycle(2, 0.1, cbs=cbs)
        weights.append(learn.model.state_dict())
        records.append((learn.recorder.values, list(map(float, learn.recorder.lrs)), learn.train_iter))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert records[0] == records[1]
    assert len(scalers.had) == 1


def test_a_callback_validates_on_other_images(digits, tmp_path):
    learn, found = ours(digits, tmp_path), []
    few = learn.dls.test_dl(get_image_files(digits / "test")[:3], with_labels=True)
    with quiet(learn):
        learn.fit(1, cbs=Look(lambda learn: found.append(learn.validate(dl=few)), "after_epoch"))
        assert found == [learn.validate(dl=few)]


def test_accumulated_batches_are_as_one(digits, tmp_path):
    """What a recipe does with gradients and steps, it does once for all that `GradientAccumulation` puts together."""

    def change(bs, cbs):
        set_seed(0)
        dls = get_dls(digits, bs=bs, device="cpu")  # group norm, as batch norm takes the statistics of smaller batches
        learn = get_learner(dls, get_recipe("fast", width=2), "group", "fp32", path=tmp_path)
        before = [p.detach().clone() for p in learn.model.parameters()]
        with quiet(learn):
            learn.fit(2, 0.001, cbs=cbs)  # six steps; the average begins at the fifth
        return [(p.detach() - b) for p, b in zip(learn.model.parameters(), before, strict=True)]

    for whole, accumulated in zip(change(16, []), change(8, [GradientAccumulation(16)]), strict=True):
        assert (whole - accumulated).norm() < 0.01 * whole.norm()


def test_the_best_weights_stay_after_a_cancelled_fit(digits, tmp_path):
    class Cancel(Callback):
        def after_batch(self):
            if (self.epoch, self.iter) == (2, 6):  # the average has gone on since the last epoch
                raise CancelFitException

    learn = ours(digits, tmp_path, bs=5)
    with quiet(learn):
        learn.fit(3, 0.1, cbs=[SaveModelCallback(monitor="accuracy"), Cancel()])
    best = torch.load(tmp_path / "models/model.pth", weights_only=True)
    assert all(torch.equal(value, best[name]) for name, value in learn.model.state_dict().items())


def test_an_export_by_a_callback_trains_on(digits, tmp_path):
    class Exports(Callback):
        def after_epoch(self):
            self.learn.export()

    learn = ours(digits, tmp_path, bs=10)
    with quiet(learn):
        learn.fit(1, cbs=Exports())
    loaded = load_learner(tmp_path / "export.pkl")
    loaded.dls = learn.dls
    with quiet(loaded):
        loaded.fit(1)


def test_looks_and_range_tests_change_no_training(digits, tmp_path):
    weights = []
    for look in (lambda learn: None, lambda learn: learn.dls.show_batch(), lambda learn: learn.lr_find(num_it=8)):
        learn = ours(digits, tmp_path)
        with quiet(learn):
            look(learn)
            set_seed(0)
            learn.fit(1, 0.1)
        weights.append(learn.model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())
    assert not torch.equal(*(learn.dls.train.one_batch()[0] for _ in range(2))), "each look is another"


class Note(Callback):
    """Notes what it is asked; removes another at an event, as fastai's callbacks may."""

    def __init__(self, notes, name, order, leaves=None):
        self.notes, self.label, self.order, self.leaves = notes, name, order, leaves

    def before_batch(self):
        self.notes.append((self.label, "before_batch", self.training))
        if self.leaves is not None and self.leaves in self.learn.cbs:
            self.leaves.run = False
            self.learn.remove_cb(self.leaves)

    def after_step(self):
        self.notes.append((self.label, "after_step"))
        self.run = False  # for the rest of this fit

    def after_fit(self):
        self.notes.append((self.label, "after_fit"))


class Everything(Callback):
    """Takes events in a way of its own."""

    def __call__(self, event_name):
        if event_name != "after_create":
            self.learn.heard.append(event_name)


def test_events_are_those_of_fastai_in_order(digits, tmp_path):
    heard = []
    for kind in (Learner, StepLearner):
        notes = []
        learn = kind(stock_loaders(digits), CustomResNet(CLASSES, 2), CrossEntropyLossFlat(), lr=0.01, path=tmp_path)
        leaving = Note(notes, "leaving", 2)
        learn.heard = notes
        train_only = Note(notes, "training alone", -3)
        train_only.run_valid = False
        free = Callback(after_pred=lambda self, notes=notes: notes.append("after_pred"))
        with quiet(learn):
            learn.fit(
                2,
                cbs=[
                    Note(notes, "late", 90),
                    leaving,
                    Note(notes, "early", 1, leaving),
                    train_only,
                    free,
                    Everything(),
                ],
            )
        heard.append(notes)
    assert heard[0] == heard[1]
    assert {"after_pred", ("early", "after_step"), "before_backward"} <= set(heard[0])
