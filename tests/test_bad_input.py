"""Bad input of every kind: one line that names the thing at fault, exit code 2, no traceback, nothing left behind."""

import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from dataclasses import asdict

import matplotlib.font_manager  # noqa: F401  makes its list of fonts now, not in a test's cache folder
import numpy as np
import pytest
from conftest import CIFAR_CLASSES, python2_pickle, tar, zipped
from PIL import Image

import train_fastai
from errors import parse, run_command
from images.sources import load_images
from options import Options

CASES = []


def bad(expected, *options):
    """Register a function that spoils a good image folder, and returns the path of what is bad if that is another."""

    def register(spoil):
        CASES.append(pytest.param(spoil, expected, options, id=spoil.__name__))
        return spoil

    return register


def contents(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """A function that runs the command in an empty folder, and returns its one line."""

    def run(*arguments):
        here = tmp_path / "here"
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, "argv", ["train_fastai.py", *map(str, arguments)])
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            run_command(train_fastai.main, parse(Options))
        errors = capsys.readouterr().err
        assert stop.value.code == 2
        assert errors.count("\n") == 1, errors
        assert errors.startswith("train_fastai.py: error: ")
        assert contents(tmp_path) == before, "nothing left behind, nothing changed"
        return errors.removeprefix("train_fastai.py: error: ")

    return run


# Folders


@bad("nowhere: no such file or folder")
def missing(root):
    return root.parent / "nowhere"


@bad("images: there is no train folder in it")
def empty(root):
    shutil.rmtree(root)
    root.mkdir()


@bad(
    "images: there is no test folder in it; it must hold train/<class>/ and test/<class>/ (valid, val, validation will"
)
def another_layout(root):
    (root / "test").rename(root / "dev")


@bad("class 'owl' is in train but not in val; both need every class")
def class_that_val_lacks(root):
    (root / "test").rename(root / "val")
    (root / "train/owl").mkdir()


@bad("images: there is no train folder in it")
def file_as_split(root):
    shutil.rmtree(root / "train")
    (root / "train").write_text("words")


@bad("images/train/labels.txt: a file where the folder of a class should be")
def file_as_class(root):
    (root / "train/labels.txt").write_text("cat dog")


@bad("images/train/cat/more.png: not a file")
def folder_as_image(root):
    (root / "train/cat/more.png").mkdir()


@bad("images/train/cat/deeper: not a .jpg or .jpeg or .png image")
def folder_in_a_class(root):
    (root / "train/cat/deeper").mkdir()


@bad("class 'owl' is in train but not in test")
def class_in_train_only(root):
    (root / "train/owl").mkdir()


@bad("class 'owl' is in test but not in train")
def class_in_test_only(root):
    (root / "test/owl").mkdir()


@bad("class 'owl' has no image in train")
def empty_class(root):
    (root / "train/owl").mkdir()
    (root / "test/owl").mkdir()


@bad("1 class in it; at least two")
def one_class(root):
    for split in ("train", "test"):
        shutil.rmtree(root / split / "cat")


@bad(r"class 'c\na\nt': its name is not one line of text; rename the folder")
def class_with_newlines(root):
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "c\na\nt")


@bad(r"class 'cat\udcff': its name is not one line of text")
def class_that_is_no_text(root):
    for split in ("train", "test"):
        (root / split / "cat").rename(root / split / "cat\udcff")


@bad("class 'dog' has one training image; a hold-out needs at least two", "--valid", "holdout")
def nothing_to_hold_out(root):
    for path in sorted((root / "train/dog").iterdir())[1:]:
        path.unlink()
    load_images(root)


@bad("--valid-pct: with --valid test nothing is held out; pass --valid holdout too", "--valid-pct", "0.2")
def a_part_of_nothing(root):
    load_images(root)


@bad("valid_pct is 1.0: it must be above 0 and below 1", "--valid", "holdout", "--valid-pct", "1")
def all_held_out(root):
    load_images(root)


@bad("bs is 9, but there are 8 training images; use --bs 8 or less", "--bs", "9")
def fewer_images_than_a_batch(root):
    load_images(root)  # they are good, so that they are kept


@bad("images/train/cat: cannot be read (Permission denied); check its permissions")
def unreadable_folder(root):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (root / "train/cat").chmod(0)


@bad("images/train/cat/000.png: cannot be read (Permission denied); check its permissions")
def unreadable_image(root):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (root / "train/cat/000.png").chmod(0)


@bad("images/train/cat/loop.png: cannot be read (Too many levels of symbolic links)")
def link_to_itself(root):
    (root / "train/cat/loop.png").symlink_to("loop.png")


