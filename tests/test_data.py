import io
import multiprocessing
import pickle
import random
import tarfile
import time
import urllib.request
import zipfile

import numpy as np
import pytest
import torch
from conftest import CIFAR_CLASSES, tar, zipped
from fastai.data.external import fastai_cfg
from fastai.torch_core import TensorImage
from fastai.vision.core import PILImage
from fasttransform import Pipeline, Transform
from PIL import Image

from data import get_dls, rgb_image
from errors import InputError
from images.cifar10 import CIFAR10_STATS
from images.sources import load_images
from images.table import ImageTable
from loader import Augment

# Sources


def test_digits():
    table = load_images("digits")
    assert len(table) == 1797
    assert table.images.shape == (1797, 32, 32, 3)
    assert table.images.dtype == np.uint8
    assert (table.images.min(), table.images.max()) == (0, 255)
    for label in range(10):
        mine = table.labels == label
        assert abs((mine & table.is_train).sum() / mine.sum() - 0.8) < 0.01
    assert table.fingerprint() == load_images("digits").fingerprint()


def test_a_folder_keeps_its_pixels_classes_and_split(image_folder):
    root = image_folder(classes=("a class", "größe"))
    table = load_images(root)
    assert table.classes == ("a class", "größe")
    assert (table.is_train.sum(), (~table.is_train).sum()) == (8, 4)
    for i in range(4):
        expected = np.asarray(Image.open(root / "train" / "größe" / f"{i:03}.png"))
        assert np.array_equal(table[4 + i].image, expected)
        assert table[4 + i].label == "größe"


def test_other_sizes_modes_and_suffixes_become_32x32_rgb(image_folder):
    root = image_folder(size=(50, 20), suffix=".JPG")
    Image.fromarray(np.full((7, 9), 200, dtype=np.uint8)).save(root / "train/cat/grey.png")
    Image.fromarray(np.full((64, 64, 4), 100, dtype=np.uint8)).save(root / "train/cat/rgba.png")
    (root / "train/cat/.DS_Store").write_text("left by a file manager")
    table = load_images(root)
    assert table.images.shape == (14, 32, 32, 3)
    assert (table.images[4] == 200).all(), "grey.png, sorted after 000.JPG to 003.JPG"
    assert (table.images[5] == 100).all(), "rgba.png"


def test_larger_images_are_resized_smoothly(image_folder):
    root, across = image_folder(train=0), np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    for name in ("cat", "dog"):
        Image.fromarray(across).save(root / "train" / name / "a.png")
    found = load_images(root).images[0, :, 1:-1, 0].astype(int)
    assert (abs(found - (8 * np.arange(1, 31) + 2)) <= 1).all(), "the mean of the two pixels there"


def test_every_kind_of_pixel_is_converted(image_folder):
    root = image_folder(train=0)
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    images = {
        "1.png": rgb.convert("1"),
        "16bit.png": Image.fromarray(grey),
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey-alpha.png": rgb.convert("LA"),
        "palette.png": rgb.convert("P"),
    }
    for name, image in images.items():
        image.save(root / "train/cat" / name)
    rgb.save(root / "train/dog/rgb.png")
    table = load_images(root)
    assert (table.images[1] == (grey >> 8)[..., None]).all(), "not cut off at 255"
    for row, name in ((0, "1.png"), (3, "grey-alpha.png"), (4, "palette.png")):
        assert np.array_equal(table.images[row], np.asarray(images[name].convert("RGB"))), name
    assert np.array_equal(rgb_image(root / "train/cat/16bit.png"), table.images[1]), "predict sees the same"


def test_of_an_animated_image_the_first_frame_is_taken_with_a_warning(image_folder, capsys):
    root = image_folder()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for name in ("a.png", "b.png"):
        frames[0].save(root / "train/cat" / name, save_all=True, append_images=frames[1:])
    for _ in range(2):
        table = load_images(root)
        assert (table.images[4] == (255, 0, 0)).all()
        line = f"warning: images: {root / 'train/cat/a.png'}: animated; its first frame is taken, and of 1 others\n"
        assert capsys.readouterr().err == line, "from the cache, too"


