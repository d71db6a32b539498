"""A Hugging Face Hub on the loopback address: as much of its HTTP protocol as huggingface_hub and datasets speak.

    with running_hub() as hub:
        hub.endpoint                                    # for HF_ENDPOINT
        hub.fail("POST", "/commit/", status=500)        # the next commit is answered with 500
        hub.repositories["model", "me/captioner"].files("main")["config.json"].content

It keeps what it is sent in memory. Large files (LFS) lie at a second origin, as they do on the Hub, whose storage must never
see a token. Written after the requests that huggingface_hub 2.4 makes with HF_HUB_DISABLE_XET=1; Xet's own protocol is not here.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml
from serving import serving

TOKENS = {"hf_me": "me", "hf_reader": "reader"}  # the second may read, and write nowhere
MAX_REGULAR_BYTES = 10 * 2**20
PAGE_SIZE = 8  # of a tree; the Hub's own is 1,000


class Answer(Exception):
    """An answer that is no success: status, sentence, and the code by which the client tells its errors apart."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        stored = pointer.encode() if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid

    def listed(self, path: str) -> dict:
        """As a tree lists it."""
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.is_lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid, **lfs}


@dataclass(frozen=True)
class Commit:
    files: dict[str, File]
    title: str
    parent: "Commit | None" = None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @property
    def oid(self) -> str:
        told = [self.title, self.parent.oid if self.parent else "", {p: f.git_oid for p, f in self.files.items()}]
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()


@dataclass
class Repository:
    kind: str  # "model" or "dataset"
    name: str
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=lambda: {"main": Commit({}, "initial commit")})
    tags: dict[str, Commit] = field(default_factory=dict)

    def commits(self, revision: str) -> list[Commit]:
        """From the revision (branch, tag or commit) back to the first."""
        known = {
            commit.oid: commit for head in [*self.branches.values(), *self.tags.values()] for commit in _back(head)
        }
        head = self.branches.get(revision) or self.tags.get(revision) or known.get(revision)
        if head is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return list(_back(head))

    def files(self, revision: str) -> dict[str, File]:
        return self.commits(revision)[0].files


def _back(commit: Commit | None) -> Iterator[Commit]:
    while commit:
        yield commit
        commit = commit.parent


@dataclass
class Fault:
    """What happens to matching requests, from the `first` on, `count` times: an error status, or the connection is cut."""

    method: str
    pattern: str
    first: int = 1
    count: int = 1
    status: int | None = None  # None cuts: an upload when half of it is read, anything else when half of it is sent
    seen: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.pattern, path):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.count


