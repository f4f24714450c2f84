"""A small Hugging Face Hub on the loopback interface, for tests.

It keeps to the Hub's HTTP interface as huggingface_hub uses it for models, so that uploads and downloads go through
the real client: making repositories and branches, checking a card's metadata, commits with small files inside and
large ones through Git LFS (in one piece or in parts), listing, and downloads with ETags, byte ranges and a redirect to
signed addresses. Storage in Xet is not offered. Everything is kept in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import yaml
from huggingface_hub import ModelCard


LFS_SUFFIXES = (".safetensors", ".bin", ".wav")
# Of https://huggingface.co/docs/hub/repositories-licenses, those that a checkpoint of this package may meet.
LICENSES = {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other"}
# Of https://huggingface.co/docs/hub/models-tasks.
PIPELINE_TAGS = {"audio-to-audio", "feature-extraction"}
REPOSITORY_ID = re.compile(r"[\w.-]+/[\w.-]+")


def card_problems(content: str) -> list[str]:
    """What is wrong with a model card's metadata.

    The Hub's own check (`/api/validate-yaml`) is no public code. These are the rules that its documentation states
    (model cards, licences, and the specification modelcard.md in hub-docs), for the fields that this package writes.
    """
    try:
        ModelCard(content)  # the client's own check: that it is YAML, and the form of evaluation results
    except (ValueError, TypeError, yaml.YAMLError) as error:
        return [str(error)]
    block = re.match(r"---\n(.*?)\n---(\n|$)", content, re.DOTALL)
    metadata = yaml.safe_load(block[1]) if block else None
    if not metadata:
        return ["there is no metadata"]
    problems = []

    def require(name: str, good: Callable[[Any], bool], accepted: str) -> None:
        if name in metadata and not good(metadata[name]):
            problems.append(f'"{name}" is {metadata[name]!r}; accepted: {accepted}')

    def is_list(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
        return lambda value: isinstance(value, list) and bool(value) and all(map(check, value))

    def is_id(value: Any) -> bool:
        return isinstance(value, str) and REPOSITORY_ID.fullmatch(value) is not None

    known = {
        "base_model",
        "datasets",
        "language",
        "library_name",
        "license",
        "license_link",
        "license_name",
        "pipeline_tag",
        "tags",
    }
    problems += [f'"{name}" is unknown to these rules' for name in metadata.keys() - known]
    require("license", lambda value: value in LICENSES, "an identifier of the list of licences")
    if metadata.get("license") == "other" and not {"license_name", "license_link"} <= metadata.keys():
        problems.append('"license: other" needs license_name and license_link')
    require(
        "license_name", lambda value: re.fullmatch(r"[a-z0-9-.]+", value) is not None, "a name of a-z, 0-9, - and ."
    )
    require(
        "license_link",
        lambda value: value in ("LICENSE", "LICENSE.md") or value.startswith("https://"),
        "a file or URL",
    )
    require("language", is_list(lambda code: re.fullmatch("[a-z]{2,3}", code) is not None), "ISO 639 codes")
    require("tags", is_list(lambda tag: isinstance(tag, str) and 0 < len(tag) <= 100), "a list of names")
    require("pipeline_tag", lambda value: value in PIPELINE_TAGS, "a task")
    require("library_name", lambda value: value == "transformers", "a library")
    require("datasets", is_list(is_id), "a list of owner/name")
    require("base_model", lambda value: is_id(value) or is_list(is_id)(value), "owner/name, or a list of these")
    return problems


@dataclass
class Repository:
    """Commits are whole trees: a file is its bytes, or the SHA-256 of a large one."""

    owner: str
    private: bool
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes | str]) -> str:
        oid = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Fault:
    """What happens to requests of a kind: the connection is dropped after some bytes of the body, or they are refused.

    Attributes:
        method, path: of the requests; `path` is looked for anywhere in theirs.
        after: bytes of the body, sent or received, after which the connection is dropped.
        status: to be answered instead, without a look at the request.
        times: how often.
        seen: the requests that it has happened to, with the Range that they asked for.
    """

    method: str
    path: str
    after: int = 0
    status: int | None = None
    times: int = 1
    seen: list[str | None] = field(default_factory=list)


class HubServer(ThreadingHTTPServer):
    """The server; `tokens` says whose token is which."""

    daemon_threads = True

    def __init__(self, tokens: dict[str, str], part_size: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = tokens
        self.part_size = part_size
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}"  # large files come from another host
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def fail(self, method: str, path: str, **options: Any) -> Fault:
        self.faults.append(Fault(method, path, **options))
        return self.faults[-1]

    def content(self, repository: str, name: str, revision: str = "main") -> bytes:
        repo = self.repositories[repository]
        stored = repo.commits[str(repo.resolve(revision))][name]
        return self.large_files[stored] if isinstance(stored, str) else stored

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away, and connections that a fault closed, are what is tested."""


