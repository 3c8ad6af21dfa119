import errno
import os
import pwd
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, zipped
from PIL import Image

from errors import InputError
from images import decoding
from images.sources import load_images


@pytest.fixture
def decodings(monkeypatch):
    """The sizes of the images that were decoded."""
    sizes, to_rgb = [], decoding.to_rgb
    monkeypatch.setattr(decoding, "to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
    return sizes


def same(a, b):
    return (
        (a.name, a.classes, a.stats) == (b.name, b.classes, b.stats)
        and a.fingerprint() == b.fingerprint()
        and all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("images", "labels", "is_train", "rows"))
    )


@pytest.mark.parametrize("archive", [False, True])
def test_a_source_is_decoded_once_and_read_memory_mapped(image_folder, tmp_path, decodings, archive):
    source = image_folder()
    if archive:
        with tarfile.open(tmp_path / "a.tgz", "w:gz") as file:
            file.add(source, arcname="x")
        source = tmp_path / "a.tgz"
    first = load_images(source)
    assert len(decodings) == 12
    second = load_images(source)
    assert len(decodings) == 12
    assert same(first, second)
    assert isinstance(second.images.base, np.memmap)
    assert not second.images.flags.writeable
    anew = replace(second, digest=None, stats=None)
    assert second.fingerprint() == anew.fingerprint(), "the kept fingerprint is that of the pixels"
    assert second.stats == anew.train_stats(), "and so are the statistics"


def test_every_change_of_the_source_is_noticed(image_folder, decodings):
    root = image_folder()
    path = root / "train/cat/000.png"
    load_images(root)
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(path)
    assert (load_images(root).images[0] == 0).all(), "other content"
    shutil.copy(path, path.with_name("new.png"))
    assert len(load_images(root)) == 13
    path.unlink()
    assert len(load_images(root)) == 12
    os.utime(root / "test/dog/000.png", ns=(1, 1))
    seen = len(decodings)
    load_images(root)
    assert len(decodings) == seen + 12, "another modification time"
    (root / "train/owl").mkdir()
    with pytest.raises(InputError, match="owl"):
        load_images(root)


def test_what_is_not_read_is_no_change(image_folder, decodings, monkeypatch):
    root = image_folder()
    load_images(root)
    for other in ("runs/001-fast/models", "val/cat"):
        (root / other).mkdir(parents=True)
    (root / "readme").symlink_to("nothing")
    monkeypatch.chdir(root)
    assert len(load_images(".")) == 12
    assert len(decodings) == 12


def test_of_the_official_files_only_those_that_are_read_can_change(batches, cache):
    load_images(batches)
    (batches / "readme.html").symlink_to("nothing")
    load_images(batches)
    assert len(list(cache.iterdir())) == 1
    os.utime(batches / "batches.meta", ns=(1, 1))
    load_images(batches)
    assert len(list(cache.iterdir())) == 2


def test_another_archive_of_the_same_name_is_noticed(image_folder, tmp_path):
    root = image_folder()
    before = load_images(zipped(tmp_path / "a.zip", root))
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(root / "train/cat/000.png")
    assert load_images(zipped(tmp_path / "a.zip", root)).fingerprint() != before.fingerprint()


@pytest.mark.parametrize("damage", ["images.npy", "about.json", "labels.npy"])
def test_a_damaged_entry_is_made_anew(image_folder, cache, decodings, damage):
    root = image_folder()
    first = load_images(root)
    (entry,) = cache.iterdir()
    first_images = np.array(first.images)
    (entry / damage).write_bytes((entry / damage).read_bytes()[:-9])
    again = load_images(root)
    assert len(decodings) == 24
    assert np.array_equal(again.images, first_images)
    load_images(root)
    assert len(decodings) == 24
    (entry / damage).unlink()
    load_images(root)
    assert len(decodings) == 36
    (entry / damage).write_bytes(b"")  # as a power cut leaves it
    load_images(root)
    assert len(decodings) == 48


def inverted(entry):
    np.save(entry / "images.npy", 255 - np.load(entry / "images.npy"))