class Hub:
    """The state of the server: repositories, large files, what was asked of it, and the faults that were ordered."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[
            tuple[str, str, bool]
        ] = []  # method, path, whether with a token; storage's begin with /lfs/
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.endpoint = self.storage = ""

    def fail(self, method: str, pattern: str, **fault) -> None:
        self.faults.append(Fault(method, pattern, **fault))

    def repository(self, kind: str, name: str, user: str | None) -> Repository:
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and name.split("/")[0] != user):
            # Who is not logged in learns no more about a private repository than about one that is not there.
            raise Answer(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, kind: str, name: str, user: str | None) -> Repository:
        repository = self.repository(kind, name, user)
        if user is None:
            raise Answer(401, "Invalid username or password.")
        if name.split("/")[0] != user:
            raise Answer(403, f"You don't have the required permissions to write to {name}")
        return repository

    def create(self, user: str | None, request: dict) -> dict:
        if user is None:
            raise Answer(401, "Invalid username or password.")
        owner, kind = request.get("organization") or user, request.get("type") or "model"
        if owner != user or user == "reader":
            raise Answer(403, f"You don't have the rights to create a {kind} under the namespace {owner}")
        name = f"{owner}/{request['name']}"
        url = f"{self.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.repositories:
            # The client reads the address from this answer, too.
            raise Answer(409, "You already created this repo", url=url)
        self.repositories[kind, name] = Repository(kind, name, private=request.get("visibility") == "private")
        return {"url": url, "name": name}

    def info(self, repository: Repository, revision: str) -> dict:
        commit = repository.commits(revision)[0]
        card = commit.files.get("README.md", File(b"", False)).content.decode()
        metadata = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        return {
            "id": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.oid,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "cardData": yaml.safe_load(metadata.group(1)) if metadata else {},
            "siblings": [{"rfilename": path} for path in commit.files],
        }

    def tree(self, repository: Repository, revision: str, folder: str, recursive: bool) -> list[dict]:
        entries, inside = {}, f"{folder}/" if folder else ""
        for path, file in sorted(repository.files(revision).items()):
            if not path.startswith(inside):
                continue
            parts = path.removeprefix(inside).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                name = inside + "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                entries[path] = file.listed(path)
        if folder and not entries:
            raise Answer(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return list(entries.values())

    def preupload(self, repository: Repository, revision: str, request: dict) -> dict:
        there = repository.files(revision)
        modes = []
        for file in request["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            mode = "lfs" if binary or file["size"] > MAX_REGULAR_BYTES else "regular"
            known = {"oid": there[file["path"]].etag} if file["path"] in there else {}
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": modes}

    def lfs_batch(self, request: dict) -> dict:
        objects = []
        for wanted in request["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.large_files:
                upload = {"href": f"{self.storage}/lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.endpoint}/lfs-verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def commit(self, repository: Repository, branch: str, lines: bytes) -> dict:
        """Take a commit, a JSON object a line: header first, then files; whole or not at all."""
        if branch not in repository.branches:
            raise Answer(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        parent = repository.branches[branch]
        files, header = dict(parent.files), {}
        for line in lines.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header":
                header = value
                if value.get("parentCommit", parent.oid) != parent.oid:
                    raise Answer(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.large_files:
                    raise Answer(400, f"{value['path']}: its content was never uploaded")
                files[value["path"]] = File(self.large_files[value["oid"]], is_lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Answer(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: file for path, file in files.items() if not path.startswith(value["path"])}
        commit = repository.branches[branch] = Commit(files, header["summary"], parent)
        return {
            "success": True,
            "commitOid": commit.oid,
            "commitUrl": f"{self.endpoint}/{repository.name}/commit/{commit.oid}",
            "hookOutput": "",
        }

    def refs(self, repository: Repository) -> dict:
        def listed(refs: dict[str, Commit], folder: str) -> list[dict]:
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c.oid} for n, c in refs.items()]

        return {
            "branches": listed(repository.branches, "heads"),
            "tags": listed(repository.tags, "tags"),
            "converts": [],
        }


API = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
FILE = r"/(?:(?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)"


class Handler(BaseHTTPRequestHandler):
    """One request: fault or token first, then the route whose pattern matches."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 milliseconds for the receipt of its head
    hub: Hub

    def handle_request(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        with hub.lock:
            hub.requests.append((self.command, path, "Authorization" in self.headers))
            # Every fault counts each request, struck or not.
            struck = [fault for fault in hub.faults if fault.strikes(self.command, path)]
        self.cut = any(fault.status is None for fault in struck)
        if self.cut and self.command in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.hang_up()
            return
        self.body = self.read_body()
        try:
            if struck and not self.cut:
                raise Answer(struck[0].status, "ordered by the test", **{"Retry-After": "0"})
            with hub.lock:
                self.route(path)
        except Answer as answer:
            body = {"error": answer.message, "url": answer.headers.pop("url", None)}
            self.send(answer.status, json.dumps(body).encode(), **answer.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def route(self, path: str) -> None:
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                parts = {name: unquote(part) for name, part in match.groupdict(default="").items()}
                answer = function(self, **{**parts, "kind": parts["kind"] or "model"} if "kind" in parts else parts)
                if answer is not None:
                    self.send(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})
                return
        raise Answer(404, f"{self.command} {path} is not of this Hub")

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Answer(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def readable(self, kind: str, name: str) -> Repository:
        return self.hub.repository(kind, name, self.user)

    def writable(self, kind: str, name: str) -> Repository:
        return self.hub.writable(kind, name, self.user)

    # ---- Answers that are more than JSON ------------------------------------------------------------------------------

    def send_tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
        entries = self.hub.tree(self.readable(kind, name), revision, folder, recursive)
        start = int(query.get("cursor", ["0"])[0])
        link = {}
        if start + PAGE_SIZE < len(entries):
            address = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + PAGE_SIZE}"
            link = {"Link": f'<{address}>; rel="next"'}
        page = json.dumps(entries[start : start + PAGE_SIZE]).encode()
        self.send(200, page, **{"Content-Type": "application/json"}, **link)

    def resolve(self, kind: str, name: str, revision: str, file_path: str) -> None:
        """Where a file is: a small one at an address of its commit, on this host; a large one at the storage."""
        repository = self.readable(kind, name)
        commit = repository.commits(revision)[0]
        headers = {"X-Repo-Commit": commit.oid}
        file = commit.files.get(file_path)
        if file is None:
            raise Answer(404, "Entry not found", "EntryNotFound", **headers)
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            self.send(302, b"", **headers, Location=f"{self.hub.storage}/lfs/{file.sha256}")
        else:
            place = f"/api/resolve-cache/{kind}s/{name}/{commit.oid}/{quote(file_path)}"
            self.send(307, b"", **headers, Location=place)

    def send_small_file(self, kind: str, name: str, revision: str, file_path: str) -> None:
        file = self.readable(kind, name).files(revision)[file_path]
        self.send_bytes(file.content, **{"X-Repo-Commit": revision, "ETag": f'"{file.git_oid}"'})

    def send_large_file(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Answer(400, "only one way of authentication is allowed: the address is signed already")
        if oid not in self.hub.large_files:
            raise Answer(404, "no such object")
        self.send_bytes(self.hub.large_files[oid], ETag=f'"{oid}"')

    def take_large_file(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, "the content does not have the digest that was announced")
        self.hub.large_files[oid] = self.body
        self.send(200, b"")

    def validate_card(self) -> dict:
        card = json.loads(self.body)["content"]
        metadata = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
        try:
            sound = metadata is None or isinstance(yaml.safe_load(metadata.group(1)), dict)
        except yaml.YAMLError:
            sound = False
        if not sound:
            raise Answer(400, "Invalid metadata")
        return {"warnings": [], "errors": []}

    def who(self) -> dict:
        if self.user is None:
            raise Answer(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def verify(self) -> dict:
        if json.loads(self.body)["oid"] not in self.hub.large_files:
            raise Answer(404, "the object was not uploaded")
        return {}

    def point(self, repository: Repository, refs: dict[str, Commit], name: str, at: str) -> dict:
        if name in refs:
            raise Answer(409, f"Reference already exists: {name}")
        refs[name] = repository.commits(at)[0]
        return {}

    def paths_info(self, kind: str, name: str, revision: str) -> list[dict]:
        files = self.readable(kind, name).files(revision)
        asked = parse_qs(self.body.decode()).get("paths", [])
        folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
        return [files[path].listed(path) for path in asked if path in files] + [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in asked if path in folders
        ]

    # ---- Wire -----------------------------------------------------------------------------------------------------------

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send_bytes(self, content: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self.send(206 if wanted else 200, content, **headers, **{"Accept-Ranges": "bytes"})

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def log_message(self, *arguments: object) -> None:
        pass


ROUTES = [
    ("GET", "/api/whoami-v2", Handler.who),
    ("POST", "/api/repos/create", lambda self: self.hub.create(self.user, json.loads(self.body))),
    ("POST", "/api/validate-yaml", Handler.validate_card),
    ("GET", API, lambda self, kind, name: self.hub.info(self.readable(kind, name), "main")),
    (
        "GET",
        API + "/revision/(?P<revision>[^/]+)",
        lambda self, kind, name, revision: self.hub.info(self.readable(kind, name), revision),
    ),
    ("GET", API + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.send_tree),
    ("POST", API + "/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("GET", API + "/refs", lambda self, kind, name: self.hub.refs(self.readable(kind, name))),
    (
        "GET",
        API + "/commits/(?P<revision>[^/]+)",
        lambda self, kind, name, revision: [
            {"id": commit.oid, "title": commit.title, "message": "", "date": commit.date, "authors": []}
            for commit in self.readable(kind, name).commits(revision)
        ],
    ),
    (
        "POST",
        API + "/branch/(?P<branch>[^/]+)",
        lambda self, kind, name, branch: self.point(
            self.writable(kind, name),
            self.writable(kind, name).branches,
            branch,
            json.loads(self.body).get("startingPoint", "main"),
        ),
    ),
    (
        "POST",
        API + "/tag/(?P<revision>[^/]+)",
        lambda self, kind, name, revision: self.point(
            self.writable(kind, name), self.writable(kind, name).tags, json.loads(self.body)["tag"], revision
        ),
    ),
    (
        "POST",
        API + "/preupload/(?P<revision>[^/]+)",
        lambda self, kind, name, revision: self.hub.preupload(
            self.writable(kind, name), revision, json.loads(self.body)
        ),
    ),
    (
        "POST",
        FILE + r"\.git/info/lfs/objects/batch",
        lambda self, kind, name: self.writable(kind, name) and self.hub.lfs_batch(json.loads(self.body)),
    ),
    ("POST", "/lfs-verify", Handler.verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.take_large_file),
    ("GET HEAD", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.send_large_file),
    (
        "POST",
        API + "/commit/(?P<branch>[^/]+)",
        lambda self, kind, name, branch: self.hub.commit(self.writable(kind, name), branch, self.body),
    ),
    (
        "GET HEAD",
        r"/api/resolve-cache/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<file_path>.+)",
        Handler.send_small_file,
    ),
    ("GET HEAD", FILE + "/resolve/(?P<revision>[^/]+)/(?P<file_path>.+)", Handler.resolve),
]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers until the block ends; each has its own ports and nothing in it."""
    hub = Hub()
    handler = type("HandlerOfThisHub", (Handler,), {"hub": hub})
    with serving(handler) as hub.endpoint, serving(handler) as hub.storage:
        yield hub
