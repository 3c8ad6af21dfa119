import gc
import multiprocessing
import os
import pickle
import time

import albumentations as A
import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import AttrGetter, IndexSplitter, Normalize
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from fasttransform import Pipeline, Transform
from scipy.stats import chi2_contingency, chisquare, kstest

from aug import BitRandom, Cutout, KeyedAugment, train_transforms
from data import get_dls
from images.table import ImageTable
from options import Options
from training.learner import new_learner

N = 64


def one_image_many_times(seed=0):
    """64 copies of one image to train on, and two others to validate on."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images = np.concatenate([np.repeat(noise[:1], N, axis=0), noise[1:]])
    labels = np.array([0, 1] * (N // 2) + [0, 1])
    return ImageTable("noise", ("a", "b"), images, labels, np.arange(N + 2) < N, rows=np.arange(N + 2))


def draw_epoch(dl):
    """The pixels of one epoch as bytes, one image an entry."""
    scale = [(t.std, t.mean) for t in dl.after_batch.fs if isinstance(t, Normalize)] or [(1, 0)]
    (std, mean) = scale[0]
    return [
        (255 * image).round().byte().permute(1, 2, 0).numpy().tobytes()
        for batch in dl
        for image in batch[0].as_subclass(torch.Tensor) * std + mean
    ]


def ours(workers, seed=0, bs=8):
    return get_dls(one_image_many_times(), bs=bs, seed=seed, workers=workers, device="cpu").train


class AlbumentationsTransform(Transform):
    """What fastai's documentation shows, and what most projects do."""

    split_idx = 0

    def __init__(self, transforms):
        self.transforms = transforms

    def encodes(self, img: PILImage):
        return PILImage.create(self.transforms(image=np.array(img))["image"])


def documented(workers, seed=0, bs=8):
    table = one_image_many_times()
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=AttrGetter("image"),
        get_y=AttrGetter("label"),
        splitter=IndexSplitter([N, N + 1]),
        item_tfms=AlbumentationsTransform(train_transforms()),
    )
    return block.dataloaders(table, bs=bs, num_workers=workers, device="cpu").train


def check_randomness(make_loader):
    """The rule: every draw is another, for every number of workers the same ones, and others in the next epoch."""
    epochs = {}
    for workers in (0, 1, 2, 4):
        loader = make_loader(workers)
        epochs[workers] = [draw_epoch(loader), draw_epoch(loader)]
        first, second = epochs[workers]
        assert len(first) == len(second) == N
        assert len(set(first)) == N
        assert len(set(first + second)) == 2 * N
    assert epochs[0] == epochs[1] == epochs[2] == epochs[4]


def test_augmentation_depends_on_seed_epoch_and_position_alone():
    check_randomness(ours)


def test_the_documented_way_fails_the_same_test():
    with pytest.raises(AssertionError):
        check_randomness(documented)
    loader = documented(workers=2)
    first, second = draw_epoch(loader), draw_epoch(loader)
    assert len(set(first)) <= N // 2, "two workers draw the same"
    assert set(first) == set(second), "the second epoch repeats the first"


def test_another_seed_draws_otherwise():
    assert not set(draw_epoch(ours(0))) & set(draw_epoch(ours(0, seed=1)))


def test_batch_size_and_a_broken_off_epoch_change_nothing():
    loader = ours(0)
    loader.one_batch()
    loader.epoch = -1
    assert draw_epoch(loader) == draw_epoch(ours(2, bs=16))


@pytest.mark.parametrize("workers", [0, 2])
def test_setting_the_epoch_repeats_it(workers):
    loader = ours(workers)
    epochs = [draw_epoch(loader) for _ in range(3)]
    loader.epoch = 0
    assert draw_epoch(loader) == epochs[1]


def test_workers_start_once_and_survive_a_broken_off_epoch():
    before = set(multiprocessing.active_children())
    loader = ours(2)
    first = draw_epoch(loader)
    pids = {worker.pid for worker in set(multiprocessing.active_children()) - before}
    for _ in loader:
        break
    third = draw_epoch(loader)
    assert len(pids) == 2
    assert pids <= {worker.pid for worker in multiprocessing.active_children()}
    assert third == [draw_epoch(other) for other in [ours(0)] for _ in range(3)][2]
    assert not set(first) & set(third)