def other_shapes(entry):
    for name in ("images", "labels"):
        np.save(entry / f"{name}.npy", np.load(entry / f"{name}.npy")[:, None])


def without_a_class(entry):
    (entry / "about.json").write_text((entry / "about.json").read_text().replace('"cat", ', ""))


def a_list(entry):
    (entry / "about.json").write_text("[]")


def words(entry):
    (entry / "sha256").write_text("words")


@pytest.mark.parametrize("change", [inverted, other_shapes, without_a_class, a_list, words])
def test_a_changed_entry_is_told_and_made_anew(image_folder, cache, decodings, capsys, change):
    root = image_folder()
    first = load_images(root)
    first = replace(first, images=np.array(first.images))
    (entry,) = cache.iterdir()
    change(entry)
    capsys.readouterr()
    again = load_images(root)
    assert len(decodings) == 24
    assert same(first, again)
    assert capsys.readouterr().err.endswith("damaged (its SHA-256 has changed); decoding anew\n")


def test_of_two_processes_the_faster_one_keeps_what_it_decoded(image_folder, cache, monkeypatch, capsys):
    root, save = image_folder(), np.save

    def meanwhile(path, array):
        save(path, array)
        if path.name == "labels.npy" and not kept:
            with monkeypatch.context() as patch:
                patch.setattr(np, "save", save)
                patch.setattr(os, "getpid", lambda: 1)
                kept.append(load_images(root))

    kept = []
    monkeypatch.setattr(np, "save", meanwhile)
    table = load_images(root)
    assert len(kept) == 1
    assert same(table, kept[0])
    assert capsys.readouterr().err == ""
    assert [entry.name[0] for entry in cache.iterdir()] == ["i"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_an_array_of_objects_runs_nothing(image_folder, cache, decodings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = image_folder()
    load_images(root)
    (entry,) = cache.iterdir()
    np.save(entry / "labels.npy", np.array([Evil()]))
    monkeypatch.setattr("images.cache._digest", lambda entry: (entry / "sha256").read_text())
    assert len(load_images(root)) == 12
    assert len(decodings) == 24
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing(image_folder, cache, monkeypatch, capsys, failure):
    root, save = image_folder(), np.save

    def fail(path, array):
        save(path, array)
        if path.name == "labels.npy":
            raise failure

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", fail)
        if isinstance(failure, OSError):
            assert len(load_images(root)) == 12
            assert "cannot be kept" in capsys.readouterr().err
        else:
            with pytest.raises(KeyboardInterrupt):
                load_images(root)
    assert list(cache.iterdir()) == []
    load_images(root)
    assert len(list(cache.iterdir())) == 1


def test_without_a_place_for_the_cache_it_goes_on(image_folder, cache, capsys):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(load_images(image_folder())) == 12
    assert "cannot be kept" in capsys.readouterr().err


def test_without_a_home_it_goes_on(image_folder, tmp_path, monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME", "FASTAI_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a container's user need have no name
    monkeypatch.chdir(tmp_path)
    assert len(load_images(image_folder())) == 12
    assert "decoding images; to keep that for the next start set HOME or XDG_CACHE_HOME" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()
    with pytest.raises(InputError, match="no home folder for CIFAR-10; set HOME or FASTAI_HOME"):
        load_images("cifar10")


def test_what_a_killed_process_left_goes_after_a_day(image_folder, cache):
    old, new = cache / ".images-0.1", cache / ".images-0.2"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 100_000,) * 2)
    load_images(image_folder())
    assert not old.exists()
    assert new.exists(), "another process may be at it"


SLOW = """
import sys, time
import numpy as np
from images.sources import load_images
save = np.save
np.save = lambda *args: (save(*args), time.sleep(60))
load_images(sys.argv[1])
"""


def test_a_killed_first_use_leaves_no_half_entry(image_folder, cache):
    root = image_folder()
    process = subprocess.Popen([sys.executable, "-c", SLOW, root], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(cache.glob(".*/images.npy")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert [entry for entry in cache.iterdir() if not entry.name.startswith(".")] == []
    table = load_images(root)
    assert len(table) == 12
    assert same(table, load_images(root))
