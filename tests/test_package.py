"""What gets installed, and what importing it costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def python(code: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def build(kind: str, target: Path, work: Path, **environment: str) -> list[str]:
    """Names in a wheel or sdist of a copy: building in place would leave build/ and egg-info behind."""
    source = work / "copy"
    ignored = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored))
    if kind == "sdist":
        command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(target)]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        command += ["-w", str(target), "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env={**os.environ, **environment})
    [built] = target.glob("modelscope_dolly-*")
    with zipfile.ZipFile(built) if kind == "wheel" else tarfile.open(built) as archive:
        return archive.namelist() if kind == "wheel" else archive.getnames()


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    return build("wheel", tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source"))


def test_wheel_holds_the_plugin_its_data_and_its_licence(wheel_names):
    for path in (ROOT / "modelscope_dolly").rglob("*"):
        if path.suffix in (".py", ".json", ".c", ".h"):
            assert path.relative_to(ROOT).as_posix() in wheel_names
    assert any(name.endswith("LICENSE") for name in wheel_names)


@pytest.mark.skipif(not shutil.which(os.environ.get("CC", "gcc")), reason="no C compiler here")
def test_wheel_holds_the_compiled_kernels(wheel_names):
    assert [name for name in wheel_names if name.endswith(".so")] == [
        f"modelscope_dolly/kernels/_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    ]


def test_without_a_compiler_the_wheel_is_built_without_kernels(tmp_path):
    names = build("wheel", tmp_path / "wheel", tmp_path, CC="false")
    assert "modelscope_dolly/kernels/cpu.py" in names and not any(name.endswith(".so") for name in names)


def test_source_distribution_holds_the_source_of_the_kernels(tmp_path):
    names = build("sdist", tmp_path / "sdist", tmp_path)
    for path in (ROOT / "modelscope_dolly" / "kernels" / "csrc").iterdir():
        assert any(name.endswith(f"/{path.relative_to(ROOT).as_posix()}") for name in names), path
    assert not any(name.endswith(".so") for name in names)


def test_wheel_holds_neither_recipe_nor_tests(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"modelscope_dolly"}


def test_template_at_the_top_is_the_one_in_the_package():
    text = (ROOT / "configuration.json").read_text()
    assert text == (ROOT / "modelscope_dolly" / "configuration.json").read_text()
    configuration = json.loads(text)
    assert configuration == {
        "framework": "pytorch",
        "task": "text-generation",
        "model": {"type": "dolly-v2"},
        "pipeline": {"type": "modelscope-dolly"},
    }


def test_import_is_clean_under_warnings_as_errors_and_loads_nothing_heavy():
    loaded = python(
        "import modelscope_dolly, sys; print([m for m in ('torch', 'modelscope', 'transformers') if m in sys.modules])",
        "-W",
        "error",
    )
    assert loaded == "[]"


@pytest.mark.parametrize("first", ["modelscope_dolly", "modelscope.pipelines"])
def test_registration_works_in_both_import_orders_and_loads_no_engine(first):
    second = {"modelscope_dolly": "modelscope.pipelines", "modelscope.pipelines": "modelscope_dolly"}[first]
    out = python(
        f"import {first}, {second}, sys, json\n"
        "from modelscope.utils.import_utils import LazyImportModule\n"
        "index = LazyImportModule.get_ast_index()['index']\n"
        "ours = [m for m in sys.modules if m.startswith('modelscope_dolly')]\n"
        "left = [f for f in sys.meta_path if type(f).__module__ == 'modelscope_dolly']\n"
        "from modelscope.models.base import base_model\n"
        "from modelscope.pipelines import builder\n"
        "hooked = [builder.read_config, builder.normalize_model_input, base_model.Model.from_pretrained.__func__]\n"
        "hooked = [function.__code__.co_filename.rpartition('modelscope_dolly')[2] for function in hooked]\n"
        "print(json.dumps([sorted(k for k in index if 'dolly' in k[2]), ours, len(left), hooked]))"
    ).splitlines()[-1]
    keys, ours, finders, hooked = json.loads(out)
    assert keys == [
        ["MODELS", "text-generation", "dolly-v2"],
        ["PIPELINES", "chat", "modelscope-dolly"],
        ["PIPELINES", "text-generation", "modelscope-dolly"],
    ]
    assert sorted(ours) == ["modelscope_dolly", "modelscope_dolly.errors", "modelscope_dolly.legacy_uploads"]
    assert finders == 0
    assert hooked == ["/legacy_uploads.py"] * 3


def test_registered_names_are_not_taken_by_modelscope():
    out = python(
        "from modelscope.utils.import_utils import LazyImportModule\n"
        "index = LazyImportModule.get_ast_index()['index']\n"
        "print(len(index), [k for k in index if k[2] in ('dolly-v2', 'modelscope-dolly')])"
    ).splitlines()[-1]
    count, _, taken = out.partition(" ")
    assert int(count) > 100 and taken == "[]"


def test_entry_points_are_installed():
    scripts = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert scripts["dolly"] == "modelscope_dolly.cli:main"
    plugins = {point.name: point.value for point in entry_points(group="modelscope_hub.cli_plugins")}
    assert plugins["dolly"] == "modelscope_dolly.cli:ModelScopeCommand"


def test_public_names_exist_and_an_unknown_one_is_an_attribute_error():
    import modelscope_dolly

    for name in modelscope_dolly.__all__:
        assert getattr(modelscope_dolly, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = modelscope_dolly.nothing
