"""A server that speaks as much of the Hub's API as `run hf:` and `push` use, on this machine only.

Downloads: HEAD and GET of /owner/repo/resolve/revision/file, with ranges; what a repository holds.
Uploads: create, preupload, LFS batch, PUT, commit. Everything asked is in `requests`; what was committed is in `files`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_INFO = re.compile(r"^/api/models/([\w.-]+/[\w.-]+?)(?:/revision/[^/]+)?$")
RESOLVE = re.compile(r"^/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)$")


class FakeHub(ThreadingHTTPServer):
    """`files` by (repository, name); `cut_after` bytes of a download the line goes dead, once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.repos: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.commits: list[dict[str, Any]] = []
        self.cut_after: int | None = None
        self.dead = False
        self.token: str | None = None
        self.wrong_bytes = False
        self.commit = COMMIT
        self.etag: str | None = None
        self.body: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve(with_body=False)

    def do_GET(self) -> None:
        self._resolve(with_body=True)

    def _resolve(self, with_body: bool) -> None:
        hub, asked = self.server, self.headers.get("Range")
        hub.requests.append((self.command, self.path, asked))
        about = MODEL_INFO.match(self.path)
        if about is not None and with_body:
            return self._model_info(about[1])
        match = RESOLVE.match(self.path)
        if match is None or match[1] not in hub.repos:
            return self._error(404, "RepoNotFound")
        content = hub.files.get((match[1], match[3]))
        if content is None:
            return self._error(404, "EntryNotFound")
        if with_body and hub.dead:
            return self._hang_up()
        start = int(asked.split("=")[1].split("-")[0]) if asked and with_body else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("X-Linked-Etag", f'"{hub.etag or hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        if with_body and hub.body is not None:
            content = hub.body
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if with_body:
            self._send(bytes(len(content)) if hub.wrong_bytes else content, start)

    def _model_info(self, repo: str) -> None:
        hub = self.server
        if repo not in hub.repos:
            return self._error(404, "RepoNotFound")
        names = [{"rfilename": name} for owner, name in hub.files if owner == repo]
        self._json({"id": repo, "sha": hub.commit, "siblings": names})

    def _send(self, content: bytes, start: int) -> None:
        hub = self.server
        if hub.cut_after is None:
            self.wfile.write(content[start:])
            return
        self.wfile.write(content[start : start + hub.cut_after])
        hub.cut_after, hub.dead = None, True
        self._hang_up()

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def _error(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(("POST", path, None))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._json({"error": "who are you"}, 401, {})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            hub.repos.add(repo)
            return self._json({"url": f"{hub.url}/{repo}", "name": repo})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self._preupload(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if "/commit/" in path:
            return self._commit(path.split("/api/models/")[1].split("/commit/")[0], body)
        return self._error(404, "unknown")

    def _preupload(self, asked: Any) -> None:
        def mode(name: str) -> str:
            return "lfs" if name.endswith((".gguf", ".sqlite", ".png")) else "regular"

        files = [
            {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked["files"]
        ]
        self._json({"files": files})

    def _batch(self, asked: Any) -> None:
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}", "header": {}}},
            }
            for o in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._json({})

    def _commit(self, repo: str, body: bytes) -> None:
        hub = self.server
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                hub.files[repo, value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                hub.files[repo, value["path"]] = hub.objects[value["oid"]]
            else:
                hub.commits.append(value)
        url = f"{hub.url}/{repo}/commit/{COMMIT}"
        self._json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The server, running for the length of the block."""
    hub = FakeHub()
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