def test_a_photograph_with_a_second_picture_in_it_is_not_animated(image_folder, capsys):
    root = image_folder()
    path, second = root / "train/cat/a.jpg", Image.new("RGB", (16, 16), "blue")
    Image.new("RGB", (32, 32), "red").save(path, format="MPO", save_all=True, append_images=[second])
    assert Image.open(path, formats=["JPEG"]).is_animated, "as Pillow has it"
    red, green, blue = load_images(root).images[4].reshape(-1, 3).mean(0)
    assert red > 250
    assert max(green, blue) < 5
    assert capsys.readouterr().err == ""


def test_large_images_are_resized_with_a_warning(image_folder, capsys):
    root = image_folder(size=(40, 30))
    load_images(root)
    assert capsys.readouterr().err == ""
    for path in root.rglob("00[012].png"):  # more than half of them
        Image.open(path).resize((200, 90)).save(path)
    for _ in range(2):
        load_images(root)
        what = "images of 200x90 pixels (the median) are resized to 32x32; small details are lost"
        assert capsys.readouterr().err == f"warning: images: {what}\n", "from the cache, too"


def test_decoding_that_takes_long_says_how_far_it_is(image_folder, capsys, monkeypatch):
    monkeypatch.setattr("images.table.SECONDS", 0)
    load_images(image_folder(train=1, test=1))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("decoding     images; the next start finds it in ")
    assert lines[1:] == [f"decoding     {n} images so far" for n in range(1, 5)]


@pytest.mark.parametrize("name", ["valid", "val", "validation"])
def test_other_names_of_the_test_folder(image_folder, tmp_path, name):
    root = image_folder()
    before = load_images(root).fingerprint()
    (root / "test").rename(root / name)
    assert load_images(root).fingerprint() == before
    for path in (zipped(tmp_path / "a.zip", root), tar(tmp_path / "a.tgz", "w:gz", root)):
        assert load_images(path).fingerprint() == before
    (root / "test").mkdir()
    with pytest.raises(InputError, match="class 'cat' is in train but not in test"):
        load_images(root)


def test_test_images_that_are_training_images_are_counted(image_folder, capsys):
    root = image_folder()
    for name in ("copy1.png", "copy2.png"):
        (root / "test/dog" / name).write_bytes((root / "train/cat/000.png").read_bytes())
    load_images(root)
    assert "warning: images: 2 of 6 test images are also training images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.tgz", "a.tar.gz", "a.tar.xz", "a.zip"])
def test_an_archive_is_its_folder(image_folder, tmp_path, name):
    root = image_folder()
    path = tmp_path / name
    if name.endswith(".zip"):
        zipped(path, root)
    else:
        tar(path, "w:xz" if name.endswith("xz") else "w:gz", root)
    assert load_images(path).fingerprint() == load_images(root).fingerprint()


STRAYS = {
    "a top folder called test": ("test/", ""),
    "labels in a folder called val": ("data/", "data/annotations/val/labels.txt"),
    "labels in a folder beside": ("data/", "annotations/val/labels.txt"),
    "other images below": ("data/", "data/old/train/cat/0.png"),
    "what a Mac adds": ("", "__MACOSX/train/._cat"),
}


@pytest.mark.parametrize("stray", STRAYS)
def test_an_archive_is_read_though_another_folder_has_a_splits_name(image_folder, tmp_path, stray):
    root, (top, other) = image_folder(), STRAYS[stray]
    (root / "test").rename(root / "val")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        if other:
            archive.write(root / "train/cat/000.png", other)
        for file in sorted(root.rglob("*")):
            archive.write(file, f"{top}{file.relative_to(root)}")
    assert load_images(tmp_path / "a.zip").fingerprint() == load_images(root).fingerprint()


