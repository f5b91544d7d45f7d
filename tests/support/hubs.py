"""A hub on loopback that stores what is pushed to it, as the client of the hub speaks to the real one; and
repositories that its client fetched earlier."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants


@dataclass
class Hub:
    """Repositories by name: whether they are private, and their files."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: int = 0
    refuses: tuple[int, str] | None = None
    """A status and a message for every request."""
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond(self.path.removeprefix("/api/models/"))

        def do_POST(self) -> None:
            self._respond(None)

        def _respond(self, shown: str | None) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            hub.asked.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("authorization"))
            if hub.refuses is not None:
                status, message = hub.refuses
                self._answer({"error": message}, status)
            elif shown is not None:
                siblings = [{"rfilename": name} for name in hub.files[shown]]
                self._answer({"id": shown, "private": hub.private[shown], "siblings": siblings, "sha": "0" * 40})
            elif self.path == "/api/repos/create":
                self._create(json.loads(body))
            elif self.path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                self._answer({"files": modes})
            else:
                self._commit(body.decode().splitlines())

        def _create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted['organization']}/{wanted['name']}"
            new = name not in hub.files
            if new:
                hub.private[name], hub.files[name] = (
                    wanted.get("visibility") == "private" or bool(wanted.get("private")),
                    {},
                )
            self._answer({"url": f"{hub.address}/{name}", "name": name}, 200 if new else 409)

        def _commit(self, lines: list[str]) -> None:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            files = hub.files[name]
            for change in map(json.loads, lines):
                if change["key"] == "file":
                    files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
                elif change["key"] == "deletedFile":
                    del files[change["value"]["path"]]
            hub.commits += 1
            self._answer(
                {"success": True, "commitOid": f"{1:040}", "commitUrl": f"{hub.address}/{name}/commit/{1:040}"}
            )

        def _answer(self, content: dict[str, Any], status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *words: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        hub.address = f"http://127.0.0.1:{listening.server_port}"
        yield hub
        listening.shutdown()


def fetched(name: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a repository with the content of a folder, which is in the local cache of the hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    return name