def test_workers_are_forked_whatever_python_would_do():
    """From 3.14 on it would start them from a server, which is then their parent."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert draw_epoch(ours(1)) == draw_epoch(ours(0))
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_batches_stay_as_they_are_while_workers_run_ahead():
    def uint8_batches(workers):
        loader = ours(workers)
        loader.after_batch = Pipeline([])
        for x, y in loader:
            time.sleep(0.02 * workers)  # the workers have all that they may prepare ready by now
            yield x, y

    for (x, y), (kept_x, kept_y) in zip(uint8_batches(0), list(uint8_batches(2)), strict=True):
        assert torch.equal(x, kept_x)
        assert torch.equal(y, kept_y)


def test_workers_stop_when_their_loader_goes():
    before = set(multiprocessing.active_children())
    loader = ours(2)
    loader_batches = iter(loader)
    next(loader_batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    del loader, loader_batches
    start = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - start < 3, "without a wait for those that do not answer"
    assert not set(multiprocessing.active_children()) - before


def test_a_forked_process_drops_its_copy_of_the_loader_in_silence(capfd):
    loader = ours(2)
    first = draw_epoch(loader)
    child = os.fork()
    if child == 0:
        try:
            del loader
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert capfd.readouterr().err == ""
    assert draw_epoch(loader) != first, "the workers are still there for their owner"


def test_a_pickled_pipeline_draws_the_same():
    images = one_image_many_times().images
    augment = KeyedAugment(train_transforms(), seed=3)
    copy = pickle.loads(pickle.dumps(augment))
    assert np.array_equal(augment(images, 1, range(len(images))), copy(images, 1, range(len(images))))


def test_a_crop_is_a_window_of_the_reflected_image():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    windows = {padded[i : i + 32, j : j + 32].tobytes(): (i, j) for i in range(9) for j in range(9)}
    augment = KeyedAugment(train_transforms(flip=0, cutout=0))
    seen = {windows[out.tobytes()] for out in augment(np.repeat(image[None], 2000, axis=0), 0, range(2000))}
    assert seen == set(windows.values())


@pytest.mark.parametrize("options", [{"p": 0.5}, {"position": "random"}])
def test_padding_with_randomness_is_keyed_like_the_rest(options):
    pipeline = A.Compose([A.PadIfNeeded(40, 40, **options), A.Resize(32, 32)])
    augment, images = KeyedAugment(pipeline), np.full((64, 32, 32, 3), 9, dtype=np.uint8)
    images[:, 4:9] = 200
    out = augment(images, 0, range(64))
    assert len({image.tobytes() for image in out}) > 1
    assert np.array_equal(augment(images[8:], 0, range(8, 64)), out[8:])


def test_alternating_flips_turn_every_image_from_epoch_to_epoch():
    images, rows = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8), np.arange(2000) + 7
    augment = KeyedAugment(train_transforms(pad=0, flip=0, cutout=0), 3, alternating=True)
    epochs = [augment(images, epoch, range(2000), rows) for epoch in range(3)]
    turned = [(out == images[:, :, ::-1]).all((1, 2, 3)) for out in epochs]
    assert all((out == images).all((1, 2, 3))[~t].all() for out, t in zip(epochs, turned, strict=True))
    assert (turned[0] != turned[1]).all()
    assert (turned[0] == turned[2]).all()
    assert abs(turned[0].mean() - 0.5) < 0.05, "half of them begin turned"
    order = np.random.default_rng(1).permutation(2000)
    again = augment(images[order], 1, range(2000), rows[order])
    assert np.array_equal(again, epochs[1][order]), "wherever in the epoch an image stands"
    other = KeyedAugment(train_transforms(pad=0, flip=0, cutout=0), 4, alternating=True)(images, 0, range(2000), rows)
    assert not np.array_equal(other, epochs[0]), "another seed, other images"


def test_half_of_the_images_are_flipped():
    images = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    out = KeyedAugment(train_transforms(pad=0, cutout=0))(images, 0, range(2000))
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (out == images).all((1, 2, 3))).all()
    assert 900 < flipped.sum() < 1100


def test_the_cutout_is_one_square_of_the_fill_colour_anywhere_in_the_image():
    images = np.zeros((2000, 32, 32, 3), dtype=np.uint8)
    out = KeyedAugment(train_transforms(pad=0, flip=0, fill=(1, 2, 3)))(images, 0, range(2000))
    hole = (out == (1, 2, 3)).all(-1)
    assert (hole.sum((1, 2)) == 64).all()
    assert (out[~hole] == 0).all()
    tops, lefts = hole.any(2).argmax(1), hole.any(1).argmax(1)
    assert all(hole[i, t : t + 8, x : x + 8].all() for i, (t, x) in enumerate(zip(tops, lefts, strict=True)))
    assert set(tops) == set(lefts) == set(range(25))


def test_cutout_is_equal_in_distribution_to_coarse_dropout_with_one_hole():
    side = (8, 8)
    coarse = A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=(1, 2, 3), p=1)
    images, counts = np.zeros((20_000, 32, 32, 3), dtype=np.uint8), []
    for seed, transform in enumerate((Cutout(8, (1, 2, 3)), coarse)):
        out = KeyedAugment(A.Compose([transform]), seed)(images, 0, range(len(images)))
        hole = (out == (1, 2, 3)).all(-1)
        assert (hole.sum((1, 2)) == 64).all()
        tops, lefts = hole.any(2).argmax(1), hole.any(1).argmax(1)
        counts.append(np.bincount(25 * tops + lefts, minlength=625))
        assert chisquare(counts[-1]).pvalue > 0.001, "every position is as likely as any other"
    assert chi2_contingency(counts).pvalue > 0.001
    crooked = np.bincount(np.random.default_rng(0).binomial(624, 0.5, 20_000), minlength=625)
    assert chisquare(crooked).pvalue < 0.001, "the test sees a difference"


def test_python_numbers_from_a_bit_generator_are_uniform():
    python = BitRandom(np.random.Philox(key=0))
    assert kstest([python.random() for _ in range(20_000)], "uniform").pvalue > 0.001
    for n in (2, 25, 2**40, 2**100):
        assert kstest([(python.randrange(n) + python.random()) / n for _ in range(5_000)], "uniform").pvalue > 0.001


def test_validation_images_are_never_augmented():
    table = one_image_many_times()
    dls = get_dls(table, bs=8, device="cpu", workers=0)
    images = list(table.images[N:])
    for dl in (dls.valid, dls.test_dl(table[[N, N + 1]]), dls.test_dl(images)):
        assert draw_epoch(dl) == [image.tobytes() for image in images]


def test_the_pipeline_is_an_albumentations_compose():
    assert isinstance(train_transforms(), A.Compose)


@pytest.mark.parametrize(("flips", "flip"), [("alternating", None), ("random", None), ("random", 0.0)])
def test_the_options_of_the_augmentation_reach_the_images(flips, flip):
    options = Options(data="digits", width=2, pad=0, cutout=5, flips=flips, flip=flip)
    dls = new_learner(options, torch.device("cpu")).dls
    table, augment = dls.train_ds.items, dls.train.after_item.augment.pipeline
    images, fill = table.batch(range(N))[0], [round(255 * m) for m in table.train_stats()[0]]
    mirrored = []
    for epoch in (0, 1):
        out = augment(images, epoch, range(N), range(N))
        hole = (out == fill).all(-1)
        assert hole.sum((1, 2)).min() == 5 * 5
        as_is, turned = (((out == x) | hole[..., None]).all((1, 2, 3)) for x in (images, images[:, :, ::-1]))
        assert (as_is | turned).all()
        mirrored.append(turned & ~as_is)
    changed = (mirrored[0] != mirrored[1]).mean()
    if flips == "alternating":
        assert changed == 1
        assert 0 < mirrored[0].mean() < 1
    else:
        assert (changed == 0) if flip == 0 else (0 < changed < 1)
