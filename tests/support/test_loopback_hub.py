"""The loopback hub against the real client, and its own promises."""

import hashlib
import http.client
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.loopback_http import Fault
from tests.support.loopback_hub import LoopbackHub

WEIGHTS = random.Random(0).randbytes(300_000)  # above 64 KiB, from where on the client sends blobs apart from commits
README = b"# tiny\n"
CONFIGURATION = json.dumps({"framework": "pytorch", "task": "text-generation", "pipeline": {"type": "echo"}}).encode()
FILES = {"README.md": README, "configuration.json": CONFIGURATION, "weights/model.safetensors": WEIGHTS}


def write(directory, files):
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def read(directory):
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


def client(env, script, *arguments):
    """Run a script in a process of its own, since the client reads its environment on import; it prints its result."""
    command = [sys.executable, "-c", "import json, sys\n" + script, *map(str, arguments)]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


DOWNLOAD = """
from modelscope.hub.snapshot_download import snapshot_download
results = []
for wanted in sys.argv[1:]:
    repo, revision = wanted.split("@")
    try:
        results.append(snapshot_download(repo, revision=revision))
    except Exception as error:
        results.append(f"{type(error).__module__}.{type(error).__name__}: {error}")
print(json.dumps(results))
"""

PUBLISH = """
from modelscope.hub.api import HubApi
from modelscope.hub.snapshot_download import snapshot_download
from pathlib import Path
api, repo, folder = HubApi()._api, "tester/tiny", Path(sys.argv[1])
who = api.whoami().username
api.create_repo(repo, "model", visibility="private")
private = int(api.get_repo(repo, "model").visibility) == 1
api.upload_folder(repo, "model", folder, use_cache=False, disable_tqdm=True)
api.create_repo_tag(repo, "model", "v1.0.0")
try:
    api.create_repo_tag(repo, "model", "v1.0.0")
except Exception as error:
    again = type(error).__name__
(folder / "README.md").write_text("# changed\\n")
api.upload_folder(repo, "model", folder, use_cache=False, disable_tqdm=True)
listed = [[f.path, f.size, f.sha256] for f in api.list_repo_files(repo, "model", revision="v1.0.0") if f.type == "blob"]
revisions = [entry["Revision"] for entry in api.list_repo_revisions(repo, "model")]
paths = [snapshot_download(repo, revision=revision) for revision in ("v1.0.0", "master")]
print(json.dumps([who, private, again, revisions, listed, paths]))
"""

PIPELINE = """
import os
from modelscope.pipelines import pipeline
from modelscope.pipelines.builder import PIPELINES
class Echo:
    def __init__(self, model, **kwargs):
        self.model = model
PIPELINES.register_module("text-generation", module_name="echo", module_cls=Echo)
print(json.dumps(pipeline("text-generation", model="someone/tiny", model_revision="v1.0.2").model))
"""


def strays(hub):
    return [request for request in hub.requests if not request.path.startswith("/")]


def test_a_tag_keeps_its_content_through_the_whole_cycle(tmp_path):
    folder = write(tmp_path / "folder", FILES)
    with LoopbackHub() as hub:
        environment = hub.environ(tmp_path / "home", token=hub.token)
        who, private, again, revisions, listed, paths = client(environment, PUBLISH, folder)
        assert (who, private, again) == ("tester", True, "AlreadyExistsError")
        assert revisions == ["v1.0.0", "master"]
        expected = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in FILES.items()}
        assert {path: (sha256, size) for path, size, sha256 in listed} == expected == hub.tree("tester/tiny", "v1.0.0")
        assert read(paths[0]) == FILES
        assert read(paths[1]) == {**FILES, "README.md": b"# changed\n"}
        assert len([request for request in hub.requests if request.method == "PUT"]) == 1, "the blob is known by then"
        assert not strays(hub)


def test_who_may_read_what(tmp_path):
    folder = write(tmp_path / "folder", FILES)
    with LoopbackHub() as hub:
        for repo_id, private in (("someone/open", False), ("tester/closed", True), ("someone/closed", True)):
            hub.add_model(repo_id, {"v1.0.0": folder}, private=private)
        anonymous, mine = hub.environ(tmp_path / "a"), hub.environ(tmp_path / "b", token=hub.token)
        wrong = hub.environ(tmp_path / "c", token="no-such-token")
        wishes = ("someone/open@v1.0.0", "tester/closed@v1.0.0", "someone/open@v9.9.9", "someone/none@v1.0.0")
        path, closed, no_revision, no_model = client(anonymous, DOWNLOAD, *wishes)
        assert read(path) == FILES
        assert "403" in closed
        for error in (no_revision, no_model):
            assert error.startswith("requests.exceptions.HTTPError") and "404" in error
        path, foreign = client(mine, DOWNLOAD, "tester/closed@v1.0.0", "someone/closed@v1.0.0")
        assert read(path) == FILES
        assert "403" in foreign
        assert "401" in client(wrong, DOWNLOAD, "someone/open@v1.0.0")[0]
        assert not strays(hub)


