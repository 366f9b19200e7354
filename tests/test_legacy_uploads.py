"""Uploads of 2023 by the card's own line, against a hub on the loopback interface; other models are left alone."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from modelscope.models import Model
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks

from modelscope_dolly import DollyForTextGeneration, DollyTextGenerationPipeline, dolly_pipeline, legacy_uploads
from tests.support.layouts import copy_2023_layout, edit_json
from tests.support.loopback_hub import LoopbackHub

QUESTION = "Explain to me the difference between nuclear fission and fusion."
GREEDY = {"do_sample": False, "max_new_tokens": 20}
REFUSAL = "trust_remote_code=True was not explicitly set"
#: The sample of the model card, with the import line, and with the device that is here.
CARD = """
import modelscope_dolly
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
model = 'AI-ModelScope/dolly-v2-12b'
pipe = pipeline(Tasks.text_generation, model=model, device='cpu', model_revision='v1.0.2')
"""
REPORT = f"""
import json, sys
from pathlib import Path
answer = pipe({QUESTION!r}, do_sample=False, max_new_tokens=20)
files = sorted(path.name for path in Path(".").rglob("snapshots/*/*"))
run = [name for name in sys.modules if "ms_wrapper" in name or "instruct_pipeline" in name]
print(json.dumps([answer, files, run]))
"""


@pytest.fixture(scope="module")
def uploads(checkpoint_dir, tmp_path_factory) -> dict[str, Path]:
    """Directories as uploaded in 2023, by what they hold."""
    root = tmp_path_factory.mktemp("uploads")
    made = {"dolly": copy_2023_layout(checkpoint_dir, root / "dolly")}
    edit_json(made["dolly"] / "configuration.json", model={"type": "dolly-2023"})
    made["both formats"] = Path(shutil.copytree(made["dolly"], root / "both"))
    shutil.copy(checkpoint_dir / "model.safetensors", made["both formats"])
    made["plugins"] = Path(shutil.copytree(made["dolly"], root / "plugins"))
    edit_json(made["plugins"] / "configuration.json", drop=("allow_remote",), plugins=["package-that-does-not-exist"])
    made["base model"] = Path(shutil.copytree(made["dolly"], root / "base"))
    (made["base model"] / "special_tokens_map.json").write_text("{}")  # nothing names the control tokens any more
    made["another network"] = Path(shutil.copytree(made["dolly"], root / "llama"))
    edit_json(made["another network"] / "config.json", model_type="llama")
    made["no config"] = Path(shutil.copytree(made["dolly"], root / "none"))
    (made["no config"] / "config.json").unlink()
    return made


OTHERS = ("base model", "another network", "no config")


@pytest.fixture(scope="module")
def hub(uploads, checkpoint_dir, tmp_path_factory):
    ordinary = Path(shutil.copytree(checkpoint_dir, tmp_path_factory.mktemp("hub") / "ordinary"))
    edit_json(ordinary / "configuration.json", pipeline={"type": "nobody-has-this"}, model={"type": "nor-this"})
    with LoopbackHub() as server:
        server.add_model("AI-ModelScope/dolly-v2-12b", {"v1.0.2": uploads["dolly"]})
        server.add_model("someone/under-another-name", {"v1.0.0": uploads["both formats"]})
        server.add_model("someone/dolly-v2-base", {"v1.0.0": uploads["base model"]})
        server.add_model("someone/ordinary", {"v1.0.0": ordinary})
        yield server


def run(hub: LoopbackHub, home: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=hub.environ(home, **environment), cwd=home, capture_output=True, text=True)


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if legacy_uploads.SWITCH in line]


@pytest.fixture(scope="module")
def expected(checkpoint_dir) -> dict[str, str]:
    return dolly_pipeline(str(checkpoint_dir), device="cpu", dtype="fp32")(QUESTION, **GREEDY)


def test_the_sample_of_the_card_runs_verbatim_and_none_of_the_code(hub, tmp_path, expected):
    before = len(hub.requests)
    done = run(hub, tmp_path, CARD + REPORT)
    assert done.returncode == 0, done.stderr
    answer, files, imported = json.loads(done.stdout.splitlines()[-1])
    assert answer == expected and imported == []
    assert "pytorch_model.bin" in files and not [name for name in files if name.endswith(".py")]
    assert not [request for request in hub.requests[before:] if ".py" in request.path]
    [line] = told(done.stderr + done.stdout)
    assert "AI-ModelScope/dolly-v2-12b" in line and "allow_remote" in line and "DOLLY_LEGACY_UPLOADS=0" in line


def test_trust_is_taken_away_whatever_the_repository_is_called(hub, tmp_path, expected):
    """By `Model.from_pretrained` first, which downloads, then by pipeline(); the pickle is not needed."""
    done = run(
        hub,
        tmp_path,
        """
        import modelscope_dolly
        from modelscope.models import Model
        from modelscope.pipelines import pipeline
        model = Model.from_pretrained("someone/under-another-name", "v1.0.0", device="cpu", trust_remote_code=True)
        assert type(model) is modelscope_dolly.DollyForTextGeneration, type(model)
        pipe = pipeline("text-generation", model="someone/under-another-name", device="cpu", model_revision="v1.0.0",
                        trust_remote_code=True)
        """
        + textwrap.indent(REPORT, " " * 8),
    )
    assert done.returncode == 0, done.stderr
    answer, files, imported = json.loads(done.stdout.splitlines()[-1])
    assert answer == expected and imported == []
    assert "model.safetensors" in files
    assert not [name for name in files if name.endswith((".py", ".bin"))]
    assert len(told(done.stderr + done.stdout)) == 2


def test_switched_off_modelscope_refuses_as_ever(hub, tmp_path):
    done = run(hub, tmp_path, CARD, **{legacy_uploads.SWITCH: "0"})
    assert done.returncode == 1 and REFUSAL in " ".join(done.stderr.split())
    assert told(done.stderr + done.stdout) == []


def test_of_other_models_the_hub_is_asked_what_it_is_asked_without_us(hub, tmp_path):
    """But for one listing, to find configuration.json, before `Model.from_pretrained` downloads."""
    code = """
    import {first}
    from modelscope.models import Model
    from modelscope.pipelines import pipeline
    found = type(Model.from_pretrained("someone/ordinary", "v1.0.0"))
    try:
        pipeline("text-generation", model="someone/ordinary", device="cpu", model_revision="v1.0.0")
    except KeyError as error:
        print(error, found)
    """
    asked, said = [], []
    for first in ("modelscope_dolly", "json"):
        before = len(hub.requests)
        done = run(hub, tmp_path / first, code.format(first=first))
        said.append(done.stdout.splitlines()[-1])
        asked.append(Counter(re.split(r"[/&]", request.path)[-1] for request in hub.requests[before:]))
    assert asked[0] - asked[1] == Counter({"internalAccelerationInfo": 1, "Recursive=True": 1})
    assert not asked[1] - asked[0] and asked[1].total() > 3
    assert said[0] == said[1] and "nobody-has-this is not in the" in said[0] and "GPTNeoXForCausalLM" in said[0]


def test_a_base_model_called_dolly_is_not_one(hub, tmp_path):
    done = run(
        hub, tmp_path, CARD.replace("AI-ModelScope/dolly-v2-12b", "someone/dolly-v2-base").replace("1.0.2", "1.0.0")
    )
    assert done.returncode == 1 and REFUSAL in " ".join(done.stderr.split())
    assert told(done.stderr + done.stdout) == []


@pytest.mark.parametrize("kind", ["dolly", "both formats", "plugins"])
def test_a_directory_loads_in_both_ways(uploads, kind, expected, caplog):
    directory = str(uploads[kind])
    with caplog.at_level(logging.WARNING, "modelscope.dolly"):
        pipe = pipeline(Tasks.text_generation, model=directory, device="cpu", dtype="fp32")
        model = Model.from_pretrained(directory, device="cpu", dtype="fp32")
    assert type(pipe) is DollyTextGenerationPipeline and type(model) is DollyForTextGeneration
    assert pipe(QUESTION, **GREEDY) == model(QUESTION, **GREEDY) == expected
    assert pipeline(Tasks.text_generation, model=model)(QUESTION, **GREEDY) == expected


@pytest.mark.parametrize("kind", OTHERS)
def test_other_directories_are_refused_as_ever(uploads, kind):
    for load in (lambda path: pipeline(Tasks.text_generation, model=path, device="cpu"), Model.from_pretrained):
        with pytest.raises(RuntimeError, match=r"trust_remote_code=True was not"):
            load(str(uploads[kind]))


def test_the_switch_is_read_at_each_call(uploads, monkeypatch):
    monkeypatch.setenv(legacy_uploads.SWITCH, "0")
    for load in (lambda path: pipeline(Tasks.text_generation, model=path, device="cpu"), Model.from_pretrained):
        with pytest.raises(RuntimeError, match=r"trust_remote_code=True was not"):
            load(str(uploads["dolly"]))


@pytest.mark.parametrize(
    ("ignored", "passed_on"),
    [("*.onnx", ["*.onnx", "*.py"]), (["*.onnx", "*.md"], ["*.onnx", "*.md", "*.py"])],
)
def test_what_the_caller_does_not_want_is_not_downloaded_either(ignored, passed_on):
    options = {"ignore_file_pattern": ignored}
    assert legacy_uploads._download("someone/dolly", "v1", options) == "someone/dolly"
    assert options == {"ignore_file_pattern": passed_on}


def module(name: str, **members) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


def read_config(model_id_or_path, revision="master"):
    """As in ModelScope 1.40."""


def normalize_model_input(model, model_revision):
    """As in ModelScope 1.40."""


def pipeline_of_140(model, model_revision):
    return read_config(model), normalize_model_input(model, model_revision)


class OtherModel:
    @classmethod
    def from_pretrained(cls, name, *, version=None):
        """Of a ModelScope to come."""


BUILDER = {"read_config": read_config, "normalize_model_input": normalize_model_input, "pipeline": pipeline_of_140}


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("modelscope.pipelines.builder", {}),
        ("modelscope.pipelines.builder", {**BUILDER, "pipeline": lambda model: model}),
        ("modelscope.pipelines.builder", {**BUILDER, "read_config": lambda path: path}),
        ("modelscope.pipelines.builder", {**BUILDER, "read_config": 7}),
        ("modelscope.pipelines.builder", {**BUILDER, "normalize_model_input": lambda **options: options}),
        ("modelscope.models.base.base_model", {}),
        ("modelscope.models.base.base_model", {"Model": OtherModel, "Config": dict}),
        ("modelscope.models.base.base_model", {"Model": Model}),
    ],
)
def test_a_modelscope_built_otherwise_is_left_alone_with_one_clear_line(name, members, caplog):
    made = module(name, **members)
    before = dict(vars(made)), Model.__dict__["from_pretrained"], OtherModel.__dict__["from_pretrained"]
    with caplog.at_level(logging.WARNING, "modelscope.dolly"):
        legacy_uploads.install(made)
    assert (dict(vars(made)), Model.__dict__["from_pretrained"], OtherModel.__dict__["from_pretrained"]) == before
    [record] = caplog.records
    assert name in record.getMessage() and "dolly_pipeline" in record.getMessage()


def test_the_modelscope_that_is_here_is_hooked():
    from modelscope.models.base import base_model
    from modelscope.pipelines import builder

    ours = (builder.read_config, builder.normalize_model_input, base_model.Model.from_pretrained.__func__)
    assert {function.__code__.co_filename for function in ours} == {legacy_uploads.__file__}
