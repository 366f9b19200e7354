"""`dolly serve` as a process: it loads, answers, drains, and says in one line what stands in its way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelscope_dolly.cli import main
from modelscope_dolly.errors import HardwareError, SettingError
from modelscope_dolly.server.server_settings import ServerSettings, read_keys
from modelscope_dolly.server.startup import bind, choose_slots, warnings

#: Loads the model slowly enough for a look at the progress, and takes no step before a client has said so.
PATIENT = """
import sys, threading, urllib.request
from modelscope_dolly.cli import main
from modelscope_dolly.checkpoint import reader
read = reader.read_tensors
def slowly(tensors):
    for number, pair in enumerate(read(tensors)):
        if number == 3:
            sys.stdin.readline()
        yield pair
reader.read_tensors = slowly
sys.exit(main(sys.argv[1:]))
"""


class Served:
    """A process of `dolly serve`."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.lines, self.address = process, [], ""
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        with self._said:
            self.lines.append("(end)")
            self._said.notify_all()

    def line(self, part: str) -> str:
        """Wait for a line that has a part."""
        with self._said:
            found: list[str] = []

            def there() -> bool:
                found[:] = [line for line in self.lines if part in line]
                return bool(found) or self.lines[-1:] == ["(end)"]

            assert self._said.wait_for(there, timeout=120) and found, self.lines
            return found[0]

    def ask(self, path: str, body: dict | None = None) -> tuple[int, dict]:
        data = json.dumps(body).encode() if body is not None else None
        try:
            with urllib.request.urlopen(self.address + path, data, timeout=60) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        self._reader.join()
        return code


@contextlib.contextmanager
def served(checkpoint_dir, *options: str, key: str = "") -> Iterator[Served]:
    command = [sys.executable, "-c", PATIENT, "serve", str(checkpoint_dir), "--port", "0", *options]
    environment = {**os.environ, "DOLLY_API_KEY": key} if key else os.environ
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **streams)
    one = Served(process)
    try:
        one.address = one.line("listening on").split(";")[0].removeprefix("listening on ")
        yield one
    finally:
        process.kill()
        one.end()
        process.stdin.close()
        process.stderr.close()


def load(one: Served) -> None:
    one.process.stdin.write("go\n")
    one.process.stdin.flush()
    one.line("ready on")


def chat(seed: int, **more) -> dict:
    return {"messages": [{"role": "user", "content": "Count."}], "seed": seed, "max_tokens": 60, **more}


def test_it_loads_answers_and_drains(checkpoint_dir):
    with served(checkpoint_dir, "--slots", "2", "--drain", "50") as one:
        while (health := one.ask("/health"))[1].get("weights_read", 0) == 0:
            assert health[0] == 503
        status, body = one.ask("/health")
        assert status == 503 and body["status"] == "loading" and 0 < body["weights_read"] < body["weights"]
        status, body = one.ask("/v1/chat/completions", chat(1))
        assert status == 503 and body["error"]["code"] == "loading"
        load(one)
        assert one.ask("/health") == (200, {"status": "ok"})
        told = "\n".join(one.lines)
        for part in ("as 'dolly', float32 on cpu", "slots    2 answers at a time, 128 may wait", "50 s to drain"):
            assert part in told
        expected = [one.ask("/v1/chat/completions", chat(seed))[1]["choices"] for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            under_load = [pool.submit(one.ask, "/v1/chat/completions", chat(seed)) for seed in range(4)]
            accepted = 0
            while accepted < 4:
                with urllib.request.urlopen(one.address + "/metrics", timeout=60) as response:
                    values = dict(line.split() for line in response.read().decode().splitlines() if line[0] != "#")
                done = float(values.get('dolly_requests_total{endpoint="/v1/chat/completions",outcome="ok"}', 0)) - 4
                accepted = done + float(values["dolly_slots_in_use"]) + float(values["dolly_queue"])
            one.process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in under_load]
        assert one.end() == 0
        assert [status for status, _ in answers] == [200] * 4
        assert [body["choices"] for _, body in answers] == expected
        assert "stopped" in one.lines and not any("Traceback" in line for line in one.lines)


