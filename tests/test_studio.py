"""docs/studio: what a person uploads to ModelScope as it is. Built here as far as that goes without its servers."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tarfile
from importlib.metadata import metadata

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.load import load
from modelscope_dolly.web import launch
from tests.support.paths import ROOT

STUDIO = ROOT / "docs" / "studio"
#: What ModelScope reads at the top of a Studio's README.
FRONT_MATTER = {
    "type": "object",
    "required": ["domain", "tags", "models", "license", "deployspec"],
    "additionalProperties": False,
    "properties": {
        "domain": {"type": "array", "items": {"enum": ["nlp", "cv", "audio", "multi-modal", "science"]}},
        "tags": {"type": "array", "items": {"type": "string"}},
        "models": {"type": "array", "items": {"type": "string", "pattern": r"^[\w.-]+/[\w.-]+$"}},
        "license": {"type": "string"},
        "deployspec": {"type": "object", "properties": {"entry_file": {"const": "app.py"}}, "required": ["entry_file"]},
    },
}
#: Of ms_deploy.json; 8080 is ModelScope's own port.
DEPLOY = {
    "type": "object",
    "required": ["sdk_type", "resource_configuration", "port"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string", "format": "uri"},
        "sdk_type": {"const": "docker"},
        "resource_configuration": {"const": "platform/2v-cpu-16g-mem"},
        "port": {"const": 7860},
    },
}


def read(name: str) -> str:
    return (STUDIO / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("studio_app", STUDIO / "app.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_CACHE", "")  # what the module sets is taken back afterwards
        spec.loader.exec_module(module)
    return module


def test_the_model_is_quantised_once_and_read_from_the_copy_afterwards(app, checkpoint_dir, tmp_path, monkeypatch):
    first = app.ready_model(str(checkpoint_dir), None, "int8", tmp_path)
    assert first.checkpoint.path.parent == tmp_path and first.checkpoint.quantization == "int8"
    monkeypatch.setattr(app, "locate", lambda *_: pytest.fail("the model was looked for again"))
    again = app.ready_model(str(checkpoint_dir), None, "int8", tmp_path)
    direct = load(checkpoint_dir, device="cpu", quantize="int8")
    greedy = GenerationSettings(do_sample=False, max_new_tokens=8)
    texts = {
        dolly.text_generator.generate([Prompt("Name a colour.")], greedy, slots=1)[0][0].text
        for dolly in (first, again, direct)
    }
    assert len(texts) == 1


def test_revisions_and_methods_have_copies_of_their_own(app, checkpoint_dir, tmp_path):
    paths = {
        app.ready_model(str(checkpoint_dir), revision, method, tmp_path).checkpoint.path
        for revision, method in ((None, "int8"), ("v1", "int8"), ("v1", "int4"), ("v1", "none"))
    }
    assert len(paths) == 4 and checkpoint_dir in paths


def test_a_model_that_is_not_there_is_one_line(app, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DOLLY_MODEL", "no/such/model")
    monkeypatch.setattr(launch, "check_address", lambda *_: None)
    monkeypatch.setattr(app, "HOME", tmp_path)
    assert app.main() == 2
    told = capsys.readouterr().err
    assert told.startswith("app.py: no/such/model: no such directory") and told.count("\n") == 1


def test_the_front_matter_is_what_modelscope_reads():
    _, front, _ = read("README.md").split("---\n", 2)
    jsonschema.validate(yaml.safe_load(front), FRONT_MATTER)


def test_the_deployment_asks_for_the_free_machine_and_the_port_of_the_page():
    deploy = json.loads(read("ms_deploy.json"))
    jsonschema.validate(deploy, DEPLOY)
    assert deploy["port"] == launch.PORT


def test_requirements_are_those_of_the_tests_and_run_on_the_python_of_the_image():
    pinned = {
        Requirement(line).name: Requirement(line) for line in read("requirements.txt").splitlines() if line[0] != "#"
    }
    tried = {Requirement(line).name: Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
             if line[0] != "#"}  # fmt: skip
    setup = (ROOT / "setup.py").read_text()
    assert f'"{pinned.pop("transformers")}"' in setup  # the tested one is not for the image's Python
    assert all(requirement.specifier == tried[name].specifier for name, requirement in pinned.items())
    run = re.findall(r'"([\w.-]+)(?:\[\w+\])?>', re.search(r"RUN = \[(.*?)\n\]", setup, re.DOTALL)[1])
    assert {*pinned, "transformers"} == {*run, "gradio", "datasets"}
    python = re.search(r"python:(\d\.\d+)$", read("Dockerfile"), re.MULTILINE)[1]
    assert python in SpecifierSet(re.search(r'python_requires="(.+)"', setup)[1])
    assert all(python in SpecifierSet(metadata(name)["Requires-Python"] or "") for name in pinned)


def test_the_image_runs_without_privileges_and_reports_its_health():
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", read("Dockerfile"), flags=re.MULTILINE))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line]
    names = [name for name, _ in lines]
    value = dict(lines)
    assert set(names) <= {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert names[:2] == ["ARG", "FROM"] and value["FROM"] == "${BASE}"
    assert re.fullmatch(r"BASE=[\w.-]+(/[\w.-]+)+:\d\.\d+", lines[0][1])
    assert value["USER"] not in ("root", "0") and "RUN" not in names[names.index("USER") :]
    assert value["EXPOSE"] == str(launch.PORT) and f":{launch.PORT}/" in value["HEALTHCHECK"]
    assert json.loads(value["ENTRYPOINT"])[-1] == "app.py"
    given = dict(item.split("=") for item in value["ENV"].split())
    assert {name for name in given if name.startswith("DOLLY")} <= set(re.findall(r"DOLLY_\w+", read("app.py")))
    declared = {argument.split("=")[0] for name, argument in lines if name == "ARG"}
    assert set(re.findall(r"\$\{(\w+)\}", text)) == declared
    copied = {source for name, rest in lines if name == "COPY" for source in rest.split()[:-1]}
    assert copied - {"modelscope-dolly.tar.gz"} <= {path.name for path in STUDIO.iterdir()}


def test_variables_in_the_readme_are_those_of_the_program():
    assert set(re.findall(r"`(DOLLY_\w+)`", read("README.md"))) == set(re.findall(r'"(DOLLY_\w+)"', read("app.py")))


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no git checkout here")
def test_the_command_of_the_readme_packs_what_the_image_installs(tmp_path):
    [command] = re.findall(r"git archive .+", read("README.md"))
    target = tmp_path / "modelscope-dolly.tar.gz"
    subprocess.run(
        command.replace("docs/studio/modelscope-dolly.tar.gz", str(target)), shell=True, check=True, cwd=ROOT
    )
    with tarfile.open(target) as archive:
        names = archive.getnames()
    assert {"modelscope-dolly/setup.py", "modelscope-dolly/modelscope_dolly/__init__.py"} <= set(names)
