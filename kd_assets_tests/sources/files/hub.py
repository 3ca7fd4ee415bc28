"""A small hub: what `huggingface_hub` and `datasets` ask of one to load a public data set, from folders.

A stand-in: the real one cannot be reached from a test. Branch `main` is the last commit; `gated/…` is gated.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml  # type: ignore[import-untyped]


class Hub:
    """Data sets by id: commit → folder, in the order of the commits."""

    def __init__(self) -> None:
        self.data_sets: dict[str, dict[str, Path]] = {}
        self.tokens: list[str | None] = []
        """What came as authorization, of every request."""
        self.url = ""

    def folder(self, data_set: str, revision: str) -> tuple[str, Path] | None:
        commits = self.data_sets[data_set]
        commit = list(commits)[-1] if revision == "main" else revision
        return (commit, commits[commit]) if commit in commits else None


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        self.hub.tokens.append(self.headers.get("authorization"))
        parts = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "datasets"]:
            self._api("/".join(parts[2:4]), [*parts[4:], "", ""], body)
        elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
            self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self._error(404, "EntryNotFound")

    def _api(self, data_set: str, rest: list[str], body: bytes) -> None:
        what, revision = rest[0], rest[1] or "main"
        if data_set.startswith("gated/"):
            return self._error(403, "GatedRepo")
        if data_set not in self.hub.data_sets:
            return self._error(404, "RepoNotFound")
        if (found := self.hub.folder(data_set, revision)) is None:
            return self._error(404, "RevisionNotFound")
        commit, folder = found
        if what in ("", "revision"):
            card = folder / "README.md"
            data = yaml.safe_load(card.read_text().split("---")[1]) if card.is_file() else None
            files = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
            return self._json({"id": data_set, "sha": commit, "siblings": files, "cardData": data, "tags": []})
        if what == "tree":
            below = folder / "/".join(rest[2:]).strip("/")
            return self._json([self._entry(folder, path) for path in sorted(below.rglob("*"))])
        if what == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else []
            if not wanted:
                from urllib.parse import parse_qs

                wanted = parse_qs(body.decode()).get("paths", [])
            there = [folder / path for path in wanted if (folder / path).exists()]
            return self._json([self._entry(folder, path) for path in there])
        return self._error(404, "EntryNotFound")

    def _entry(self, folder: Path, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _oid(path)}

    def _file(self, data_set: str, revision: str, name: str) -> None:
        found = self.hub.folder(data_set, revision) if data_set in self.hub.data_sets else None
        if found is None:
            return self._error(404, "RepoNotFound")
        commit, folder = found
        path = folder / name
        if not path.is_file():
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        return self._send(200, path.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{_oid(path)}"'})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        start, stop = 0, len(body)
        if status == 200 and (asked := self.headers.get("Range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1) if last else stop
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[start:stop])


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
