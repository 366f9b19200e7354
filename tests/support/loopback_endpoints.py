"""The endpoints of the loopback hub, as functions of the hub and a call.

Each runs under the hub's lock and returns what goes under Data, or under data on the openapi surface.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support.loopback_http import Refusal, Reply
from tests.support.loopback_repository import PUBLIC, Repository

if TYPE_CHECKING:
    from tests.support.loopback_hub import LoopbackHub


class Call(NamedTuple):
    """A request as an endpoint sees it; `user` is None for a caller without a token."""

    user: str | None
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body)


def require(call: Call, owner: str | None = None) -> None:
    """Refuse a call without a token, or of somebody else than `owner`."""
    if call.user is None:
        raise Refusal(401, "a token is required")
    if call.user != (owner or call.user):
        raise Refusal(403, f"{call.user} has no right to write under {owner}")


def login(hub: LoopbackHub, call: Call) -> dict:
    if call.json()["AccessToken"] != hub.token:
        raise Refusal(400, "the token is not valid", code=10010103009)  # a 400 with this code is what hubs send
    return {"AccessToken": "git-token", "Username": hub.username, "Email": f"{hub.username}@loopback.invalid"}


def whoami(hub: LoopbackHub, call: Call) -> dict:
    require(call)
    return {"username": call.user, "email": f"{call.user}@loopback.invalid"}


def region(hub: LoopbackHub, call: Call) -> dict:
    return {"InternalRegionQueryAddress": ""}  # outside every cloud region: the client asks no further


def create(hub: LoopbackHub, call: Call) -> dict:
    wish = call.json()
    require(call, wish["Path"])
    repo_id = f"{wish['Path']}/{wish['Name']}"
    if repo_id in hub.repositories:
        raise Refusal(400, f"{repo_id} already exists", code=10010101001)
    hub.repositories[repo_id] = Repository(repo_id, wish.get("Visibility", PUBLIC), wish.get("License", ""))
    return describe(hub, call, repo_id)


def describe(hub: LoopbackHub, call: Call, repo_id: str) -> dict:
    model = hub.readable(call, repo_id)  # the client reads both surfaces' spellings of these facts
    private = model.visibility != PUBLIC
    return {"id": repo_id, "owner": model.owner, "name": model.name, "private": private, "license": model.license}


def lfs_batch(hub: LoopbackHub, call: Call, repo_id: str) -> dict:
    hub.writable(call, repo_id)
    objects = [{"oid": wish["oid"], "size": wish["size"]} for wish in call.json()["objects"]]
    for item in objects:
        if item["oid"] not in hub.blobs:  # without an upload address the client takes a blob as stored
            item["actions"] = {"upload": {"href": f"{hub.storage or hub.endpoint}/lfs/{repo_id}/{item['oid']}"}}
    return {"objects": objects}


def lfs_put(hub: LoopbackHub, call: Call, repo_id: str, oid: str) -> dict:
    hub.writable(call, repo_id)
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refusal(400, f"the bytes sent are not those of {oid}")
    hub.blobs.add(call.body)
    return {}


def commit(hub: LoopbackHub, call: Call, repo_id: str, branch: str) -> dict:
    repository, wish = hub.writable(call, repo_id), call.json()
    if branch not in repository.branches:
        raise Refusal(404, f"{repo_id} has no branch {branch!r}")
    tree = dict(repository.branches[branch].tree)
    for action in wish["actions"]:
        path = action["path"]
        if action["action"] == "delete":
            if tree.pop(path, None) is None:
                raise Refusal(400, f"{path} is not on {branch}")
        elif action["type"] == "lfs":
            if action["sha256"] not in hub.blobs:
                raise Refusal(400, f"{path}: its blob was not uploaded")
            tree[path] = (action["sha256"], action["size"])
        else:
            tree[path] = hub.blobs.add(base64.b64decode(action["content"]))
    return {"Id": repository.commit(branch, wish["commit_message"], tree).id}


def tag(hub: LoopbackHub, call: Call, repo_id: str) -> dict:
    repository, wish = hub.writable(call, repo_id), call.json()
    commit = repository.find(wish["Ref"])
    if wish["TagName"] in {**repository.tags, **repository.branches}:
        raise Refusal(409, f"revision {wish['TagName']} already exists")
    repository.tags[wish["TagName"]] = commit
    return {"TagName": wish["TagName"], "Revision": commit.id}


def revisions(hub: LoopbackHub, call: Call, repo_id: str) -> dict:
    repository = hub.readable(call, repo_id)
    listed = {
        kind: [{"Revision": name, "CreatedAt": commit.created_at} for name, commit in names.items()]
        for kind, names in (("Branches", repository.branches), ("Tags", repository.tags))
    }
    return {"RevisionMap": listed}


def files(hub: LoopbackHub, call: Call, repo_id: str) -> dict:
    commit = hub.readable(call, repo_id).find(call.query.get("Revision", "master"))
    root = call.query.get("Root", "").strip("/")
    prefix = f"{root}/" if root else ""
    # Directories are entries too, as on the public hub: who compares a listing with files has to skip them.
    entries = {parent.as_posix(): ("tree", "", 0) for path in commit.tree for parent in Path(path).parents[:-1]}
    entries.update({path: ("blob", sha256, size) for path, (sha256, size) in commit.tree.items()})
    shown = [path for path in sorted(entries) if path.startswith(prefix)]
    if root and not shown:
        raise Refusal(404, f"{repo_id} has no directory {root!r}")
    if call.query.get("Recursive") != "True":
        shown = [path for path in shown if "/" not in path[len(prefix) :]]
    return {"Files": [dict(zip(("Type", "Sha256", "Size"), entries[path], strict=True), Path=path) for path in shown]}


def file(hub: LoopbackHub, call: Call, repo_id: str) -> Reply:
    path = call.query["FilePath"]
    commit = hub.readable(call, repo_id).find(call.query.get("Revision", "master"))
    if path not in commit.tree:
        raise Refusal(404, f"{repo_id} has no file {path!r} at that revision")
    sha256, size = commit.tree[path]
    headers = {"Accept-Ranges": "bytes", "X-Linked-ETag": f'"{sha256}"'}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("range", ""))
    if not asked:
        return Reply(200, headers, hub.blobs.read(sha256, 0, size))
    start, stop = int(asked[1]), min(size, int(asked[2] or size) + 1)
    if start >= stop:
        raise Refusal(416, "nothing in that range", headers={"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Reply(206, headers, hub.blobs.read(sha256, start, stop))


def route(method: str, path: str, endpoint: Callable) -> tuple[str, re.Pattern, Callable]:
    return method, re.compile(path.replace("{repo}", "(?P<repo_id>[^/]+/[^/]+)")), endpoint


ROUTES = [
    route("POST", "/api/v1/login", login),
    route("GET", "/openapi/v1/users/me", whoami),
    route("GET", "/api/v1/repos/internalAccelerationInfo", region),
    route("POST", "/api/v1/models", create),
    route("GET", "/(?:api|openapi)/v1/models/{repo}", describe),
    route("POST", "/api/v1/repos/models/{repo}/info/lfs/objects/batch", lfs_batch),
    route("PUT", "/lfs/{repo}/(?P<oid>[0-9a-f]{64})", lfs_put),
    route("POST", "/api/v1/repos/models/{repo}/commit/(?P<branch>.+)", commit),
    route("POST", "/api/v1/models/{repo}/repo/tag", tag),
    route("GET", "/api/v1/models/{repo}/revisions", revisions),
    route("GET", "/api/v1/models/{repo}/repo/files", files),
    route("GET", "/api/v1/models/{repo}/repo", file),
]