@contextmanager
def hub_server(tokens: dict[str, str], part_size: int | None = None) -> Iterator[HubServer]:
    """A running server. Files of more than `part_size` bytes are to be uploaded in parts of that size."""
    with HubServer(tokens, part_size) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {"error": message}


class _Dropped(Exception):
    """The connection is to be closed at once."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((self.command, path))
            self.fault = next((each for each in self.server.faults if self._meets(each, path)), None)
            if self.fault is not None:
                self.fault.times -= 1
                self.fault.seen.append(self.headers.get("Range"))
        try:
            try:
                body = self._body()
                if self.fault is not None and self.fault.status is not None:
                    raise _Refused(self.fault.status, "out of order")
                for method, pattern, handle in _ROUTES:
                    matched = re.fullmatch(pattern, path)
                    if matched and self.command in method.split():
                        handle(self, body, **matched.groupdict())
                        return
                raise _Refused(404, f"no such address: {self.command} {path}")
            except _Refused as refused:
                headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
                self._send(json.dumps(refused.body).encode(), refused.status, headers)
        except _Dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _meets(self, fault: Fault, path: str) -> bool:
        return fault.times > 0 and fault.method == self.command and fault.path in path

    def _body(self) -> bytes:
        sent = self.fault is not None and self.fault.status is None and self.command in ("POST", "PUT")
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if sent and len(body) > self.fault.after:
                    raise _Dropped
            self.rfile.readline()
            return body
        if sent:
            self.rfile.read(min(self.fault.after, int(self.headers.get("Content-Length", 0))))
            raise _Dropped
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.command == "GET" and self.fault.status is None:
            self.wfile.write(body[: self.fault.after])
            raise _Dropped
        self.wfile.write(body)

    def _send_json(self, document: Any, status: int = 200) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json"})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        """The file, or the part of it that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes", **headers}
        if asked is None:
            self._send(content, 200, headers)
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            raise _Refused(416, "no such range")
        self._send(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})

    def _user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.server.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return user

    def _repository(self, repository: str, write: bool = False) -> Repository:
        """A repository that the request may read, or write. Private ones do not exist for others."""
        user, found = self._user(), self.server.repositories.get(repository)
        if found is None or (found.private and user != found.owner):
            raise _Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user != found.owner:
            raise _Refused(401 if user is None else 403, "You have no right to write here")
        return found

    def _tree(self, repository: str, revision: str) -> tuple[str, dict[str, bytes | str]]:
        found = self._repository(repository)
        oid = found.resolve(revision)
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, found.commits[oid]

    def _branch(self, repository: str, revision: str) -> Repository:
        found = self._repository(repository, write=True)
        if revision not in found.branches:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        self._send_json({"type": "user", "name": user})

    def create(self, body: bytes) -> None:
        asked, user = json.loads(body), self._user()
        if user is None:
            raise _Refused(401, "Invalid username or password.")
        if (asked.get("organization") or user) != user:
            raise _Refused(403, "You don't have the rights to create a model under this namespace")
        name = f"{user}/{asked['name']}"
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repositories:
            message = "You already created this model repo"
            raise _Refused(409, message, body={"error": message, "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[name] = Repository(user, private)
        self.server.repositories[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._send_json({"url": url, "name": name})

    def create_branch(self, body: bytes, repository: str, branch: str) -> None:
        found = self._repository(repository, write=True)
        if branch in found.branches:
            raise _Refused(409, f"Reference already exists: {branch}")
        found.branches[branch] = found.branches["main"]
        self._send_json({}, 201)

    def validate_yaml(self, body: bytes) -> None:
        problems = card_problems(json.loads(body)["content"])
        self._send_json({"errors": [{"message": each} for each in problems], "warnings": []}, 400 if problems else 200)

    def preupload(self, body: bytes, repository: str, revision: str) -> None:
        files = self._branch(repository, revision).commits[self._tree(repository, revision)[0]]

        def describe(asked: dict[str, Any]) -> dict[str, Any]:
            name = asked["path"]
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": _oid(files.get(name))}

        self._send_json({"files": [describe(each) for each in json.loads(body)["files"]]})

    def lfs_batch(self, body: bytes, repository: str) -> None:
        self._repository(repository, write=True)
        asked = json.loads(body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"

        def action(oid: str, size: int) -> dict[str, Any]:
            if oid in self.server.large_files:
                return {"oid": oid, "size": size}
            target, part_size = f"{self.server.storage}/storage/{oid}", self.server.part_size
            if part_size is None or size <= part_size:
                upload: dict[str, Any] = {"href": target}
            else:
                parts = {str(part + 1): f"{target}/{part + 1}" for part in range(-(-size // part_size))}
                upload = {"href": f"{target}/complete", "header": {"chunk_size": str(part_size), **parts}}
            verify = {"href": f"{self.server.endpoint}/{repository}.git/info/lfs/objects/verify"}
            return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

        objects = [action(each["oid"], each["size"]) for each in asked["objects"]]
        self._send_json({"transfer": "multipart" if self.server.part_size else "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "The content is another than its checksum says")
        self.server.large_files[oid] = body
        self._send(b"")

    def store_part(self, body: bytes, oid: str, part: str) -> None:
        self.server.parts[oid, int(part)] = body
        self._send(b"", 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, oid: str) -> None:
        asked = json.loads(body)
        parts = [self.server.parts[oid, each["partNumber"]] for each in asked["parts"]]
        etags = [f'"{hashlib.md5(part).hexdigest()}"' for part in parts]
        if asked["oid"] != oid or etags != [each["etag"] for each in asked["parts"]]:
            raise _Refused(400, "The parts are others than were sent")
        self.store(b"".join(parts), oid)

    def verify(self, body: bytes, repository: str) -> None:
        self._repository(repository, write=True)
        asked = json.loads(body)
        if len(self.server.large_files.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "The file was not uploaded")
        self._send_json({})

    def commit(self, body: bytes, repository: str, revision: str) -> None:
        found = self._branch(repository, revision)
        files = dict(self._tree(repository, revision)[1])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise _Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = value["oid"]
            elif entry["key"] != "header":
                raise _Refused(400, f"{entry['key']} is not done here")
        oid = found.commit(revision, files)
        self._send_json({"commitUrl": f"{self.server.endpoint}/{repository}/commit/{oid}", "commitOid": oid})

    def info(self, body: bytes, repository: str, revision: str | None = None) -> None:
        oid, files = self._tree(repository, revision or "main")
        self._send_json(
            {
                "id": repository,
                "modelId": repository,
                "sha": oid,
                "private": self.server.repositories[repository].private,
                "siblings": [{"rfilename": name} for name in sorted(files)],
                "tags": [],
            }
        )

    def tree(self, body: bytes, repository: str, revision: str, folder: str | None = None) -> None:
        _, files = self._tree(repository, revision)
        if folder is not None:  # files lie in no folders here
            raise _Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self._send_json([self._entry(name, stored) for name, stored in sorted(files.items())])

    def _entry(self, name: str, stored: bytes | str) -> dict[str, Any]:
        content = self.server.large_files[stored] if isinstance(stored, str) else stored
        entry = {"type": "file", "path": name, "oid": _git_oid(content), "size": len(content)}
        if isinstance(stored, str):
            entry["lfs"] = {"oid": stored, "size": len(content), "pointerSize": 134}
        return entry

    def resolve(self, body: bytes, repository: str, revision: str, name: str) -> None:
        commit, files = self._tree(repository, revision)
        if name not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            self._send(b"Entry not found", 404, headers)
            return
        stored = files[name]
        if isinstance(stored, bytes):
            self._send_file(stored, {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(stored)}"'})
            return
        size = len(self.server.large_files[stored])
        headers = {"X-Repo-Commit": commit, "X-Linked-ETag": f'"{stored}"', "X-Linked-Size": str(size)}
        self._send(b"", 302, headers | {"Location": f"{self.server.storage}/signed/{stored}/{quote(name)}"})

    def signed(self, body: bytes, oid: str, name: str) -> None:
        if "Authorization" in self.headers:
            raise _Refused(400, "A token was sent to another host than the Hub's")
        self._send_file(self.server.large_files[oid], {"ETag": f'"{oid}"'})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(stored: bytes | str | None) -> str | None:
    return _git_oid(stored) if isinstance(stored, bytes) else stored


_REPOSITORY = r"(?P<repository>[\w.-]+/[\w.-]+?)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_REPOSITORY}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", f"/api/models/{_REPOSITORY}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{_REPOSITORY}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET HEAD", f"/api/models/{_REPOSITORY}(/revision/(?P<revision>.+))?", _Handler.info),
    ("GET", f"/api/models/{_REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/verify", _Handler.verify),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler.store_part),
    ("POST", "/storage/(?P<oid>[0-9a-f]{64})/complete", _Handler.complete),
    ("GET HEAD", "/signed/(?P<oid>[0-9a-f]{64})/(?P<name>.+)", _Handler.signed),
    ("GET HEAD", f"/{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
]
