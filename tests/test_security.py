"""What strangers and secrets are kept from; SECURITY.md promises it."""

import json
import logging
import re
import socketserver
import sys
import time
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import load_from_disk
from kill_points import SCRIPTS
from serving import serving

import train_lstm
import train_vit_gpt2
from data_scripts.caption_table import FEATURES
from system.downloads import download
from system.errors import UserError

MAINS = {"train_lstm": train_lstm.main, "train_vit_gpt2": train_vit_gpt2.main}
TOKEN = "hf_" + "FaKeToKeNoFaTeSt" * 2
SMALL = ["--num_train_epochs", "1", "--per_device_train_batch_size", "24", "--report_to", "tensorboard"]
EVIL = "<script>alert('owned')</script><img src=x onerror=alert(1)>"


@contextmanager
def server(answer):
    """A server on this machine that gives each connection to `answer`."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            with suppress(OSError):
                answer(self.wfile)

    with serving(Handler) as address:
        yield f"{address}/image"


def drip(file) -> None:
    file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    for _ in range(200):
        file.write(b"x")
        time.sleep(0.05)


def test_a_download_that_drips_ends_at_its_time(tmp_path):
    started = time.monotonic()
    with server(drip) as address, pytest.raises(UserError, match="takes more than 1 seconds"):
        download(address, tmp_path / "x", 10**6, max_seconds=1)
    assert time.monotonic() - started < 4


def test_a_server_that_says_nothing_is_left(tmp_path):
    started = time.monotonic()
    with server(lambda file: time.sleep(9)) as address, pytest.raises(UserError):
        download(address, tmp_path / "x", 10**6, max_seconds=1)
    assert time.monotonic() - started < 5


def test_half_an_answer_is_an_error(tmp_path):
    def half(file) -> None:
        file.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")

    with server(half) as address, pytest.raises(UserError, match="stopped sending"):
        download(address, tmp_path / "x", 10**6)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "gopher://127.0.0.1/"])
def test_only_http_is_followed_also_by_redirect(tmp_path, target):
    def elsewhere(file) -> None:
        file.write(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())

    with pytest.raises(UserError, match="not an http or https URL"):
        download(target, tmp_path / "x", 10**6)
    with server(elsewhere) as address, pytest.raises(UserError):
        download(address, tmp_path / "x", 10**6)
    assert not (tmp_path / "x").exists() or not (tmp_path / "x").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("script", MAINS)
def test_the_hub_token_is_written_nowhere(small_scenes, tmp_path, monkeypatch, caplog, capfd, script):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", small_scenes, "--output_dir", str(tmp_path / "run")]
    if script == "train_vit_gpt2":  # which has transformers' own option for it
        arguments += ["--hub_token", TOKEN]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with caplog.at_level(logging.DEBUG):
        MAINS[script](arguments)
    said = capfd.readouterr()
    assert TOKEN not in caplog.text + said.out + said.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 15 and any("tfevents" in path.name for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert "accelerate launch" in (tmp_path / "run" / "README.md").read_text()


class Elements(HTMLParser):
    """Names of the scripts, handlers and addresses of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.scripts, self.handlers, self.addresses = 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


@pytest.mark.slow
@pytest.mark.parametrize("script", MAINS)
def test_captions_and_names_of_strangers_are_inert_on_every_page(small_scenes, tmp_path, script):
    """In captions, in an image's name and in the name of the data set, which all come with the data."""
    dataset = load_from_disk(small_scenes)
    for split in dataset:
        rows = dataset[split].select(range(8))
        columns = {
            "image_id": [f"{EVIL}{number}.png" for number in range(8)],
            "captions": [[EVIL, EVIL + " a dog"]] * 8,
        }
        for name, values in columns.items():
            rows = rows.remove_columns(name).add_column(name, values)
        dataset[split] = rows.select_columns(list(FEATURES)).cast(FEATURES)
    folder = tmp_path / "<script>alert('set')<"
    dataset.save_to_disk(folder)
    arguments = [*SCRIPTS[script], *SMALL, "--dataset_name", str(folder), "--output_dir", str(tmp_path / "run")]
    MAINS[script]([*arguments, "--num_train_epochs", "2", "--learning_rate", "1e-2"])
    page = (tmp_path / "run" / "captions.html").read_text()
    elements = Elements(page)
    assert EVIL not in page and "&lt;script&gt;alert" in page
    assert elements.scripts == 1 and not elements.handlers  # the page's own script
    assert all(address.startswith("data:image/") for address in elements.addresses)
    card = (tmp_path / "run" / "README.md").read_text()
    outside_code = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
    outside_code = outside_code.split("\n---\n", 1)[1]  # the metadata are YAML
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", outside_code)
    records = [json.loads(line) for line in (tmp_path / "run" / "captions.jsonl").read_text().splitlines()]
    assert {record["references"][0] for record in records} == {EVIL}  # in the data they are what they were


def test_what_is_promised_is_written_down():
    text = (Path(__file__).parent.parent / "SECURITY.md").read_text()
    for word in ("pickle", "weights_only", "trust_remote_code", "http", "token", "zip", "HTML", "report"):
        assert word in text
