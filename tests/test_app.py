"""The page: asked through its API, and in a browser, from the folder that is made for a Space."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import app as app_module
from errors import InputError, Stopped
from trained.safe_file import load_safetensors

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def app(*words, cwd=ROOT):
    command = [sys.executable, str(ROOT / "app.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def space(trained, tmp_path_factory):
    """The folder for a Space, with a picture of each digit among the examples."""
    run = tmp_path_factory.mktemp("run")
    shutil.copy(trained / "model.safetensors", run)
    (run / "examples").mkdir()
    for label in range(10):
        shutil.copy(next((trained / "digits" / str(label)).iterdir()), run / "examples" / f"{label:02}.png")
    (run / "examples/secret.png").symlink_to("/etc/passwd")
    folder = run.parent / f"{run.name}-space"
    result = app("--space", folder, run)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"see          {folder}\npublish      hf upload USER/NAME {folder} --repo-type space\n"
    return folder


@pytest.fixture(scope="module")
def url(space):
    """Where `python app.py` in that folder, without this project on the path, shows the page."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (space.parent / "stderr.txt").open("w") as errors:
        command = [sys.executable, "-u", "app.py"]
        process = subprocess.Popen(command, cwd=space, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    line = process.stdout.readline()
    try:
        assert line.startswith("see          http://127.0.0.1:")
        yield line.split()[1]
    finally:
        process.terminate()
        process.wait(30)


def test_a_space_has_what_it_needs(space):
    names = {
        "app.py",
        "errors.py",
        "files.py",
        "interrupts.py",
        "model.py",
        "names.py",
        "startup.py",
        "images",
        "trained",
    }
    others = {"README.md", "requirements.txt", "model.safetensors", "examples"}
    assert {path.name for path in space.iterdir() if path.name != "__pycache__"} == names | others
    assert [path.name for path in sorted((space / "examples").iterdir())] == [f"{i:02}.png" for i in range(10)]
    head = (space / "README.md").read_text().split("---")[1]
    assert 'sdk: "gradio"\n' in head
    assert re.search(r'sdk_version: "\d+\.\d+\.\d+"\n', head)
    assert 'app_file: "app.py"\n' in head
    wanted = (space / "requirements.txt").read_text()
    assert "torch" in wanted
    assert "fastai" not in wanted
    code = "import sys; sys.argv = ['app.py', '--help']; import app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=space, capture_output=True, text=True, check=True)
    assert not {"fastai", "albumentations", "sklearn"} & set(loaded.stdout.split())


# Through the API


def test_the_api_says_what_the_model_says(url, trained):
    client = Client(url, verbose=False)
    for path in sorted((trained / "digits/3").iterdir())[:2]:
        label, seen, took = client.predict(handle_file(str(path)), api_name="/predict")
        words = [sys.executable, "predict.py", trained, path, "--csv"]
        row = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=True).stdout
        _, first, probability, *_ = row.splitlines()[1].split(",")
        assert label["label"] == first
        assert len(label["confidences"]) == 5
        assert label["confidences"][0]["confidence"] == pytest.approx(float(probability), abs=1e-4)
        assert Image.open(seen).size == (320, 320)
        assert re.fullmatch(r"\d+ ms to read the picture, [\d.]+ ms to classify it, \d+ ms for the map \(.*\)", took)


def test_the_api_refuses_what_is_no_picture_and_what_is_too_large(url, space, tmp_path):
    client = Client(url, verbose=False)
    (tmp_path / "words.png").write_text("these are words")
    Image.new("1", (9000, 8000)).save(tmp_path / "many.png")
    Image.new("L", (9, 9)).save(tmp_path / "scan.tiff")
    for name in ("words.png", "many.png", "scan.tiff"):
        with pytest.raises(AppError) as said:
            client.predict(handle_file(str(tmp_path / name)), api_name="/predict")
        assert str(said.value) == app_module.UNREADABLE
    assert (space.parent / "stderr.txt").read_text() == "", "no traceback where the page runs"
    (tmp_path / "large.png").write_bytes(bytes(11_000_000))
    with pytest.raises(Exception, match=r"413|larger|exceed"):
        client.predict(handle_file(str(tmp_path / "large.png")), api_name="/predict")


