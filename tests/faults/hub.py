"""A hub of one repository on this machine, which can cut its answers short."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPOSITORY, COMMIT = "somebody/tiny", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves a folder as `REPOSITORY`.

    Attributes:
        cut_after: of a .safetensors file an answer sends this many bytes and hangs up; None sends all.
        ranges: first bytes of the .safetensors file that were asked for, in order.
        unknown: status and error code that other repositories get. The real hub tells nobody which private ones there
            are: who has not logged in gets 401 for those and for what does not exist.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.cut_after: int | None = None
        self.ranges: list[int] = []
        self.unknown: tuple[int, str] = (404, "RepoNotFound")

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{REPOSITORY}"):
            files = [p for p in sorted(self.server.folder.iterdir()) if p.is_file()]
            names = [{"rfilename": p.name} for p in files]
            about: Any = {"_id": "1", "id": REPOSITORY, "sha": COMMIT, "siblings": names, "tags": []}
            if "/tree/" in path:
                about = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT} for p in files]
            self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
            return
        found = re.fullmatch(rf"/{REPOSITORY}/resolve/\w+/([\w.]+)", path)
        file = self.server.folder / found[1] if found else None
        if file is None or not file.is_file():
            status, code = (404, "EntryNotFound") if found else self.server.unknown
            self._send(status, b"", {"X-Error-Code": code})
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        first = int(m[1]) if (m := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        weights = file.suffix == ".safetensors"
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if body and weights:
            self.server.ranges.append(first)
        cut = self.server.cut_after if weights else None
        self._send(206 if first else 200, data[first:], headers, body=body, cut=cut)

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], *, body: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """The hub, as long as the context is open."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
