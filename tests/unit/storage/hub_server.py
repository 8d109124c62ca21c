"""A Hugging Face hub on this machine: the part of its HTTP interface that `huggingface_hub` uses to upload.

Written after https://huggingface.co/docs/hub/api and the Git LFS batch API. Repositories are dictionaries.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_thisIsTheOnlyTokenOfTheTest"
_LFS = (".safetensors",)


class Hub:
    """The server.

    Attributes:
        branches: by repository and branch: its files.
        commits: (branch, message) in the order they were made.
        uploaded: SHA-256 of large files in the order they were sent; they are kept beside the branches.
        die_at: number of the large file at which the server stops to answer, once.
        overloaded: whether it answers 503 to questions for a file.
    """

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[tuple[str, str]] = []
        self.uploaded: list[str] = []
        self.read_only = False
        self.die_at: int | None = None
        self.overloaded = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        if not path.startswith("/objects/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        writes = self.command in ("POST", "PUT", "DELETE")
        if self.hub.read_only and writes:
            return self._answer(403, {"error": f"{TOKEN} has no right to write"})
        if self.hub.overloaded and self.command == "HEAD":
            return self._answer(503, {"error": "overloaded"})
        for pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return handle(self, body, *match.groups())
        return self._answer(404, {"error": f"{self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _branch(self, repository: str, branch: str) -> dict[str, bytes]:
        return self.hub.branches[repository][branch]

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.branches:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        assert wanted.get("visibility") == "private" or wanted.get("private")  # by version
        self.hub.branches[name] = {"main": {".gitattributes": b""}}
        return self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def validate_card(self, _: bytes) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def refs(self, _: bytes, repository: str) -> None:
        branches = [{"name": name, "ref": name, "targetCommit": name} for name in self.hub.branches[repository]]
        self._answer(200, {"branches": branches, "converts": [], "tags": []})

    def create_branch(self, body: bytes, repository: str, branch: str) -> None:
        there = self.hub.branches[repository]
        if branch in there:
            return self._answer(409, {"error": "Reference already exists"})
        there[branch] = dict(there[json.loads(body or b"{}").get("startingPoint", "main")])
        return self._answer(201)

    def delete_branch(self, _: bytes, repository: str, branch: str) -> None:
        del self.hub.branches[repository][branch]
        self._answer(204, b"")

    def tree(self, _: bytes, repository: str, branch: str) -> None:
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            for path, data in self._branch(repository, branch).items()
        ]
        self._answer(200, files)

    def preupload(self, body: bytes, repository: str, branch: str) -> None:
        there = self._branch(repository, branch)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LFS) else "regular",
                "shouldIgnore": False,
                "oid": _blob(there[file["path"]]) if file["path"] in there else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def batch(self, body: bytes, _: str) -> None:
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.large else {"actions": upload}))
        self._answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def put_object(self, body: bytes, digest: str) -> None:
        if self.hub.die_at == len(self.hub.uploaded):
            self.hub.die_at = None
            return self._answer(400, {"error": "it is out of order"})
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.large[digest] = body
        self.hub.uploaded.append(digest)
        return self._answer(200)

    def commit(self, body: bytes, repository: str, branch: str) -> None:
        there = self._branch(repository, branch)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append((branch, value["summary"]))
            elif line["key"] == "file":
                there[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                there[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del there[value["path"]]
        number = f"{len(self.hub.commits):040x}"
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repository}/commit/{number}", "commitOid": number})

    def resolve(self, _: bytes, repository: str, branch: str, path: str) -> None:
        data = self.hub.branches[repository].get(branch, {}).get(path)
        if data is None:
            return self._answer(404, {}, X_Error_Code="EntryNotFound")
        return self._answer(200, data, ETag=f'"{_blob(data)}"', X_Repo_Commit="0" * 40)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPOSITORY = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, Any]] = [
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate_card),
    (f"GET /api/models/{_REPOSITORY}/refs", _Handler.refs),
    (f"POST /api/models/{_REPOSITORY}/branch/(.+)", _Handler.create_branch),
    (f"DELETE /api/models/{_REPOSITORY}/branch/(.+)", _Handler.delete_branch),
    (f"GET /api/models/{_REPOSITORY}/tree/([^/]+)/?", _Handler.tree),
    (f"POST /api/models/{_REPOSITORY}/preupload/(.+)", _Handler.preupload),
    (f"POST /{_REPOSITORY}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT /objects/(.+)", _Handler.put_object),
    (f"POST /api/models/{_REPOSITORY}/commit/(.+)", _Handler.commit),
    (f"(?:GET|HEAD) /{_REPOSITORY}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