def test_the_fingerprint_tells_other_data(image_folder, tmp_path):
    root = image_folder()
    before = load_images(root).fingerprint()
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(root / "train/cat/000.png")
    assert load_images(root).fingerprint() != before


def test_the_official_batches_as_folder_parent_and_archive(batches, tmp_path):
    table = load_images(batches)
    assert table.classes == tuple(CIFAR_CLASSES)
    assert (table.is_train.sum(), (~table.is_train).sum()) == (200, 40)
    content = pickle.loads((batches / "data_batch_1").read_bytes(), encoding="bytes")
    row = content[b"labels"].index(3)
    image = content[b"data"][row].reshape(3, 32, 32).transpose(1, 2, 0)
    assert any(np.array_equal(image, other) for other in table.images[table.is_train & (table.labels == 3)])
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(batches, arcname="cifar-10-batches-py")
    assert load_images(tmp_path).fingerprint() == table.fingerprint(), "the folder that holds the folder"
    assert load_images(archive).fingerprint() == table.fingerprint()


# Loaders


def test_normalisation_is_cifars_own_for_cifar_and_measured_otherwise(batches, image_folder):
    def stats(dls):
        norm = next(t for t in dls.after_batch.fs if hasattr(t, "mean"))
        return norm.mean.flatten().tolist(), norm.std.flatten().tolist()

    mean, std = stats(get_dls(batches, bs=8, device="cpu"))
    assert mean == pytest.approx(CIFAR10_STATS[0])
    assert std == pytest.approx(CIFAR10_STATS[1])
    root = image_folder()
    Image.fromarray(np.full((32, 32, 3), 9, dtype=np.uint8)).save(root / "test/cat/000.png")
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(root.glob("train/*/*"))]) / 255
    mean, std = stats(get_dls(root, bs=8, device="cpu"))
    assert mean == pytest.approx(pixels.mean((0, 1, 2)).tolist())
    assert std == pytest.approx(pixels.std((0, 1, 2)).tolist())


