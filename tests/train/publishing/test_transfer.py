"""Who gets to see the token, and how progress is reported."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from modelscope_dolly.errors import PublishError
from tests.support.loopback_http import Fault
from tests.support.loopback_storage import LoopbackStorage
from tests.support.publishing import ID, alone_fixture, final_fixture, publish, server_fixture, staged_tree  # noqa: F401
from train.publish import main
from train.publishing import transfer
from train.publishing.hub_client import HubClient, guard
from train.publishing.publish_settings import PublishSettings


@pytest.mark.parametrize("token", [None, "", "two words", "naïve"])
def test_without_a_usable_token_nothing_is_sent(final, server, capsys, token):
    flags = [] if token is None else ["--token", token]
    command = [str(final), "--model-id", ID, "--revision", "v1", "--endpoint", server.endpoint, *flags]
    assert main(command) == 2
    assert "token" in capsys.readouterr().err and server.requests == []


def test_the_token_of_modelscope_login_is_enough(final, server):
    from modelscope_hub import HubConfig

    HubConfig(endpoint=server.endpoint).save_token(server.token)
    assert main([str(final), "--model-id", ID, "--revision", "v1.0.0", "--endpoint", server.endpoint]) == 0
    assert server.tree(ID, "v1.0.0") == staged_tree(final)


def test_the_token_stays_away_from_another_storage_host(final, server, capsys):
    with LoopbackStorage(server) as storage:
        assert publish(server, final) == 0
        [headers] = storage.requests
        assert server.token not in str(headers) and "authorization" not in headers and "cookie" not in headers
    assert server.tree(ID, "v1.0.0") == staged_tree(final)


def test_a_storage_host_that_needs_the_token_gets_it_only_when_told(final, server, capsys):
    with LoopbackStorage(server, needs_token=True) as storage:
        assert publish(server, final) == 1
        told = capsys.readouterr().err
        assert (
            "refused a file that was sent without your token (403). Trying again does not help: if this host " in told
        )
        assert told.endswith(f"pass --trust-storage-host {storage.host}\n")
        assert server.token not in str(storage.requests)
        assert publish(server, final, "v1.0.0", "--trust-storage-host", storage.host) == 0
        assert server.token in storage.requests[-1]["authorization"]


def test_a_redirect_does_not_carry_the_token_elsewhere(final, server):
    with LoopbackStorage(server) as elsewhere:
        for index in range(4):
            elsewhere_url = f"http://{elsewhere.host}/elsewhere"
            redirect = Fault("status", 302, {"Location": elsewhere_url})
            server.requests.clear()
            server.fault = lambda at, method, path, index=index, fault=redirect: fault if at == index else None
            publish(server, final, f"v1.0.{index}")
        assert len(elsewhere.requests) >= 3
        assert server.token not in str(elsewhere.requests)


def test_a_hub_that_quotes_the_token_does_not_get_it_printed(final, server, capsys):
    server.fault = lambda index, method, path: Fault("status", 403, message=f"who is {server.token}?")
    assert publish(server, final) == 1
    told = capsys.readouterr()
    assert "who is ***?" in told.err and server.token not in told.out + told.err


def test_another_scheme_or_port_is_another_host(server):
    hub = HubClient(PublishSettings(ID, "v1", trust_storage_host=("lfs.hub.example",)), "t", "https://hub.example")
    assert hub.trusts("https://hub.example/x") and hub.trusts("https://HUB.example:443/x")
    assert hub.trusts("https://lfs.hub.example/x")
    for url in ("http://hub.example/x", "https://hub.example:8443/x", "https://hub.example.evil.example/x",
                "https://evil.example/hub.example", "http://lfs.hub.example/x", "https://x@evil.example/"):  # fmt: skip
        assert not hub.trusts(url), url


def test_an_unknown_client_is_not_used_with_an_open_door():
    with pytest.raises(PublishError, match="install the tested version"):
        guard(SimpleNamespace(http="not a session"), lambda url: True)


def test_progress_is_lines_without_a_terminal_and_a_bar_with_one(monkeypatch):
    said, clock = [], iter(range(0, 1000, 30))
    monkeypatch.setattr(transfer.time, "monotonic", lambda: next(clock))
    with transfer.Progress(5_000_000, said.append) as progress:
        progress.add(2_500_000)
    assert progress.bar.disable and len(said) == 1 and said[0].startswith("2.5 MB of 5.0 MB sent, ")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with transfer.Progress(5_000_000, said.append) as progress:
        progress.add(2_500_000)
        assert progress.bar.n == 2_500_000 and progress.bar.unit == "B" and len(said) == 1
