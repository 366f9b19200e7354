"""Models from a hub: the real client against a hub on the loopback interface, each program in a process of its own.

Separate processes are the honest way: the client reads its environment when it is imported.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap

import pytest

from modelscope_dolly import dolly_pipeline
from tests.support.layouts import copy_2023_layout, plain_hf
from tests.support.loopback_hub import LoopbackHub

#: The sample of the model card, with the import line, and with the device that is here.
CARD = """
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
import modelscope_dolly
pipe = pipeline(Tasks.text_generation, model="someone/dolly-v2-12b", device="cpu", model_revision="v1.0.2")
output = pipe("Explain to me the difference between nuclear fission and fusion.")
"""
QUESTION = "Explain to me the difference between nuclear fission and fusion."


@pytest.fixture(scope="module")
def hub(checkpoint_dir, tmp_path_factory):
    old = tmp_path_factory.mktemp("hub") / "2023"
    copy_2023_layout(checkpoint_dir, old)
    plain = tmp_path_factory.mktemp("hub") / "plain"
    plain_hf(checkpoint_dir, plain)
    both = tmp_path_factory.mktemp("hub") / "both"
    shutil.copytree(checkpoint_dir, both)
    shutil.copy(old / "pytorch_model.bin", both)
    with LoopbackHub() as server:
        server.add_model("someone/both", {"v1.0.0": both})
        server.add_model("someone/dolly-v2-12b", {"v1.0.2": checkpoint_dir})
        server.add_model("someone/dolly-2023", {"v1.0.2": old})
        server.add_model("someone/plain", {"v1.0.0": plain})
        yield server


def run(hub: LoopbackHub, home, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=hub.environ(home), cwd=home, capture_output=True, text=True
    )


def test_card_sample_runs_verbatim_with_a_pinned_revision(hub, tmp_path, checkpoint_dir):
    check = """
    import json
    answer = pipe("%s", do_sample=False, max_new_tokens=20)
    print(json.dumps([sorted(output), answer]))
    """
    done = run(hub, tmp_path, CARD + textwrap.dedent(check % QUESTION))
    assert done.returncode == 0, done.stderr
    keys, answer = json.loads(done.stdout.splitlines()[-1])
    local = dolly_pipeline(str(checkpoint_dir), device="cpu")
    assert keys == ["text"]
    assert answer == local(QUESTION, do_sample=False, max_new_tokens=20)
    assert any("Revision=v1.0.2" in str(request) for request in hub.requests)


def test_2023_repository_loads_without_its_code_and_without_a_trust_flag(hub, tmp_path, checkpoint_dir):
    done = run(
        hub,
        tmp_path,
        f"""
        import json, sys
        from pathlib import Path
        from modelscope_dolly import dolly_pipeline
        pipe = dolly_pipeline("someone/dolly-2023", model_revision="v1.0.2", device="cpu", dtype="fp32")
        answer = pipe("{QUESTION}", do_sample=False, max_new_tokens=20)
        code = [path.name for path in Path(".").rglob("*.py")]
        print(json.dumps([answer, code, [m for m in sys.modules if "ms_wrapper" in m or "instruct_pipeline" in m]]))
        """,
    )
    assert done.returncode == 0, done.stderr
    answer, code, imported = json.loads(done.stdout.splitlines()[-1])
    assert (code, imported) == ([], [])
    local = dolly_pipeline(str(checkpoint_dir), device="cpu", dtype="fp32")
    assert answer == local(QUESTION, do_sample=False, max_new_tokens=20)


def test_the_same_weights_in_both_forms_are_downloaded_once(hub, tmp_path):
    done = run(
        hub,
        tmp_path,
        """
        from modelscope_dolly.checkpoint.download import locate
        print(*sorted(path.name for path in locate("someone/both", "v1.0.0").iterdir()))
        """,
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.splitlines()[-1].split()
    assert "model.safetensors" in names and "pytorch_model.bin" not in names


def test_modelscopes_deploy_checker_passes_a_published_repository(hub, tmp_path):
    done = run(
        hub,
        tmp_path,
        """
        import json, modelscope_dolly
        from modelscope.utils.deploy_checker import DeployChecker
        print(json.dumps(DeployChecker().check_model("someone/dolly-v2-12b", "v1.0.2")))
        """,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == ["text"] and isinstance(result["text"], str)


def test_modelscopes_server_loads_a_revision_and_answers_with_the_context(hub, tmp_path):
    """The application of `modelscope server`, as its command makes it."""
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed; modelscope[server] brings it")
    if not hasattr(fastapi.FastAPI, "add_event_handler"):
        pytest.skip(
            "starlette 1 has no add_event_handler, which the server of modelscope 1.40 calls; it needs starlette<1"
        )
    done = run(
        hub,
        tmp_path,
        """
        import argparse, json, modelscope_dolly
        from fastapi.testclient import TestClient
        from modelscope.pipelines import pipeline
        from modelscope.server.api_server import add_server_args, get_app
        from modelscope.utils.constant import Tasks

        parser = argparse.ArgumentParser()
        add_server_args(parser)
        app = get_app(parser.parse_args(["--model_id", "someone/dolly-v2-12b", "--revision", "v1.0.2"]))
        context, greedy = "The diary was written by Samuel Pepys.", {"do_sample": False, "max_new_tokens": 12}
        with TestClient(app) as client:
            body = {"input": "Who wrote it?", "parameters": {"context": context, **greedy}}
            answer = client.post("/call", json=body)
            task = client.get("/describe").json()["schema"]["task_name"]
        pipe = pipeline(Tasks.text_generation, "someone/dolly-v2-12b", model_revision="v1.0.2", device="cpu")
        own = [pipe("Who wrote it?", context=given, **greedy) for given in (context, None)]
        print(json.dumps([answer.status_code, answer.json(), *own, task]))
        """,
    )
    assert done.returncode == 0, done.stderr
    status, answer, expected, without, task = json.loads(done.stdout.splitlines()[-1])
    assert (status, answer) == (200, expected) and answer != without and task == "text-generation"


def test_plain_repository_loads_online_and_later_without_the_hub(hub, tmp_path):
    code = """
    from modelscope_dolly import dolly_pipeline
    pipe = dolly_pipeline("someone/plain", model_revision="v1.0.0", device="cpu")
    print(pipe("Name a colour.", do_sample=False, max_new_tokens=5)["text"])
    """
    online = run(hub, tmp_path, code)
    assert online.returncode == 0, online.stderr
    with LoopbackHub() as empty:  # knows no repository
        offline = run(empty, tmp_path, code)
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout


@pytest.mark.parametrize(
    ("model", "revision", "says"),
    [("someone/nothing", "v1", "someone/nothing"), ("someone/plain", "v9.9", "revision 'v9.9' cannot be downloaded")],
)
def test_what_the_hub_does_not_have_is_one_line_and_exit_code_2(hub, tmp_path, model, revision, says):
    command = [
        sys.executable,
        "-m",
        "modelscope_dolly.cli",
        "ask",
        "hello",
        "--model",
        model,
        "--revision",
        revision,
    ]
    done = subprocess.run(command, env=hub.environ(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("dolly: ")]
    assert says in line


def test_plan_downloads_the_configuration_and_nothing_else(hub, tmp_path):
    command = [
        sys.executable,
        "-m",
        "modelscope_dolly.cli",
        "plan",
        "someone/dolly-v2-12b",
        "--revision",
        "v1.0.2",
        "--json",
    ]
    done = subprocess.run(command, env=hub.environ(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "someone/dolly-v2-12b"
    files = [path.name for path in tmp_path.rglob("*") if path.suffix in (".json", ".safetensors", ".bin", ".py")]
    assert "config.json" in files and "model.safetensors" not in files and "tokenizer.json" not in files


def test_modelscope_command_offers_dolly(hub, tmp_path, checkpoint_dir):
    command = [sys.executable, "-m", "modelscope_hub.cli.main", "dolly", "check", str(checkpoint_dir)]
    done = subprocess.run(command, env=hub.environ(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sound" in done.stdout


@pytest.mark.parametrize("arguments", [["ask", "hi", "--modle", "x"], ["eval", "x", "--limit", "a"]])
def test_a_usage_error_in_modelscopes_command_is_one_line(hub, tmp_path, arguments):
    command = [sys.executable, "-m", "modelscope_hub.cli.main", "dolly", *arguments]
    done = subprocess.run(command, env=hub.environ(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("dolly: ") and "usage:" not in done.stderr
