"""A Hugging Face hub of one model, on this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
MAKER = "hf_maker"  # a token that may write to org
READER = "hf_reader"  # one that may not write


class Hub:
    """What it holds, and what it was asked.

    Attributes:
      files: of `org/name`, by name; None: there is no such repository.
      private: whether it is, where it was made here.
      branch: that the last commit went to.
      asked: the paths of all requests.
      stored: large files that were uploaded, by their SHA-256, in a commit or not.
      failing: how many more uploads of large files are taken.
      large: bytes from which on a file is large.
      address: at which it is served.
    """

    def __init__(self, files: Mapping[str, bytes] | None):
        self.files = None if files is None else dict(files)
        self.private: bool | None = None
        self.branch: str | None = None
        self.branches = {"main"}
        self.asked: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.failing: int | None = None
        self.large = 1000
        self.address = ""

    def get(self, path: str, token: str) -> _Answer:
        if path == "/api/whoami-v2":
            role = {MAKER: "write", READER: "read"}.get(token)
            if role is None:
                return _error(401, "Invalid username or password.")
            auth = {"accessToken": {"role": role}}
            return _json({"name": "maker", "orgs": [{"name": "org"}], "auth": auth})
        api, _, rest = path.partition("/api/models/org/name")
        _, _, name = path.partition(f"/org/name/resolve/{COMMIT}/")
        if self.files is None:
            return _error(404, "Repository not found", "RepoNotFound")
        if not api and rest.startswith("/tree/"):
            return _json(_tree(self.files))
        known = {*map(_revision, self.branches), "", f"/revision/{COMMIT}"}
        if not api and rest in known:
            siblings = [{"rfilename": name} for name in self.files]
            return _json({"id": "org/name", "sha": COMMIT, "siblings": siblings})
        if not api and rest.startswith("/revision/"):
            return _error(404, "Invalid rev id", "RevisionNotFound")
        if name in self.files:
            etag = f'"{_digest(self.files[name])}"'
            return 200, self.files[name], {"ETag": etag}
        return _error(404, "", "RepoNotFound")

    def post(self, path: str, token: str, content: bytes) -> _Answer:
        if path == "/api/validate-yaml":
            flaw = flaw_of(json.loads(content)["content"])
            return _error(400, flaw) if flaw else _json({"errors": [], "warnings": []})
        if token != MAKER:
            return _error(403, "You need a token that may write.")
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path.startswith("/api/models/org/name/branch/"):
            branch = urllib.parse.unquote(path.rpartition("/")[2])
            self.branches.add(branch)
            return _json({})
        if self.files is None:
            return _error(404, "Repository not found", "RepoNotFound")
        if path.startswith("/api/models/org/name/preupload/"):
            files = json.loads(content)["files"]
            return _json({"files": [self._mode(file) for file in files]})
        if path == "/org/name.git/info/lfs/objects/batch":
            return _json(
                {"objects": list(map(self._place, json.loads(content)["objects"]))}
            )
        if path.startswith("/api/models/org/name/commit/"):
            return self._commit(path.rpartition("/")[2], content)
        return _error(404, path)

    def put(self, path: str, content: bytes) -> _Answer:
        """A large file, which goes to a store beside the hub."""
        if self.failing is not None:
            if self.failing == 0:
                return _error(403, "The disk of the store is full.")
            self.failing -= 1
        oid = path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.stored[oid] = content
        return _json({})

    def _create(self, given: dict[str, Any]) -> _Answer:
        if given.get("organization") != "org":
            own = "You don't have the rights to create a model there."
            return _error(403, own)
        if self.files is not None:
            there = {"error": "You already created this", "url": self._url()}
            return 409, json.dumps(there).encode(), {}
        self.files = {".gitattributes": b""}
        self.private = given.get("visibility", given.get("private")) in (
            "private",
            True,
        )
        return _json({"url": self._url()})

    def _url(self) -> str:
        return f"{self.address}/org/name"

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] >= self.large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _place(self, file: dict[str, Any]) -> dict[str, Any]:
        if file["oid"] in self.stored:
            return file
        return file | {"actions": {"upload": {"href": f"{self.address}/{file['oid']}"}}}

    def _commit(self, branch: str, content: bytes) -> _Answer:
        assert self.files is not None
        for line in content.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del self.files[value["path"]]
            else:
                assert entry["key"] == "header"
        self.branch = urllib.parse.unquote(branch)
        url = f"{self._url()}/commit/{COMMIT}"
        return _json({"commitUrl": url, "commitOid": COMMIT})


_Answer = tuple[int, bytes, dict[str, str]]


def flaw_of(card: str) -> str | None:
    """What the hub says of a model card that it does not take."""
    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    fields = yaml.safe_load(head[1]) if head else {}
    for i, base in enumerate(fields.get("base_model", [])):
        try:
            validate_repo_id(base)
        except HFValidationError:
            base = ""
        if base.count("/") != 1:
            return f'"base_model[{i}]" is not valid. Use a model id from hf.co/models'
    if fields.get("license", "mit") not in ("mit", "apache-2.0", "llama3", "other"):
        return '"license" must be one of [mit, apache-2.0, llama3, other]'
    return None


@contextlib.contextmanager
def serve(files: Mapping[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serves `org/name` with these files; yields the address and what was asked for."""
    hub = Hub(files)
    with serving(hub) as address:
        yield address, hub.asked


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serves what a hub holds; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self._send(*hub.get(self._path(), self._token()))

        def do_POST(self) -> None:
            self._send(*hub.post(self._path(), self._token(), self._content()))

        def do_PUT(self) -> None:
            self._send(*hub.put(self._path(), self._content()))

        def _path(self) -> str:
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            return path

        def _token(self) -> str:
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def _content(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"]))

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
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
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield hub.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _json(value: object) -> _Answer:
    return 200, json.dumps(value).encode(), {}


def _error(status: int, message: str, code: str = "") -> _Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return status, json.dumps({"error": message}).encode(), headers


def _revision(branch: str) -> str:
    return f"/revision/{urllib.parse.quote(branch, safe='')}"


def _tree(files: Mapping[str, bytes]) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
        for name, content in files.items()
    ]


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