@bad("images/train/cat/up: not a .jpg or .jpeg or .png image")
def link_to_the_folder_above(root):
    (root / "train/cat/up").symlink_to("..")


@bad("images/train/test/cat: not a .jpg or .jpeg or .png image")
def link_from_the_split_to_the_root(root):
    shutil.rmtree(root / "train")
    (root / "train").symlink_to(".")


@bad("images/train/cat/gone.png: cannot be read (No such file or directory)")
def link_to_nothing(root):
    (root / "train/cat/gone.png").symlink_to("nothing.png")


# Images


@bad("images/test/dog/words.png: not a readable image")
def words(root):
    (root / "test/dog/words.png").write_text("these are words")


@bad("images/test/dog/empty.jpg: not a readable image")
def no_bytes(root):
    (root / "test/dog/empty.jpg").write_bytes(b"")


@bad("images/test/dog/notes.txt: not a .jpg or .jpeg or .png image; remove or convert it")
def another_suffix(root):
    (root / "test/dog/notes.txt").write_text("notes")


@bad("images/train/cat/000.png: not a readable image")
def truncated_png(root):
    path = root / "train/cat/000.png"
    path.write_bytes(path.read_bytes()[:1000])


@bad("images/train/cat/a.jpg: not a readable image")
def truncated_jpeg(root):
    path = root / "train/cat/a.jpg"
    Image.open(root / "train/cat/000.png").save(path)
    path.write_bytes(path.read_bytes()[:700])


@bad("images/train/cat/a b.png: not a readable image")
def name_with_a_newline(root):
    (root / "train/cat/a\nb.png").write_text("words")


@bad(r"images/train/cat/\x1b[2J\x07.png: not a readable image")
def name_that_clears_the_terminal(root):
    (root / "train/cat/\x1b[2J\x07.png").write_text("words")


@bad("images/train/cat/a.png: not a readable image (Image size (900000000 pixels) exceeds limit")
def image_of_30000x30000(root):
    Image.new("1", (30_000, 30_000)).save(root / "train/cat/a.png")


@bad("images/train/cat/a.png: not a readable image (9000x9000 pixels, too many)")
def image_of_9000x9000(root):
    Image.new("1", (9_000, 9_000)).save(root / "train/cat/a.png")


