"""Starting the web page: what is checked before a model is loaded, and how the command ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

import pytest

from modelscope_dolly.cli import main
from modelscope_dolly.errors import SettingError
from modelscope_dolly.web import launch
from tests.support.signals import interruptible
from tests.support.training_runs import free_port
from tests.support.web_page import PATIENCE


@pytest.fixture
def taken():
    """A port of the loopback interface where somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def said(capsys, *arguments: str) -> str:
    assert main(["web", *arguments]) == 2
    out, told = capsys.readouterr()
    assert out == "" and told.startswith("dolly: ") and told.count("\n") == 1
    return told


def test_a_port_in_use_is_one_line_before_the_model_is_looked_for(taken, capsys):
    told = said(capsys, "no/such/model", "--port", str(taken))
    assert f"port {taken}: it is in use by another program; choose another one with --port" in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "0"], "port is 0, it must be a whole number from 1 to 65535"),
        (["--port", "x"], "invalid int value"),
        (["--host", "192.0.2.1"], "not an address of this machine; choose another one with --host"),
        (["--host", "no such host"], "host 'no such host' is no address of this machine"),
        (["--auth", "me"], "auth is 'me', it must be USER:FILE"),
        (["--auth", "me:/no/such/file"], "/no/such/file: cannot be read: No such file"),
        (["--auth", f"me:{os.devnull}"], "its first line, the password, is empty"),
        (["--auth", f"me:{__file__}", "--mcp"], "--mcp"),
        ([], "no model named: pass DIRECTORY_OR_HUB_ID"),
    ],
)
def test_what_a_user_can_repair_is_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.delenv("DOLLY_MODEL", raising=False)
    port = [] if "--port" in arguments else ["--port", str(free_port())]
    assert says in said(capsys, *arguments, *port)


@pytest.mark.parametrize(("missing", "says"), [("gradio", "modelscope-dolly[web]"), ("mcp", "gradio[mcp]")])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(missing, says, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    told = said(capsys, "no/such/model", "--mcp")
    assert f"pip install '{says}'" in told


def test_the_password_is_the_first_line_and_is_never_shown(tmp_path):
    (tmp_path / "password").write_text("s3cret\nanother line\n")
    assert launch.read_login(f"me:{tmp_path / 'password'}") == ("me", "s3cret")
    with pytest.raises(SettingError) as raised:
        launch.read_login(str(tmp_path / "password"))
    assert "s3cret" not in str(raised.value)


def command(checkpoint, *arguments: str) -> tuple[subprocess.Popen, int, str]:
    """A process of `dolly web`, its port, and the first line that it prints."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "modelscope_dolly.cli", "web", str(checkpoint), "--port", str(port), *arguments],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible,
    )  # fmt: skip
    return process, port, process.stdout.readline()


def test_open_to_others_the_command_warns_and_ctrl_c_ends_it_without_a_traceback(checkpoint_dir):
    pytest.importorskip("gradio", reason="gradio is not installed; modelscope-dolly[web] brings it")
    process, port, line = command(checkpoint_dir, "--host", "0.0.0.0")
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE):  # a visitor who stays
        process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=PATIENCE)
    assert line == f"http://localhost:{port}/  (Ctrl-C stops)\n" and rest == ""
    assert process.returncode == 130
    assert "warning: whoever reaches this address can ask" in told and "Traceback" not in told


def test_a_password_is_asked_for_and_sigterm_ends_the_command(checkpoint_dir, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed; modelscope-dolly[web] brings it")
    (tmp_path / "password").write_text("s3cret\n")
    process, port, _ = command(checkpoint_dir, "--auth", f"me:{tmp_path / 'password'}")
    url = f"http://127.0.0.1:{port}/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}gradio_api/info", timeout=PATIENCE)
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    login = urllib.parse.urlencode({"username": "me", "password": "s3cret"}).encode()
    opener.open(f"{url}login", login, timeout=PATIENCE)
    assert opener.open(f"{url}gradio_api/info", timeout=PATIENCE).status == 200
    process.terminate()
    _, told = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM and told.strip() == ""
