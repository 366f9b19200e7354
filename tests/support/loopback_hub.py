"""A model hub on 127.0.0.1, held in memory, for tests that run the real ModelScope client.

It speaks the part of the wire protocol that modelscope 1.40 / modelscope-hub 0.5 use to create a model repository,
upload a folder, commit, tag, list and download; what the client does not look at is left out. A commit never changes
once made, so a tag keeps its tree for ever, and ids and times are the same in every run.

    with LoopbackHub() as hub:
        hub.add_model("someone/tiny", {"v1.0.0": directory})
        subprocess.run([sys.executable, "-c", script], env=hub.environ(tmp_path), check=True)
"""

import json
import os
import threading
from collections.abc import Callable, Mapping
from http.cookies import SimpleCookie
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.support.loopback_endpoints import ROUTES, Call, require
from tests.support.loopback_http import Fault, Refusal, Reply, Request, Server
from tests.support.loopback_repository import PRIVATE, PUBLIC, BlobStore, Repository

OPENAPI_CODES = {401: "InvalidAuthentication", 403: "OperationNotAllowed", 404: "ResourceNotFound"}
# What starts like this in the caller's environment could steer the client away from this hub or from its defaults.
STEERING = ("MODELSCOPE_", "MS_", "HUB_", "HF_", "HUGGING", "API_HTTP_", "UPLOAD_", "INTRA_CLOUD", "INTER_CLOUD")


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
        self.repositories: dict[str, Repository] = {}
        self.blobs = BlobStore()
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
            tree = {path.relative_to(directory).as_posix(): self.blobs.add_file(path) for path in files}
            repository.tags[tag] = repository.commit("master", f"seed {tag}", tree)
        self.repositories[repo_id] = repository
        return repository

    def tree(self, repo_id: str, revision: str = "master") -> dict[str, tuple[str, int]]:
        """path -> (sha256, size) at a revision, seen from inside."""
        return dict(self.repositories[repo_id].find(revision).tree)

    def commits(self, repo_id: str) -> list[str]:
        """Messages of a repository's commits, oldest first."""
        return [commit.message for commit in self.repositories[repo_id].commits.values()]

    def tags(self, repo_id: str) -> list[str]:
        """Names of a repository's tags; none where there is no repository."""
        return list(self.repositories[repo_id].tags) if repo_id in self.repositories else []

    def visibility(self, repo_id: str) -> int:
        """PUBLIC or PRIVATE."""
        return self.repositories[repo_id].visibility

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

    def readable(self, call: Call, repo_id: str) -> Repository:
        if repo_id not in self.repositories:
            raise Refusal(404, f"no model {repo_id}")
        repository = self.repositories[repo_id]
        if repository.visibility != PUBLIC and call.user != repository.owner:
            raise Refusal(403, f"no right to read {repo_id}")
        return repository

    def writable(self, call: Call, repo_id: str) -> Repository:
        require(call, repo_id.split("/")[0])
        return self.readable(call, repo_id)