def test_batches_are_normalised_channels_last_floats():
    dls = get_dls("digits", bs=64, device="cpu", pad=0, flip=0, cutout=0)
    x, y = zip(*dls.train, strict=True)
    x, y = torch.cat(x), torch.cat(y)
    assert x.dtype == torch.float32
    assert x.shape == (22 * 64, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert sorted(y.unique().tolist()) == list(range(10))


def test_an_epoch_has_each_image_once_in_an_order_of_its_own():
    images = np.arange(100, dtype=np.uint8).repeat(3072).reshape(100, 32, 32, 3)
    labels, is_train = np.random.default_rng(0).integers(0, 2, 100), np.arange(100) % 5 != 3
    table = ImageTable("numbers", ("a", "b"), images, labels, is_train, np.arange(100))
    options = {"bs": 8, "device": "cpu", "pad": 0, "flip": 0, "cutout": 0}
    dls = get_dls(table, workers=2, **options)

    def epoch(dl):
        mean, std = table.train_stats()
        x, y = zip(*dl, strict=True)
        values = ((torch.cat(x)[:, 0, 0, 0] * std[0] + mean[0]) * 255).round().int().tolist()
        assert labels[values].tolist() == torch.cat(y).tolist(), "labels stay with their images"
        return values

    first, second = epoch(dls.train), epoch(dls.train)
    assert sorted(first) == sorted(second) == np.flatnonzero(is_train).tolist()
    assert first != second
    assert epoch(dls.valid) == np.flatnonzero(~is_train).tolist()
    np.random.seed(1)
    assert epoch(get_dls(table, workers=0, **options).train) == first, "whatever the state of numpy's generator"
    assert epoch(get_dls(table, workers=0, seed=1, **options).train) != first


def test_an_epoch_within_an_epoch_is_another_one_whole():
    seen = []
    for workers in (0, 2):
        train = get_dls("digits", bs=97, workers=workers, device="cpu").train
        outer = iter(train)
        begun = [next(outer) for _ in range(3)]
        inner = list(train)
        seen.append([*begun, *outer, *inner, *train])
    assert len(seen[0]) == len(seen[1]) == 3 * 14
    assert all(map(torch.equal, (x for x, _ in seen[0]), (x for x, _ in seen[1])))


def test_holdout_is_a_balanced_tenth_of_the_training_set_chosen_by_the_seed():
    test, first, again, other = (
        get_dls("digits", bs=64, valid=valid, seed=seed, device="cpu")
        for valid, seed in [("test", 0), ("holdout", 0), ("holdout", 0), ("holdout", 1)]
    )
    train_rows = set(test.train_ds.items.rows)
    held_out, kept = set(first.valid_ds.items.rows), set(first.train_ds.items.rows)
    assert held_out | kept == train_rows
    assert not held_out & kept
    labels = first.valid_ds.items.labels[sorted(held_out)]
    counts = np.bincount(test.train_ds.items.labels[sorted(train_rows)])
    assert np.abs(np.bincount(labels) - counts / 10).max() <= 0.5
    assert held_out == set(again.valid_ds.items.rows)
    assert held_out != set(other.valid_ds.items.rows)
    half = get_dls("digits", bs=64, valid="holdout", valid_pct=0.5, device="cpu")
    assert np.abs(np.bincount(half.valid_ds.items.labels[half.valid_ds.items.rows]) - counts / 2).max() <= 0.5


def test_show_batch_shows_true_colours_and_class_names(image_folder):
    from matplotlib import pyplot as plt

    root = image_folder(classes=("red", "green"), train=4)
    for colour, rgb in (("red", (250, 10, 20)), ("green", (10, 240, 30))):
        for path in root.glob(f"*/{colour}/*"):
            Image.new("RGB", (32, 32), rgb).save(path)
    dls = get_dls(root, bs=8, device="cpu", cutout=0)
    plt.switch_backend("agg")
    dls.show_batch(max_n=8)
    for ax in plt.gcf().axes[:8]:
        expected = {"red": (250, 10, 20), "green": (10, 240, 30)}[ax.get_title()]
        assert np.abs(np.asarray(ax.images[0].get_array()).reshape(-1, 3) - expected).max() <= 1
    plt.close("all")


def test_show_batch_of_one_image_shows_what_augmentation_makes_of_it():
    dls = get_dls("digits", bs=16, device="cpu", workers=2)
    x, y, _ = dls.show_batch(unique=True, show=False)
    assert len(set(y.tolist())) == 1
    assert len({image.numpy().tobytes() for image in x}) == 16


# Item transforms of the user's own


class Nothing(Transform):
    """Changes no pixel."""

    def encodes(self, image: PILImage):
        return image


class Darken(Transform):
    """By an amount that every generator has a part in."""

    split_idx = 0

    def encodes(self, image: PILImage):
        amount = 1 + random.randrange(20) + np.random.randint(20) + torch.randint(20, (1,)).item()
        return PILImage.create(np.asarray(image) // 2 + np.uint8(amount))


def uint8_epochs(transform=None, workers=0, share=(0, 1), n=2, seed=3):
    """The pixels and labels of the first `n` epochs."""
    train = get_dls("digits", bs=256, seed=seed, workers=workers, device="cpu").train
    if transform is not None:
        train.after_item.add(transform)
    train.after_batch = Pipeline([])
    train.deal(*share)
    x, y = zip(*(batch for _ in range(n) for batch in train), strict=True)
    assert {(type(batch), batch.dtype) for batch in x} == {(TensorImage, torch.uint8)}
    return torch.cat(x).as_subclass(torch.Tensor), torch.cat(y).as_subclass(torch.Tensor)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_transform_without_effect_changes_no_pixel(workers):
    for expected, found in zip(uint8_epochs(), uint8_epochs(Nothing(), workers), strict=True):
        assert torch.equal(expected, found)


def test_an_item_transform_is_applied_and_draws_by_the_same_keys():
    expected, labels = uint8_epochs(Darken())
    torch.manual_seed(1)
    found, found_labels = uint8_epochs(Darken(), workers=2)
    assert torch.equal(expected, found)
    assert torch.equal(labels, found_labels)
    amounts = (expected.short() - uint8_epochs()[0] // 2).flatten(1)
    assert (amounts == amounts[:, :1]).all()
    assert len(amounts[:, 0].unique()) > 40
    first, second = amounts[:, 0].chunk(2)
    assert not torch.equal(first, second)
    other = uint8_epochs(Darken(), seed=4, n=1)[0].short() - uint8_epochs(seed=4, n=1)[0] // 2
    assert not torch.equal(first, other.flatten(1)[:, 0]), "another seed draws other amounts"


def test_an_item_transform_leaves_the_generators_that_training_draws_from():
    train = get_dls("digits", bs=256, workers=0, device="cpu").train
    train.after_item.add(Darken())
    draws = []
    for _ in range(2):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        next(iter(train))
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert len(set(draws)) == 1


def test_an_item_transform_that_comes_late_reaches_the_workers():
    before = set(multiprocessing.active_children())
    dls = get_dls("digits", bs=256, workers=2, device="cpu", pad=0, flip=0, cutout=0)
    dls.train.after_batch = Pipeline([])
    bright = max(int(x.max()) for x, _ in dls.train)
    dls.train.after_item.add(Darken())
    assert (bright, max(int(x.max()) for x, _ in dls.train) <= 187) == (255, True)
    assert len(set(multiprocessing.active_children()) - before) == 2


def test_the_augmentation_is_an_item_transform_of_training_images():
    dls = get_dls("digits", bs=16, workers=0, device="cpu")
    assert isinstance(dls.train.after_item.fs[0], Augment)
    dls.valid.after_batch = Pipeline([])
    plain = next(iter(dls.valid))[0]
    assert torch.equal(plain, next(iter(dls.valid))[0])
    with dls.valid_ds.set_split_idx(0):  # as fastai's `tta` does
        draws = [next(iter(dls.valid))[0] for _ in range(2)]
    assert not torch.equal(draws[0], plain)
    assert not torch.equal(draws[0], draws[1])
    for dl in dls.new_empty().loaders:
        assert not [t for t in dl.after_item.fs if isinstance(t, Augment)], "a file needs nothing that augments"


# fastai's copy


@pytest.fixture
def fastai_home(monkeypatch, tmp_path):
    """An empty folder as fastai's cache."""
    monkeypatch.setenv("FASTAI_HOME", str(tmp_path / "fastai"))
    fastai_cfg.cache_clear()
    yield tmp_path / "fastai"
    fastai_cfg.cache_clear()


@pytest.mark.parametrize("behaviour", ["refuses", "hangs"])
def test_cifar10_without_network_and_cache_names_the_ways_out_soon(monkeypatch, fastai_home, behaviour):
    def urlopen(*_, **__):
        if behaviour == "hangs":
            time.sleep(30)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        load_images("cifar10")
    line = str(error.value)
    assert time.perf_counter() - start < 8
    assert "--data PATH" in line
    assert "--data digits" in line


def test_a_download_that_is_damaged_is_one_line(monkeypatch, fastai_home):
    def corrupt(url):
        raise Exception("Downloaded file is corrupt or not latest version")

    monkeypatch.setattr("images.cifar10.untar_data", corrupt)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO())
    with pytest.raises(InputError, match=r"the download of CIFAR-10 failed .*corrupt.*; pass --data PATH"):
        load_images("cifar10")


def test_cifar10_comes_from_fastais_cache(fastai_home, image_folder):
    root = image_folder(classes=CIFAR_CLASSES, root=fastai_home / "data" / "cifar10")
    table = load_images("cifar10")
    assert table.name == "cifar10"
    assert table.stats == CIFAR10_STATS
    assert table.fingerprint() == load_images(root).fingerprint()
