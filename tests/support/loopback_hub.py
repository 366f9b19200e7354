"""A model hub on 127.0.0.1, held in memory, for tests that run the real ModelScope client.

It speaks the part of the wire protocol that modelscope 1.40 / modelscope-hub 0.5 use to create a model repository,
upload a folder, commit, tag, list and download; what the client does not look at is left out. A commit never changes
once made, so a tag keeps its tree for ever, and ids and times are the same in every run.

    with LoopbackHub() as hub:
        hub.add_model("someone/tiny", {"v1.0.0": directory})
        subprocess.run([sys.executable, "-c", script], env=hub.environ(tmp_path), check=True)
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from http.cookies import SimpleCookie
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.support.loopback_http import Fault, Refusal, Reply, Request, Server

LARGE = 1 << 20  # seeded files above this stay on disk
PUBLIC, PRIVATE = 5, 1  # the wire encoding of visibility
EPOCH = 1_700_000_000  # time of every first commit; later ones count up from it
OPENAPI_CODES = {401: "InvalidAuthentication", 403: "OperationNotAllowed", 404: "ResourceNotFound"}
# What starts like this in the caller's environment could steer the client away from this hub or from its defaults.
STEERING = ("MODELSCOPE_", "MS_", "HUB_", "HF_", "HUGGING", "API_HTTP_", "UPLOAD_", "INTRA_CLOUD", "INTER_CLOUD")


class Call(NamedTuple):
    """What an endpoint gets to know; `user` is None for a caller without a token."""

    user: str | None
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)


class Commit(NamedTuple):
    id: str
    message: str
    created_at: int
    tree: Mapping[str, tuple[str, int]]  # path -> (sha256, size)


class Repository:
    """Branches and tags are names for commits; a new repository has an empty first commit on master."""

    def __init__(self, repo_id: str, visibility: int = PUBLIC, license: str = "") -> None:
        self.repo_id, self.visibility, self.license = repo_id, visibility, license
        self.owner, self.name = repo_id.split("/")
        self.commits: dict[str, Commit] = {}
        self.branches: dict[str, Commit] = {}
        self.tags: dict[str, Commit] = {}
        self.commit("master", "initial commit", {})

    def commit(self, branch: str, message: str, tree: Mapping[str, tuple[str, int]]) -> Commit:
        identity = json.dumps([self.repo_id, list(self.commits), branch, message, sorted(tree.items())])
        commit_id = hashlib.sha1(identity.encode()).hexdigest()
        commit = Commit(commit_id, message, EPOCH + len(self.commits), MappingProxyType(dict(tree)))
        self.commits[commit_id] = self.branches[branch] = commit
        return commit

    def find(self, revision: str) -> Commit:
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return names[revision]
        raise Refusal(404, f"{self.repo_id} has no revision {revision!r}")


class LoopbackHub:
    """The hub, as a context manager. `requests` lists every request in order of arrival; `fault` may spoil any.

    `fault(index, method, path)` is asked once for each request, where `requests[index]` is the request; it may be
    replaced while the hub runs. The client works in several threads: only with max_workers=1 does an index mean the
    same request in every run.
    """

    def __init__(self, fault: Callable[[int, str, str], Fault | None] | None = None, username: str = "tester") -> None:
        self.fault = fault or (lambda index, method, path: None)
        self.username, self.token = username, "loopback-token"
        self.requests: list[Request] = []
        self.errors: list[BaseException] = []  # bugs of this server; raised on leaving, or they would look like faults
        self.storage: str | None = None  # address of another host that takes blobs, see loopback_storage.py
        self._repositories: dict[str, Repository] = {}
        self._blobs: dict[str, bytes | Path] = {}
        self._lock = threading.RLock()

    def __enter__(self):
        self._server = Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        # The interval bounds how long leaving takes; no request waits for it.
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        if self.errors and kind is None:
            raise self.errors[0]

    def environ(self, home: str | Path, token: str | None = None, **extra: str) -> dict[str, str]:
        """The whole environment of a process that can reach this hub and no other; `extra` goes on top.

        Give it to a subprocess: the client reads many settings when it is imported and caches others, so changing
        os.environ under an imported client proves little. The caller's proxies are removed, and the hub stands in
        as proxy for every other host and refuses: a stray request fails at once and shows in `requests`.
        """
        home = Path(home).absolute()
        home.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(STEERING) and not k.lower().endswith("_proxy")}
        login = {} if token is None else {"MODELSCOPE_API_TOKEN": token}
        return {
            **kept,
            "MODELSCOPE_ENDPOINT": self.endpoint,
            # Some old code puts https:// before this one: that fails, but it fails on this machine.
            "MODELSCOPE_DOMAIN": self.endpoint.removeprefix("http://"),
            "HUB_DATASET_ENDPOINT": self.endpoint,
            "HOME": str(home),
            "MODELSCOPE_HOME": str(home / ".modelscope"),
            "MODELSCOPE_CACHE": str(home / "modelscope-cache"),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "HF_HOME": str(home / "hf"),
            "HF_HUB_OFFLINE": "1",
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), self.endpoint),
            **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
            **login,
            **extra,
        }

    def add_model(self, repo_id: str, revisions: Mapping[str, str | Path], private: bool = False) -> Repository:
        """Seed a repository without the client: each revision is a tag on a commit of its directory, master the last.

        Large files are read when they are asked for, so the directories must stay as they are.
        """
        repository = Repository(repo_id, PRIVATE if private else PUBLIC)
        for tag, directory in revisions.items():
            files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
            tree = {path.relative_to(directory).as_posix(): self._store_file(path) for path in files}
            repository.tags[tag] = repository.commit("master", f"seed {tag}", tree)
        self._repositories[repo_id] = repository
        return repository

    def tree(self, repo_id: str, revision: str = "master") -> dict[str, tuple[str, int]]:
        """path -> (sha256, size) at a revision, seen from inside."""
        return dict(self._repositories[repo_id].find(revision).tree)

    def repository(self, repo_id: str) -> Repository:
        """The repository itself, to be changed behind the client's back."""
        return self._repositories[repo_id]

    def stores(self, sha256: str) -> bool:
        """Whether a blob is there."""
        return sha256 in self._blobs

    def commits(self, repo_id: str) -> list[str]:
        """Messages of a repository's commits, oldest first."""
        return [commit.message for commit in self._repositories[repo_id].commits.values()]

    def tags(self, repo_id: str) -> list[str]:
        """Names of a repository's tags; none where there is no repository."""
        return list(self._repositories[repo_id].tags) if repo_id in self._repositories else []

    def visibility(self, repo_id: str) -> int:
        """PUBLIC or PRIVATE."""
        return self._repositories[repo_id].visibility

    def see(self, request: Request) -> Fault | None:
        with self._lock:
            index = len(self.requests)
            self.requests.append(request)
        return self.fault(index, request.method, request.path)  # outside the lock: a fault may wait for another request

    def answer(self, request: Request, body: bytes) -> Reply:
        """Find the endpoint, run it alone, and wrap its result as the surface asked for does."""
        url = urlsplit(request.path)
        openapi = url.path.startswith("/openapi/")
        try:
            data = self._dispatch(request, url.path, Call(None, dict(parse_qsl(url.query)), request.headers, body))
        except Refusal as refusal:
            return self.refuse(refusal, openapi)
        if isinstance(data, Reply):
            return data
        wrapped = {"success": True, "data": data} if openapi else {"Code": 200, "Success": True, "Data": data}
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(wrapped).encode())

    def refuse(self, refusal: Refusal, openapi: bool) -> Reply:
        if openapi:
            code = OPENAPI_CODES.get(refusal.status, "Other")
            wrapped = {"success": False, "code": code, "message": str(refusal)}
        else:
            wrapped = {"Code": refusal.code, "Success": False, "Message": str(refusal)}
        headers = {"Content-Type": "application/json", **refusal.headers}
        return Reply(refusal.status, headers, json.dumps(wrapped).encode())

    def _dispatch(self, request: Request, path: str, call: Call) -> dict | Reply:
        if not request.path.startswith("/"):
            raise Refusal(403, f"no way from here to {request.path}")  # asked as a proxy, see environ()
        call = call._replace(user=self._user(request.headers))
        for method, pattern, endpoint in ROUTES:
            match = pattern.fullmatch(unquote(path))
            if match and method == request.method:
                with self._lock:
                    return endpoint(self, call, **match.groupdict())
        raise Refusal(404, f"no endpoint {request.method} {path}")

    def _user(self, headers: Mapping[str, str]) -> str | None:
        cookie = SimpleCookie(headers.get("cookie", "")).get("m_session_id")
        token = headers.get("authorization", "").removeprefix("Bearer ") or (cookie.value if cookie else "")
        if token not in ("", self.token):
            raise Refusal(401, "the token is not valid")
        return self.username if token else None

    def _readable(self, call: Call, repo_id: str) -> Repository:
        if repo_id not in self._repositories:
            raise Refusal(404, f"no model {repo_id}")
        repository = self._repositories[repo_id]
        if repository.visibility != PUBLIC and call.user != repository.owner:
            raise Refusal(403, f"no right to read {repo_id}")
        return repository

    def _writable(self, call: Call, repo_id: str) -> Repository:
        self._require(call, repo_id.split("/")[0])
        return self._readable(call, repo_id)

    def _require(self, call: Call, owner: str | None = None) -> None:
        if call.user is None:
            raise Refusal(401, "a token is required")
        if call.user != (owner or call.user):
            raise Refusal(403, f"{call.user} has no right to write under {owner}")

    def store(self, data: bytes) -> tuple[str, int]:
        sha256 = hashlib.sha256(data).hexdigest()
        self._blobs[sha256] = data
        return sha256, len(data)

    def _store_file(self, path: Path) -> tuple[str, int]:
        size = path.stat().st_size
        if size <= LARGE:
            return self.store(path.read_bytes())
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(LARGE):
                digest.update(chunk)
        self._blobs[digest.hexdigest()] = path.absolute()
        return digest.hexdigest(), size

    def _read(self, sha256: str, start: int, stop: int) -> bytes:
        source = self._blobs[sha256]
        if isinstance(source, bytes):
            return source[start:stop]
        with source.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    # Endpoints: each runs under the lock and returns what goes under Data, or under data on the openapi surface.

    def _login(self, call: Call) -> dict:
        if call.json()["AccessToken"] != self.token:
            raise Refusal(400, "the token is not valid", code=10010103009)  # a 400 with this code is what hubs send
        return {"AccessToken": "git-token", "Username": self.username, "Email": f"{self.username}@loopback.invalid"}

    def _whoami(self, call: Call) -> dict:
        self._require(call)
        return {"username": call.user, "email": f"{call.user}@loopback.invalid"}

    def _region(self, call: Call) -> dict:
        return {"InternalRegionQueryAddress": ""}  # outside every cloud region: the client asks no further

    def _create(self, call: Call) -> dict:
        wish = call.json()
        self._require(call, wish["Path"])
        repo_id = f"{wish['Path']}/{wish['Name']}"
        if repo_id in self._repositories:
            raise Refusal(400, f"{repo_id} already exists", code=10010101001)
        self._repositories[repo_id] = Repository(repo_id, wish.get("Visibility", PUBLIC), wish.get("License", ""))
        return self._describe(call, repo_id)

    def _describe(self, call: Call, repo_id: str) -> dict:
        found = self._readable(call, repo_id)  # the client reads both surfaces' spellings of these facts
        private = found.visibility != PUBLIC
        return {"id": repo_id, "owner": found.owner, "name": found.name, "private": private, "license": found.license}

    def _lfs_batch(self, call: Call, repo_id: str) -> dict:
        self._writable(call, repo_id)
        objects = [{"oid": wish["oid"], "size": wish["size"]} for wish in call.json()["objects"]]
        for item in objects:
            if item["oid"] not in self._blobs:  # without an upload address the client takes a blob as stored
                item["actions"] = {"upload": {"href": f"{self.storage or self.endpoint}/lfs/{repo_id}/{item['oid']}"}}
        return {"objects": objects}

    def _lfs_put(self, call: Call, repo_id: str, oid: str) -> dict:
        self._writable(call, repo_id)
        if hashlib.sha256(call.body).hexdigest() != oid:
            raise Refusal(400, f"the bytes sent are not those of {oid}")
        self.store(call.body)
        return {}

    def _commit(self, call: Call, repo_id: str, branch: str) -> dict:
        repository, wish = self._writable(call, repo_id), call.json()
        if branch not in repository.branches:
            raise Refusal(404, f"{repo_id} has no branch {branch!r}")
        tree = dict(repository.branches[branch].tree)
        for action in wish["actions"]:
            path = action["path"]
            if action["action"] == "delete":
                if tree.pop(path, None) is None:
                    raise Refusal(400, f"{path} is not on {branch}")
            elif action["type"] == "lfs":
                if action["sha256"] not in self._blobs:
                    raise Refusal(400, f"{path}: its blob was not uploaded")
                tree[path] = (action["sha256"], action["size"])
            else:
                tree[path] = self.store(base64.b64decode(action["content"]))
        return {"Id": repository.commit(branch, wish["commit_message"], tree).id}

    def _tag(self, call: Call, repo_id: str) -> dict:
        repository, wish = self._writable(call, repo_id), call.json()
        commit = repository.find(wish["Ref"])
        if wish["TagName"] in {**repository.tags, **repository.branches}:
            raise Refusal(409, f"revision {wish['TagName']} already exists")
        repository.tags[wish["TagName"]] = commit
        return {"TagName": wish["TagName"], "Revision": commit.id}

    def _revisions(self, call: Call, repo_id: str) -> dict:
        found = self._readable(call, repo_id)
        listed = {
            kind: [{"Revision": name, "CreatedAt": commit.created_at} for name, commit in names.items()]
            for kind, names in (("Branches", found.branches), ("Tags", found.tags))
        }
        return {"RevisionMap": listed}

    def _files(self, call: Call, repo_id: str) -> dict:
        commit = self._readable(call, repo_id).find(call.query.get("Revision", "master"))
        root = call.query.get("Root", "").strip("/")
        prefix = f"{root}/" if root else ""
        # Directories are entries too, as on the public hub: who compares a listing with files has to skip them.
        found = {parent.as_posix(): ("tree", "", 0) for path in commit.tree for parent in Path(path).parents[:-1]}
        found.update({path: ("blob", sha256, size) for path, (sha256, size) in commit.tree.items()})
        shown = [path for path in sorted(found) if path.startswith(prefix)]
        if root and not shown:
            raise Refusal(404, f"{repo_id} has no directory {root!r}")
        if call.query.get("Recursive") != "True":
            shown = [path for path in shown if "/" not in path[len(prefix) :]]
        return {"Files": [dict(zip(("Type", "Sha256", "Size"), found[path], strict=True), Path=path) for path in shown]}

    def _file(self, call: Call, repo_id: str) -> Reply:
        path = call.query["FilePath"]
        commit = self._readable(call, repo_id).find(call.query.get("Revision", "master"))
        if path not in commit.tree:
            raise Refusal(404, f"{repo_id} has no file {path!r} at that revision")
        sha256, size = commit.tree[path]
        headers = {"Accept-Ranges": "bytes", "X-Linked-ETag": f'"{sha256}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
        if not asked:
            return Reply(200, headers, self._read(sha256, 0, size))
        start, stop = int(asked[1]), min(size, int(asked[2] or size) + 1)
        if start >= stop:
            raise Refusal(416, "nothing in that range", headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Reply(206, headers, self._read(sha256, start, stop))


def _route(method: str, path: str, endpoint: Callable) -> tuple[str, re.Pattern, Callable]:
    return method, re.compile(path.replace("{repo}", "(?P<repo_id>[^/]+/[^/]+)")), endpoint


ROUTES = [
    _route("POST", "/api/v1/login", LoopbackHub._login),
    _route("GET", "/openapi/v1/users/me", LoopbackHub._whoami),
    _route("GET", "/api/v1/repos/internalAccelerationInfo", LoopbackHub._region),
    _route("POST", "/api/v1/models", LoopbackHub._create),
    _route("GET", "/(?:api|openapi)/v1/models/{repo}", LoopbackHub._describe),
    _route("POST", "/api/v1/repos/models/{repo}/info/lfs/objects/batch", LoopbackHub._lfs_batch),
    _route("PUT", "/lfs/{repo}/(?P<oid>[0-9a-f]{64})", LoopbackHub._lfs_put),
    _route("POST", "/api/v1/repos/models/{repo}/commit/(?P<branch>.+)", LoopbackHub._commit),
    _route("POST", "/api/v1/models/{repo}/repo/tag", LoopbackHub._tag),
    _route("GET", "/api/v1/models/{repo}/revisions", LoopbackHub._revisions),
    _route("GET", "/api/v1/models/{repo}/repo/files", LoopbackHub._files),
    _route("GET", "/api/v1/models/{repo}/repo", LoopbackHub._file),
]