def test_the_page_is_for_this_machine_alone(url):
    port = int(url.rstrip("/").rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(ConnectionRefusedError):  # an address of this machine, too
        socket.create_connection(("127.0.0.2", port), 5)


# As a stranger asks it


def ask(url, path, body=None, **headers):
    """The status and the content of an answer, for a path that is sent as it is."""
    connection = HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=30)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, names)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_another_host_is_refused(url):
    assert ask(url, "/", Host="evil.example") == (400, b"Invalid host header")
    assert ask(url, "/", Host="localhost:1234")[0] == 200


def test_what_is_sent_has_a_limit_in_all(url):
    form = {"Content_Type": "multipart/form-data; boundary=B"}

    def parts(number, size):
        head = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        return number * (head + bytes(size) + b"\r\n") + b"--B--\r\n"

    assert ask(url, "/gradio_api/upload", parts(2, 1000), **form)[0] == 200
    assert ask(url, "/gradio_api/upload", parts(3, 4_000_000), **form) == (413, b"too large")
    assert ask(url, "/gradio_api/upload", iter([parts(1, 1000)]), **form) == (413, b"too large"), "of unknown length"


def test_no_other_file_is_shown(url, space):
    up = "../" * 9
    for path in ("/etc/passwd", f"{space}/app.py", f"{space}/model.safetensors", f"{up}etc/passwd", "%2fetc%2fpasswd"):
        assert ask(url, f"/gradio_api/file={path}")[0] == 403, path
    for path in (f"/static/{up}etc/passwd", "/assets/" + "..%2f" * 9 + "etc/passwd", "/gradio_api/proxy=http://a.b/c"):
        assert ask(url, path)[0] in (400, 403, 404), path
    marked = {"meta": {"_type": "gradio.FileData"}}  # gradio looks only at such
    for path in ("/etc/passwd", f"{space}/examples/03.png", f"{up}etc/passwd", "", "a\0b"):
        for more in (marked, {}, {"meta": {"_type": "x"}}):
            data = json.dumps({"data": [{"path": path, **more}]})
            answer = ask(url, "/gradio_api/call/predict", data, Content_Type="application/json")[1]
            said = ask(url, f"/gradio_api/call/predict/{json.loads(answer)['event_id']}")[1]
            refused = (b"was not uploaded by a user", b"null byte", json.dumps(app_module.UNREADABLE).encode())
            assert said.startswith(b"event: error"), (path, more)
            assert any(words in said for words in refused), (path, more, said)


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP"), (signal.SIGINT, "Ctrl-C")]
)
def test_when_it_is_stopped_the_uploads_go(trained, tmp_path, monkeypatch, number, name):
    def show(*_):
        (Path(os.environ["GRADIO_TEMP_DIR"]) / "upload.png").write_text("a face")
        os.kill(os.getpid(), number)
        time.sleep(9)

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(app_module, "page", lambda file: None)
    monkeypatch.setattr(app_module, "show", show)
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have it ignored
    try:
        with pytest.raises(Stopped, match=f"^stopped by {name}$") as stop:
            app_module.main(app_module.Options(str(trained)))
    finally:
        signal.signal(number, before)
    assert stop.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_names_are_no_markup(trained):
    _, header = load_safetensors(trained / "model.safetensors")
    classes = ["![x](http://a.b/c.png)", "<b>", *"23456789"]
    said = app_module.about(header | {"classes": classes, "source": "[y](http://a.b)"})
    assert r": \!\[x\]\(http\://a.b/c.png\), \<b\>, 2, " in said
    assert r"images of \[y\]\(http\://a.b\) it" in said


