"""A Hugging Face Hub on the loopback, with faults on demand: as much of it as the real clients ask for when streaming.

    with HubServer() as hub:
        hub.add("datasets", "owner/name", {"README.md": b"...", "data/a.parquet": b"..."})
        hub.fail("/data/a.parquet", Fault("drop", after=1000), times=2)
        subprocess.run([...], env=os.environ | hub.environment(tmp_path))
        hub.downloads("/data/a.parquet")

A repository has commits: `add` again makes the next one, which is then `main`; `forget` drops one, as a squashed
history does. A fault is met by the next requests whose path ends as it says.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


class Fault(NamedTuple):
    """What happens to a request instead of an answer."""

    kind: Literal["drop", "status", "slow", "short", "silent"]
    """`drop`: the connection ends after `after` bytes of the body; `status`: an error; `slow`: the body comes in
    pieces; `short`: fewer bytes than were asked for, said to be all of them; `silent`: no answer for `seconds`."""
    after: int = 0
    status: int = 503
    headers: dict[str, str] = {}  # noqa: RUF012 - read only
    seconds: float = 0.0


class Request(NamedTuple):
    method: str
    path: str
    span: str | None  # its Range header


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by hash: files by path
    main: str = ""


class HubServer:
    """The server, in threads of its own while the context lasts."""

    def __init__(self):
        self.requests: list[Request] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._faults: list[tuple[str, Fault]] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()  # ends what is silent or slow
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """What a process is to be given so that it takes this for the Hub; `home` is its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # a question to another host, which takes seconds without a network
        }

    def patch(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """The same for this process, whose clients have read their environment already."""
        import datasets
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)

    def add(self, kind: Literal["datasets", "models"], name: str, files: dict[str, bytes]) -> str:
        """A new commit that holds these files; its hash."""
        digest = hashlib.sha1(name.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        repo = self._repos.setdefault((kind, name), Repo())
        repo.main = digest.hexdigest()
        repo.commits[repo.main] = dict(files)
        return repo.main

    def remove(self, kind: str, name: str, path: str) -> None:
        """The newest commit loses a file, which no real Hub does, unless it is deleted on purpose."""
        repo = self._repos[kind, name]
        del repo.commits[repo.main][path]

    def forget(self, kind: str, name: str, commit: str) -> None:
        del self._repos[kind, name].commits[commit]

    def fail(self, path_end: str, fault: Fault, times: int = 1) -> None:
        """The next `times` requests for the content of a path that ends so meet the fault."""
        with self._lock:
            self._faults += [(path_end, fault)] * times

    def heal(self) -> None:
        """No fault is left."""
        with self._lock:
            self._faults.clear()

    def downloads(self, path_end: str) -> int:
        """Requests so far for a file's content."""
        return sum(r.method == "GET" and "/resolve/" in r.path and r.path.endswith(path_end) for r in self.requests)

    def note(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            for i, (path_end, fault) in enumerate(self._faults):
                if request.path.endswith(path_end):
                    del self._faults[i]
                    return fault
        return None

    def pause(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def find(self, kind: str, name: str, revision: str | None) -> tuple[Repo | None, str | None]:
        """The repository and the commit that a revision names; None for what there is not."""
        repo = self._repos.get((kind, name))
        if repo is None:
            return None, None
        commit = repo.main if revision in (None, "main") else revision
        return repo, commit if commit in repo.commits else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *args: object) -> None:
        """Not to stderr: `HubServer.requests` keeps them."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server_hub.note(Request(self.command, path, self.headers.get("Range")))
        if fault is not None and fault.kind == "silent":
            self.server_hub.pause(fault.seconds)
            self.close_connection = True
        elif fault is not None and fault.kind == "status":
            self._send(fault.status, b"", fault.headers)
        elif api := re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.*)?)?", path
        ):
            self._api(*api.groups(), body)
        elif file := re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(file[1] or "models", *file.groups()[1:], fault)
        else:
            self._send(200 if path == "/" else 404, b"")

    def _api(self, kind: str, name: str, what: str | None, revision: str | None, rest: str | None, body: bytes) -> None:
        repo, commit = self.server_hub.find(kind, name, revision)
        if repo is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        if commit is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        files = repo.commits[commit]
        if what == "tree":
            entries = _tree(files, (rest or "").strip("/"), "recursive=true" in self.path.lower())
            if entries is None:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            self._json(entries)
        elif what == "paths-info":
            asked = _asked_paths(body)
            self._json([_entry(path, files[path]) for path in asked if path in files])
        else:
            self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files], "tags": []})

    def _file(self, kind: str, name: str, revision: str, path: str, fault: Fault | None) -> None:
        repo, commit = self.server_hub.find(kind, name, revision)
        if repo is None or commit is None or path not in repo.commits[commit]:
            code = "RepoNotFound" if repo is None else "RevisionNotFound" if commit is None else "EntryNotFound"
            self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit or ""})
            return
        content = repo.commits[commit][path]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            self._send(200, content, headers, fault)
            return
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        if first >= len(content):
            self._send(416, b"", headers)
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers, fault)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        if fault is not None and fault.kind == "short":
            content = content[: fault.after]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if fault is not None and fault.kind == "drop":
                self.wfile.write(content[: fault.after])
                self.close_connection = True
            elif fault is not None and fault.kind == "slow":
                step = max(1, len(content) // 8)
                for start in range(0, len(content), step):
                    self.wfile.write(content[start : start + step])
                    self.wfile.flush()
                    self.server_hub.pause(fault.seconds / 8)
            else:
                self.wfile.write(content)
        except OSError:  # the client has gone
            self.close_connection = True


def _entry(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]] | None:
    """The entries below a folder; None where there is no such folder."""
    start = f"{folder}/" if folder else ""
    below = {path: content for path, content in sorted(files.items()) if path.startswith(start)}
    if not below and folder:
        return None
    folders = {path[: i + len(start)] for path in below for i, c in enumerate(path[len(start) :]) if c == "/"}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    entries += [_entry(path, content) for path, content in below.items()]
    return [entry for entry in entries if recursive or "/" not in str(entry["path"])[len(start) :]]


def _asked_paths(body: bytes) -> list[str]:
    """Of a JSON body, or of a form."""
    try:
        paths = json.loads(body)["paths"]
        return [paths] if isinstance(paths, str) else paths
    except ValueError:
        return parse_qs(body.decode())["paths"]
