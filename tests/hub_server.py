"""Enough of the hub's API on localhost to download one repository, and the failures that a user meets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "6cee5e81ee83917806bbde320786a8fb61efebee"
REPO = "openai/gpt-oss-20b"


class Hub(ThreadingHTTPServer):
    """One repository.

    Attributes:
        files: path -> content.
        asked: every request, as `METHOD path`.
        tokens: the Authorization headers seen.
        status: answer everything with this instead, with `error_code` in X-Error-Code.
        break_file: send only half of this file, then close the connection.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.status: int | None = None
        self.error_code: str | None = None
        self.break_file: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """Paths of the files that were fetched, in order."""
        return [line.split(f"/{COMMIT}/")[1] for line in self.asked if line.startswith("GET") and "/resolve/" in line]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            hub.tokens.add(token)
        if hub.status is not None:
            return self._answer(hub.status, b"{}", {"X-Error-Code": hub.error_code} if hub.error_code else {})
        if not f"{path.removeprefix('/api/models')}/".startswith(f"/{REPO}/"):
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return self._json([_tree_entry(name, content) for name, content in hub.files.items()])
        if path in (f"/api/models/{REPO}/revision/main", f"/api/models/{REPO}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in hub.files]
            return self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if name in hub.files:
            return self._file(name, hub.files[name])
        return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def _file(self, name: str, content: bytes) -> None:
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET" and self.server.break_file == name:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self._answer(200, content, headers)

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """Run a hub in a thread."""
    with Hub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
