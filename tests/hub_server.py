"""A Hugging Face hub of one model, on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@contextlib.contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serves `org/name` with these files; yields the address and what was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            api, _, rest = path.partition("/api/models/org/name")
            _, _, name = path.partition(f"/org/name/resolve/{COMMIT}/")
            if not api and rest.startswith("/tree/"):
                self._send(json.dumps(_tree(files)).encode())
            elif not api and rest in ("", "/revision/main", f"/revision/{COMMIT}"):
                siblings = [{"rfilename": name} for name in files]
                facts = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
                self._send(json.dumps(facts).encode())
            elif name in files:
                self._send(files[name], ETag=f'"{_digest(files[name])}"')
            else:
                self._send(b"", 404, **{"X-Error-Code": "RepoNotFound"})

        def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            headers |= {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _tree(files: Mapping[str, bytes]) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
        for name, content in files.items()
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
