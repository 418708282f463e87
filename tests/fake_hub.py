"""A Hugging Face on loopback: folders go in as repositories, huggingface_hub downloads them; it can refuse and fail."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit


@dataclass
class Refusal:
    """An answer instead of a repository's; `files` alone: its listings are public."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    files_only: bool = False


@dataclass
class FakeHub:
    """Serves while it is entered as a context.

    repositories  "owner/name" -> folder; every file of it is in the revisions "main" and `commit`
    refusals      "owner/name" -> what to answer instead
    cut           file -> bytes after which its next download breaks off, once
    broken        files that are answered with a 500
    asked         (method, path, Range header) of every request
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    commit: str = "c0ffee" + "0" * 34
    _port: int = 0

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            fake = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections meanwhile."""
        self.__exit__()
        yield
        self.__enter__()

    def downloads(self, repository: str) -> list[str]:
        """Files that were sent, or begun to be, in order."""
        start = f"/{repository}/resolve/{self.commit}/"
        return [
            path.removeprefix(start) for method, path, _ in self.asked if method == "GET" and path.startswith(start)
        ]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fake.asked.append((self.command, path, self.headers.get("Range")))
        listing = path.startswith("/api/models/")
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repository = f"{owner}/{name}"
        refusal = self.fake.refusals.get(repository)
        if refusal is not None and not (listing and refusal.files_only):
            return self._send(refusal.status, b"", refusal.headers)
        if repository not in self.fake.repositories:
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        folder = self.fake.repositories[repository]
        kind, revision, *file = rest or ("revision", "main")
        if revision not in ("main", self.fake.commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if kind == "revision":
            return self._json({"id": repository, "sha": self.fake.commit, "siblings": [], "private": False})
        if kind == "tree":
            return self._json([_entry(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()])
        return self._file(folder, "/".join(file))

    def _file(self, folder: Path, name: str) -> None:
        path = folder / name
        if name in self.fake.broken and self.command == "GET":
            return self._send(500, b"", {})
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data = path.read_bytes()
        headers = {"X-Repo-Commit": self.fake.commit, "ETag": f'"{_digest(path)}"', "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.fake.cut.pop(name, None) if self.command == "GET" else None
        self._send(206 if start else 200, data[start:], headers, cut)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])


def _entry(path: Path, folder: Path) -> dict[str, object]:
    return {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": path.stat().st_size,
        "oid": _digest(path),
    }


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
