"""A Hugging Face Hub of one's own on the loopback interface, as far as downloading a repository needs it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class Hub:
    """Its address, and every request that it was sent."""

    port: int
    requests: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a process that takes this for the Hub, and keeps downloads under `home`."""
        url = f"http://127.0.0.1:{self.port}"
        here = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | here


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Repository's name → the folder that it holds."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            hub.requests.append("/".join(parts))
            name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            folder = repositories.get(name)
            if folder is None:
                return self.answer(
                    404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                )
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            if parts[0] == "api" and "tree" in parts:
                listed = [{"type": "file", "path": f, "size": len(b), "oid": sha(b)} for f, b in files.items()]
                return self.answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
            if parts[0] == "api":
                told = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return self.answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
            content = files.get("/".join(parts[4:]))
            if content is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self.answer(200, content, {"ETag": f'"{sha(content)}"', "X-Repo-Commit": COMMIT})

        def answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