@bad("images/train/cat/a.png: not a readable image")
def image_that_claims_a_size_it_lacks(root):
    path = root / "train/cat/a.png"
    content = bytearray((root / "train/cat/000.png").read_bytes())
    content[16:24] = struct.pack(">II", 7_000, 7_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@bad("images/train/cat/a.png: not a readable image (cannot identify image file)")
def postscript(root):
    (root / "train/cat/a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


@bad("images/train/cat/a.png: 70,000,000 bytes, more than any image here has")
def image_of_many_bytes(root):
    with (root / "train/cat/a.png").open("wb") as file:
        file.truncate(70_000_000)


@bad("images/train/cat/a.png: not a file")
def pipe(root):
    os.mkfifo(root / "train/cat/a.png")


@bad("images: a colour channel has one value in all images")
def without_blue(root):
    for path in root.rglob("*.png"):
        pixels = np.array(Image.open(path))
        pixels[..., 2] = 0
        Image.fromarray(pixels).save(path)
    load_images(root)


# Archives


@bad("notes.txt: neither a folder nor an archive; an archive ends in .tgz")
def no_archive(root):
    path = root.parent / "notes.txt"
    path.write_text("notes")
    return path


for suffix in (".tgz", ".tar.xz", ".zip"):

    def archive(root, suffix=suffix):
        path = root.parent / f"a{suffix}"
        return zipped(path, root) if suffix == ".zip" else tar(path, "w:xz" if "xz" in suffix else "w:gz", root)

    def words_as_archive(root, suffix=suffix):
        path = root.parent / f"a{suffix}"
        path.write_text("no archive at all")
        return path

    def truncated(root, archive=archive):
        path = archive(root)
        path.write_bytes(path.read_bytes()[:-2000])
        return path

    def flipped(root, archive=archive):
        path = archive(root)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        return path

    def bad_image_inside(root, archive=archive):
        (root / "test/dog/words.png").write_text("these are words")
        return archive(root)

    def empty_class_inside(root, archive=archive):
        for split in ("train", "test"):
            (root / split / "owl").mkdir()
        return archive(root)

    def too_deep(root, archive=archive):
        (root / "train/cat/deeper").mkdir()
        (root / "train/cat/000.png").rename(root / "train/cat/deeper/000.png")
        return archive(root)

    for spoil, expected in (
        (words_as_archive, f"a{suffix}: a damaged or locked archive"),
        (truncated, f"a{suffix}: a damaged or locked archive"),
        (flipped, f"a{suffix}: "),
        (bad_image_inside, "test/dog/words.png: not a readable image"),
        (empty_class_inside, "class 'owl' has no image in train"),
        (too_deep, "train/cat/deeper/000.png: images must lie at train/<class>/"),
    ):
        CASES.append(pytest.param(spoil, expected, (), id=f"{spoil.__name__}{suffix}"))


def tar_with(root, info, content=None):
    path = root.parent / "a.tgz"
    with tarfile.open(tar(path, "w", root), "a", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(info, content)
    return path


for name in ("../evil.png", "/tmp/evil.png", "train/../../evil.png"):

    def outside_in_a_tar(root, name=name):
        return tar_with(root, tarfile.TarInfo(name))

    def outside_in_a_zip(root, name=name):
        with zipfile.ZipFile(zipped(root.parent / "a.zip", root), "a") as archive:
            archive.writestr(name, b"")
        return root.parent / "a.zip"

    for spoil in (outside_in_a_tar, outside_in_a_zip):
        expected = f"member '{name}' is a link or points outside the archive; refused"
        CASES.append(pytest.param(spoil, expected, (), id=f"{spoil.__name__} {name}"))


@bad("member 'top/inner/train/cat/link.png' is a link")
def link_in_a_tar(root):
    (root / "train/cat/link.png").symlink_to("/etc/passwd")
    return tar(root.parent / "a.tgz", "w:gz", root)


@bad("member 'train/cat/link.png' is a link")
def link_in_a_zip(root):
    info = zipfile.ZipInfo("train/cat/link.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(zipped(root.parent / "a.zip", root), "a") as archive:
        archive.writestr(info, "/etc/passwd")
    return root.parent / "a.zip"


@bad("member 'train/cat/null.png' is a link or points outside")
def device_in_a_tar(root):
    info = tarfile.TarInfo("train/cat/null.png")
    info.type = tarfile.CHRTYPE
    return tar_with(root, info)


@bad("a.tgz: a damaged or locked archive (a member of 100,000,000 bytes)")
def huge_member_in_a_tar(root):
    info = tarfile.TarInfo("zeros")
    info.size = 100_000_000
    with open("/dev/zero", "rb") as zeros:
        return tar_with(root, info, zeros)


@bad("a.tgz: a damaged or locked archive (a member of 10,000,000,000 bytes)")
def endless_name_in_a_tar(root):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 10**10
    return tar_with(root, info)


@bad("member 'zeros' has 70,000,000 bytes, more than any image here; refused")
def huge_member_in_a_zip(root):
    with zipfile.ZipFile(zipped(root.parent / "a.zip", root), "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(70_000_000))
    return root.parent / "a.zip"


@bad("a.zip: unpacks to more than 200 times its size, as no images do; refused")
def bomb(root):
    with zipfile.ZipFile(root.parent / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(9):
            archive.writestr(f"zeros{i}", bytes(10_000_000))
    return root.parent / "a.zip"


@bad("a.zip: a damaged or locked archive")
def locked_with_a_password(root):
    path = zipped(root.parent / "a.zip", root)
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = content.find(signature)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(signature, at + 1)
    path.write_bytes(content)
    return path


@bad("a.tgz: holds neither train/<class>/ and test/<class>/ images nor CIFAR-10's batch files")
def archive_of_something_else(root):
    (root.parent / "folder").mkdir()
    (root.parent / "folder/readme.txt").write_text("words")
    return tar(root.parent / "a.tgz", "w:gz", root.parent / "folder")


@bad("a.zip/one: class 'cat' is in train but not in test")
def splits_in_two_folders_of_an_archive(root):
    for split, folder in (("train", "one"), ("test", "two")):
        (root / folder).mkdir()
        (root / split).rename(root / folder / split)
    return zipped(root.parent / "a.zip", root)


# The official batch files


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def official(root, spoil):
    """The official layout beside `root`, spoilt."""
    folder = root.parent / "cifar-10-batches-py"
    folder.mkdir()
    content = python2_pickle({b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [0, 1]})
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(content)
    (folder / "batches.meta").write_bytes(python2_pickle({b"label_names": [c.encode() for c in CIFAR_CLASSES]}))
    spoil(folder)
    return folder


def test_the_official_files_are_good_before_they_are_spoilt(image_folder, refusal):
    assert "class 'bird' has no image in train" in refusal("--data", official(image_folder(), lambda folder: None))


PIXELS = np.zeros((2, 3072), dtype=np.uint8)
for name, spoil, expected in (
    ("batch missing", lambda f: (f / "data_batch_3").unlink(), "data_batch_3 is missing"),
    ("batch cut off", lambda f: os.truncate(f / "data_batch_5", 5000), "data_batch_5: not an official CIFAR-10 file"),
    ("batch of words", lambda f: (f / "test_batch").write_text("words"), "test_batch: not an official CIFAR-10 file"),
    *(
        (f"batch {name}", lambda f, content=content: (f / "test_batch").write_bytes(python2_pickle(content)), expected)
        for name, content, expected in (
            ("of another shape", {b"data": PIXELS[:, :100], b"labels": [0, 1]}, "test_batch does not hold"),
            ("of objects", {b"data": np.array([[Evil()]]), b"labels": [0]}, "it asks for posix.mkdir, which no batch"),
            ("of floats", {b"data": PIXELS.astype(np.float32), b"labels": [0, 1]}, "its array is not one of uint8"),
            ("with a label less", {b"data": PIXELS, b"labels": [0]}, "test_batch does not hold"),
            ("with an eleventh label", {b"data": PIXELS, b"labels": [0, 10]}, "test_batch does not hold"),
            ("without pixels", {b"labels": [0]}, "test_batch does not hold"),
            ("that is a list", [1, 2], "test_batch: not an official CIFAR-10 file"),
        )
    ),
    (
        "batch that runs code",
        lambda f: (f / "data_batch_2").write_bytes(pickle.dumps({"data": Evil(), "labels": []}, protocol=2)),
        "data_batch_2: not an official CIFAR-10 file (it asks for posix.mkdir, which no batch file needs)",
    ),
    (
        "batch that makes numpy crash",  # a damaged dtype, which numpy's own reader does not survive
        lambda f: (f / "test_batch").write_bytes((f / "test_batch").read_bytes().replace(b"NNNJ", b"MNNJ")),
        "class 'bird' has no image in train",
    ),
    (
        "meta with names that are no text",
        lambda f: (f / "batches.meta").write_bytes(
            python2_pickle({b"label_names": [b"bird\x95", *CIFAR_CLASSES[1:]]}),
        ),
        r"class 'bird\udc95': its name is not one line of text",
    ),
    (
        "meta without names",
        lambda f: (f / "batches.meta").write_bytes(python2_pickle({b"label_names": 3})),
        "batches.meta holds no label_names",
    ),
):
    CASES.append(pytest.param(lambda root, spoil=spoil: official(root, spoil), expected, (), id=name))


@pytest.mark.parametrize(("spoil", "expected", "options"), CASES)
def test_bad_data(image_folder, refusal, spoil, expected, options):
    root = image_folder()
    assert expected in refusal("--data", spoil(root) or root, "--bs", 2, *options)


# Options


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--epoch 3", "unknown option --epoch (did you mean --epochs?); --help explains all options\n"),
        ("--batch-size 64", "--batch-size (did you mean --bs?)"),
        ("--batch_size=64", "--batch_size=64 (did you mean --bs?)"),
        ("--learning-rate 0.1", "--learning-rate (did you mean --lr?)"),
        ("--lr-rate 0.1", "--lr-rate (did you mean --lr?)"),
        ("--model resnet18", "--model (did you mean --width?)"),
        ("--amp", "--amp (did you mean --precision?)"),
        ("--fp16", "--fp16 (did you mean --precision fp16?)"),
        ("--gpu 0", "--gpu (did you mean --device?)"),
        ("--data https://host/a.tgz", "https://host/a.tgz: an address, and only files are read; download it"),
        ("--lr-find", "unknown option --lr-find (did you mean --lr-find-only?)"),
        ("digits", "unknown option digits"),
        ("--recipe fsat", "'fsat' (choose from 'fast', 'ancestor', 'seed', "),
        ("--norm instance", "'instance' (choose from 'batch', 'layer', 'group')"),
        ("--valid val", "'val' (choose from 'test', 'holdout')"),
        ("--epochs ten", "argument --epochs: invalid int value: 'ten'"),
        ("--epochs", "argument --epochs: expected one argument"),
        ("--epochs 0", "epochs is 0: it must be from 1"),
        ("--epochs 1e3", "argument --epochs: invalid int value: '1e3'"),
        ("--epochs 100000", "epochs is 100000: it must be from 1 and at most 10000"),
        ("--bs -4", "bs is -4: it must be from 2"),
        ("--bs 5000 --data digits", "bs is 5000, but there are 1438 training images; use --bs 1438 or less"),
        ("--width 0", "width is 0: it must be from 1"),
        ("--lr 0", "lr is 0.0: it must be above 0"),
        ("--lr -1", "lr is -1.0: it must be above 0"),
        ("--lr nan", "lr is nan: it must be above 0"),
        ("--lr inf", "lr is inf: it must be above 0"),
        ("--lr fast", "--lr is 'fast': it must be a number or auto"),
        ("--momentum 2", "momentum is 2.0: it must be above 0 and at most 1"),
        ("--wd nan", "wd is nan: it must be from 0 and at most 1"),
        ("--label-smoothing -0.1", "label_smoothing is -0.1: it must be from 0"),
        ("--logit-scale 0", "logit_scale is 0.0: it must be above 0"),
        ("--flip 1.5", "flip is 1.5: it must be from 0 and at most 1"),
        ("--pad 32", "pad is 32: it must be from 0 and at most 31"),
        ("--cutout 33", "cutout is 33: it must be from 0 and at most 32"),
        ("--cutmix -1", "cutmix is -1.0: it must be from 0"),
        ("--cutmix 1e-300", "cutmix is 1e-300: it must be 0, or at least 0.01"),
        ("--seed -1 --data digits", "seed is -1: it must be at least 0"),
        ("--seed 4294967296 --data digits", "seed is 4294967296: it must be at least 0 and below 2**32"),
        ("--workers 100000 --data digits", "workers is 100000: each is a process; at most "),
        ("--workers -1 --data digits", "workers is -1: it must be at least 0"),
        ("--runs 0", "--runs is 0: it must be at least 1"),
        ("--runs 2 --lr-find-only", "--runs is 2: --lr-find-only does not train"),
        ("--max-minutes 0", "--max-minutes is 0.0: it must be above 0"),
        ("--max-minutes nan", "--max-minutes is nan: it must be above 0"),
        ("--no-lr-find --lr auto", "--no-lr-find contradicts --lr auto"),
        ("--no-lr-find --lr-find-only", "--no-lr-find contradicts --lr-find-only"),
        ("--recipe demo --tta", "--tta: flip is 0, so that the network never learns from mirror images"),
        ("--device gpu --data digits", "--device gpu: no such device here; this machine has cpu"),
        ("--device meta --data digits", "--device meta: no such device here; this machine has cpu"),
        ("--device cuda:99 --data digits", "--device cuda:99: no such device here; this machine has cpu"),
        ("--out /proc/nowhere/run --recipe demo", "/proc/nowhere: the run folder cannot be made here"),
        ("--out /dev/null --recipe demo", "--out /dev/null: this is a file; name a new or an empty folder"),
        ("--out /dev/null/run --recipe demo", "/dev/null/run: the run folder cannot be made here (Not a directory)"),
        (
            f"--out {'x' * 300} --recipe demo",
            "the run folder cannot be made here (File name too long); pass --out PATH",
        ),
        ("--out .. --recipe demo", "--out ..: the folder is not empty; name a new or an empty one"),
        ("--resume nowhere", "nowhere: not the folder of a run, no config.json"),
        ("--resume nowhere --runs 2", "--runs 2: --resume nowhere resumes one run; leave it out"),
        ("--resume=", "--resume '': name the folder of a run, or pass auto"),
        ("--resume auto", "--resume auto: pass --out RUN too"),
        ("--resume nowhere --out there", "--out there: a resumed run stays in its own folder; leave it out"),
    ],
)
def test_bad_options(refusal, arguments, expected):
    assert expected in refusal(*arguments.split())


@pytest.mark.parametrize("word", ["", " ", "="])
def test_a_word_of_nothing(refusal, word):
    """As of a shell variable that is not set."""
    assert f"unknown option {word or repr(word)}; --help explains all options\n" in refusal(word)


@pytest.mark.parametrize("content", [b"", b"words", b"[]", b"{}", b'"options"', b'{"options": [1]}', b"\xff\xfe", b"["])
def test_a_run_folder_of_something_else(tmp_path, refusal, content):
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json: not that of a run of this version of the project" in refusal("--resume", tmp_path)


@pytest.mark.parametrize(
    "change", [{"epochs": "4"}, {"seed": None}, {"seed": "0"}, {"tta": 1}, {"norm": "instance"}, {"flip": [0.5]}]
)
def test_a_run_folder_with_options_of_another_type(tmp_path, refusal, change):
    config = {"options": asdict(Options(recipe="demo")) | change, "processes": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "config.json: not that of a run of this version of the project" in refusal("--resume", tmp_path)


def test_a_run_folder_of_another_version(tmp_path, refusal):
    (tmp_path / "config.json").write_text(json.dumps({"options": {"epochs": 3, "warp": 9}, "epochs": 3}))
    assert "config.json: of a later version of the project, with warp" in refusal("--resume", tmp_path)