def test_a_second_signal_ends_it_at_once_and_keys_are_never_told(checkpoint_dir):
    with served(checkpoint_dir, "--host", "0.0.0.0", key="se-cret") as one:
        load(one)
        request = urllib.request.Request(
            one.address.replace("0.0.0.0", "127.0.0.1") + "/v1/chat/completions",
            json.dumps(chat(1, max_tokens=1900, stream=True, logit_bias={"65": 100})).encode(),
            {"Authorization": "Bearer se-cret"},
        )
        with urllib.request.urlopen(request, timeout=60) as stream:
            stream.readline()
            one.process.send_signal(signal.SIGTERM)
            one.line("stopping: 1 requests in work have 30 s")
            one.process.send_signal(signal.SIGTERM)
            assert one.end() == 128 + signal.SIGTERM
        assert not any("se-cret" in line or "warning" in line for line in one.lines)


def test_what_is_not_done_when_the_time_to_drain_is_over_is_cut_and_the_exit_code_is_0(checkpoint_dir):
    with served(checkpoint_dir, "--drain", "0") as one:
        load(one)
        body = json.dumps(chat(1, max_tokens=1900, stream=True, logit_bias={"65": 100})).encode()
        with urllib.request.urlopen(one.address + "/v1/chat/completions", body, timeout=60) as stream:
            stream.readline()
            one.process.send_signal(signal.SIGINT)
            assert one.end() == 0
        assert any("outcome=cut" in line for line in one.lines)
        assert not any("Traceback" in line for line in one.lines)


def test_a_signal_while_the_model_is_being_loaded(checkpoint_dir):
    with served(checkpoint_dir) as one:
        one.process.send_signal(signal.SIGTERM)
        assert one.end() == 0 and "stopped" in one.lines


def test_what_stands_in_the_way_is_one_line_and_exit_code_2(checkpoint_dir, tmp_path, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", str(checkpoint_dir), "--port", port]) == 2
    assert f"port {port}: it is in use by another program; choose another one with --port" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert "config.json" in capsys.readouterr().err.splitlines()[-1]
    assert main(["serve", str(checkpoint_dir), "--port", "0", "--slots", "4000000"]) == 2
    assert main(["serve", str(checkpoint_dir), "--model", "x"]) == 2
    assert "named twice" in capsys.readouterr().err
    for options in (["--port", "70000"], ["--queue", "-1"], ["--drain", "nan"], ["--host", "999.1.1.1"]):
        assert main(["serve", str(checkpoint_dir), *options]) == 2
        assert options[0] in capsys.readouterr().err


def test_without_the_extra_it_names_the_command_that_installs_it(checkpoint_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(checkpoint_dir)]) == 2
    assert "dolly serve needs uvicorn: pip install 'modelscope-dolly[serve]'" in capsys.readouterr().err


def test_a_network_without_a_key_is_warned_of():
    [warning] = warnings(ServerSettings(host="0.0.0.0"))
    assert "--api-key" in warning
    assert not [*warnings(ServerSettings()), *warnings(ServerSettings(host="0.0.0.0", keys=("k",)))]


def test_keys_come_from_the_option_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# two of them\nfirst\n\n  second\n")
    assert read_keys(str(file)) == ("first", "second") and read_keys("third") == ("third",)
    monkeypatch.setenv("DOLLY_API_KEY", str(file))
    assert read_keys(None) == ("first", "second")
    monkeypatch.delenv("DOLLY_API_KEY")
    assert read_keys(None) == ()
    for wrong, message in (("", "has no key"), ("a b", "key 1 has spaces"), ("käse", "outside ASCII")):
        with pytest.raises(SettingError, match=message) as caught:
            read_keys(wrong)
        assert not wrong or wrong not in str(caught.value)


def test_slots_follow_from_the_memory(dolly, monkeypatch):
    engine = dolly.text_generator.engine
    assert choose_slots(dolly, None) == 32 and choose_slots(dolly, 3) == 3
    free = 5 * engine.window // 4 * dolly.net.cache_bytes
    for module in ("engine.runner", "server.startup"):
        monkeypatch.setattr(f"modelscope_dolly.{module}.free_memory", lambda device: free)
    assert choose_slots(dolly, None) == 4
    with pytest.raises(HardwareError, match=r"--slots 5 needs .* use --slots 4"):
        choose_slots(dolly, 5)


def test_a_port_is_free_again_at_once():
    with bind(ServerSettings(port=0)) as first:
        port = first.getsockname()[1]
    bind(ServerSettings(port=port)).close()
