"""What tests of publishing share: a hub, a checkpoint that may be changed, and what was sent."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from modelscope_dolly.checkpoint import manifest
from tests.support.layouts import read_state
from tests.support.loopback_hub import LoopbackHub
from train.publish import main
from train.publishing import hub_client
from train.publishing.staging import list_files

ID = "tester/tiny"


@pytest.fixture(name="alone", autouse=True)
def alone_fixture(monkeypatch, tmp_path):
    """Nothing of the developer's account is read or written, and retries do not wait."""
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setattr(hub_client, "PAUSES", (0, 0))


@pytest.fixture(name="server")
def server_fixture():
    with LoopbackHub() as running:
        yield running


@pytest.fixture(name="final")
def final_fixture(checkpoint_dir, tmp_path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "run" / "final"))


def publish(server: LoopbackHub, directory: Path, revision: str = "v1.0.0", *flags: str, model_id: str = ID) -> int:
    """`python -m train.publish` in this process."""
    fixed = ["--endpoint", server.endpoint, "--token", server.token]
    return main([str(directory), "--model-id", model_id, "--revision", revision, *fixed, *flags])


def staged_tree(directory: Path) -> dict[str, tuple[str, int]]:
    """The staged directory beside a checkpoint, in the form of LoopbackHub.tree."""
    return {name: (sha256, size) for name, (size, sha256) in list_files(directory.with_name("final.staged")).items()}


def retrain(final: Path) -> None:
    """Other weights, another manifest: what a second run would leave."""
    state = {name: tensor + 0.01 for name, tensor in read_state(final).items()}
    save_file(state, final / "model.safetensors", metadata={"format": "pt"})
    manifest.write(final)


def sent(server: LoopbackHub, since: int = 0) -> list[str]:
    """What was written to the hub: blobs, commits, tags, repositories."""
    return [f"{r.method} {r.path}" for r in server.requests[since:] if r.method != "GET" and "/batch" not in r.path]