# In a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "narrow"])
def page(request, browser, url):
    """The page in a window, which must not ask for anything from elsewhere."""
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    asked = []
    page.on("request", lambda r: asked.append(r.url))
    page.goto(url)
    expect(page.get_by_text("What is in the picture?")).to_be_visible(timeout=30_000)
    yield page
    elsewhere = [a for a in asked if not a.startswith((url.rstrip("/"), "data:", "blob:"))]
    page.close()
    assert elsewhere == []


def test_a_picture_is_named(page, trained):
    answer = page.locator("#answer")
    path = sorted((trained / "digits/4").iterdir())[0]
    page.locator("input[type=file]").set_input_files(path)
    expect(answer.locator("h2")).to_have_text("4", timeout=30_000)
    expect(answer.locator("meter")).to_have_count(5)
    expect(page.locator("#took")).to_contain_text("ms to classify it")
    seen = page.locator("img[src*='/file=']").last
    expect(seen).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it fits the window"
    expect(page.get_by_text("Of anything else it knows nothing")).to_be_visible()


def test_an_example_is_named(page):
    page.locator("button.gallery-item").nth(6).click()
    expect(page.locator("#answer h2")).to_have_text("6", timeout=30_000)


def test_what_is_no_picture_is_a_message(page, tmp_path):
    (tmp_path / "words.txt").write_text("these are words")
    page.locator("input[type=file]").set_input_files(tmp_path / "words.txt")
    expect(page.get_by_text("Invalid file type: words.txt")).to_be_visible(timeout=30_000)
    page.reload()
    shutil.copy(tmp_path / "words.txt", tmp_path / "words.png")
    page.locator("input[type=file]").set_input_files(tmp_path / "words.png")
    expect(page.get_by_text(app_module.UNREADABLE)).to_be_visible(timeout=30_000)


# What goes wrong, and the picture


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nonsuch"], "nonsuch: no such file; pass a run folder, or a model's .safetensors\n"),
        (["TRAINED/model.pkl"], "model.pkl: this takes a run folder, or a model's .safetensors\n"),
        (["TRAINED", "--space", "TRAINED"], "it is there already; name a new or an empty folder"),
        (["TRAINED", "--space", "TRAINED/model.pkl/space"], "cannot be written"),
        (["TRAINED", "--port", "BUSY"], "cannot listen there ([Errno 98] Address already in use"),
        (["TRAINED", "--port", "99999"], "cannot listen there (bind(): port must be 0-65535.); pass others"),
        (["TRAINED", "--host", "no.such.host"], "--host no.such.host: cannot listen there ("),
        (["TRAINED", "--prot", "1"], "did you mean --port?"),
    ],
)
def test_what_cannot_be_done_is_one_line(trained, words, line, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        stand_for = {"TRAINED": str(trained), "BUSY": str(busy.getsockname()[1])}
        words = [re.sub("TRAINED|BUSY", lambda m: stand_for[m[0]], word) for word in words]
        result = app(*words, cwd=tmp_path)
    assert result.returncode == 2, result.stdout
    assert result.stderr.startswith("app.py: error: ")
    assert line in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_gradio_it_says_what_to_install(trained, monkeypatch):
    monkeypatch.setattr(app_module, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^gradio is not installed; pip install -r requirements-app\.txt$"):
        app_module.main(app_module.Options(str(trained)))


def test_the_map_is_bright_where_the_network_looked():
    heat = np.zeros((32, 32), np.float32)
    heat[:, 16:] = 1
    picture = app_module.heat_map(np.full((32, 32, 3), 100, np.uint8), heat)
    assert (picture.shape, picture.dtype) == ((320, 320, 3), np.uint8)
    assert picture[:, 200:].min(axis=(0, 1)).sum() > 1.5 * picture[:, :120].max(axis=(0, 1)).sum()