def test_the_client_survives_faults_and_resumes(tmp_path):
    folder = write(tmp_path / "folder", {kind: WEIGHTS for kind in ("drop", "cut", "lost", "status")})
    spoilt = []

    def once_per_file(index, method, path):
        kind = path.rpartition("FilePath=")[2]
        if "FilePath=" not in path or kind in spoilt:
            return None
        spoilt.append(kind)
        return Fault(kind, status=503, headers={"Retry-After": "0"})

    with LoopbackHub(fault=once_per_file) as hub:
        hub.add_model("someone/tiny", {"v1.0.0": folder})
        assert read(client(hub.environ(tmp_path / "home"), DOWNLOAD, "someone/tiny@v1.0.0")[0]) == read(folder)
        assert sorted(spoilt) == ["cut", "drop", "lost", "status"]
        ranges = {r.path.rpartition("=")[2]: r.headers["range"] for r in hub.requests if "range" in r.headers}
        assert ranges == {"cut": f"bytes={len(WEIGHTS) // 2}-"}


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="modelscope.pipelines cannot be imported without")
def test_a_pipeline_finds_its_model_by_hub_id_and_revision(tmp_path):
    old, new = write(tmp_path / "old", FILES), write(tmp_path / "new", {"README.md": b"# no configuration\n"})
    with LoopbackHub() as hub:
        hub.add_model("someone/tiny", {"v1.0.2": old, "v2.0.0": new})
        assert read(client(hub.environ(tmp_path / "home"), PIPELINE)) == FILES
        assert not strays(hub)


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


def ask(connection, method, path, body=None, token=None, **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, body, headers, **options)
    answer = connection.getresponse()
    return answer.status, answer.read()


@pytest.fixture
def connection(hub):
    connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    yield connection
    connection.close()


def test_writing_needs_the_right_token_and_the_right_owner(hub, connection):
    mine, foreign = (json.dumps({"Path": owner, "Name": "tiny"}) for owner in ("tester", "someone"))
    assert ask(connection, "POST", "/api/v1/models", mine)[0] == 401
    assert ask(connection, "POST", "/api/v1/models", mine, token="no-such-token")[0] == 401
    assert ask(connection, "POST", "/api/v1/models", foreign, token=hub.token)[0] == 403
    assert ask(connection, "POST", "/api/v1/models", mine, token=hub.token)[0] == 200
    status, body = ask(connection, "POST", "/api/v1/models", mine, token=hub.token)
    assert (status, json.loads(body)["Code"]) == (400, 10010101001)


def test_chunked_and_large_bodies_on_one_connection(hub, connection, tmp_path):
    large = random.Random(1).randbytes((1 << 20) + 1)  # just large enough to stay on disk
    hub.add_model("tester/tiny", {"v1": write(tmp_path, {"a/large.bin": large})})
    local = connection.connect() or connection.sock.getsockname()
    path = f"/lfs/tester/tiny/{hashlib.sha256(WEIGHTS).hexdigest()}"
    pieces = (WEIGHTS[at : at + 70_000] for at in range(0, len(WEIGHTS), 70_000))
    assert ask(connection, "PUT", path, pieces, hub.token, encode_chunked=True)[0] == 200
    assert ask(connection, "PUT", path, b"other bytes", hub.token)[0] == 400
    assert ask(connection, "GET", "/api/v1/models/tester/tiny/repo?Revision=v1&FilePath=a/large.bin") == (200, large)
    assert connection.sock.getsockname() == local, "kept alive"


def test_every_fault_spoils_exactly_the_request_it_names(hub, connection):
    create = ("POST", "/api/v1/models", '{"Path": "tester", "Name": "tiny"}', hub.token)
    fate = {}
    for kind, created in (("drop", False), ("cut", False), ("status", False), ("lost", True)):
        hub.fault = lambda index, method, path, kind=kind: Fault(kind, 429, {"Retry-After": "7"}) if not index else None
        hub.requests.clear()
        try:
            fate[kind] = ask(connection, *create)[0]
        except (ConnectionError, http.client.HTTPException):
            fate[kind] = "no answer"
            connection.close()
        assert ask(connection, "GET", "/api/v1/models/tester/tiny")[0] == (200 if created else 404), kind
    assert fate == {"drop": "no answer", "cut": "no answer", "status": 429, "lost": "no answer"}


def test_no_way_out_and_nothing_left_behind(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "a real one")
    monkeypatch.setenv("ALL_PROXY", "http://192.0.2.1:3128")
    monkeypatch.setenv("HF_TOKEN", "a real one")
    environment = hub.environ(tmp_path)
    assert not {"MODELSCOPE_API_TOKEN", "ALL_PROXY", "HF_TOKEN"} & set(environment)
    script = "import urllib.request, urllib.error\ntry:\n urllib.request.urlopen('https://www.modelscope.cn/')\n"
    assert "403" in client(environment, script + "except urllib.error.URLError as e:\n print(json.dumps(str(e)))")
    assert [request[:2] for request in strays(hub)] == [("CONNECT", "www.modelscope.cn:443")]


def test_the_port_is_free_afterwards_and_bugs_are_not_swallowed():
    with LoopbackHub() as hub:
        connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
        assert ask(connection, "GET", "/openapi/v1/users/me", token=hub.token)[0] == 200
    assert connection.sock.recv(1) == b"", "an idle connection is closed too"
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        connection.connect()
    with pytest.raises(ZeroDivisionError), LoopbackHub(fault=lambda index, method, path: 1 / 0) as hub:
        connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
        with pytest.raises(http.client.RemoteDisconnected):
            ask(connection, "GET", "/openapi/v1/users/me")
