"""Who may import whom, read from the source: imports point down, in no circle; ModelScope is touched in few places."""

from __future__ import annotations

import re
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.source_imports import imports, module_imports, modules

PACKAGE, RECIPE = ROOT / "modelscope_dolly", ROOT / "train"

#: Files and folders of the package, lowest first. Each imports only what stands before it.
ORDER = (
    "errors", "addresses", "task_shapes", "files", "locks", "hardware", "prompt", "text_stream", "kernels", "engine",
    "generation_settings", "answer_requests", "generation", "structured", "checkpoint", "placement", "legacy_uploads",
    "load", "server", "model", "pipeline", "batch", "evaluation", "benchmark", "compare", "web", "cli",
)  # fmt: skip
#: The way from a prompt to its text.
CORE = (
    "pipeline", "generation", "generation_settings", "answer_requests", "prompt", "text_stream", "engine.engine",
    "engine.scheduler", "engine.runner", "engine.sequence", "engine.step_input", "engine.gpt_neox",
    "engine.attention", "engine.rotary", "engine.kv_cache", "engine.sampling", "engine.logits_processors",
    "engine.logprobs", "engine.constraints",
)  # fmt: skip
#: What hangs on the core through protocols, put together in load.py.
EXTRAS = ("structured", "engine.speculative", "engine.cuda_graphs", "engine.gpt_neox_fused", "kernels.quantized_linear",
          "kernels.triton_decode", "checkpoint.quantize", "checkpoint.adapter")  # fmt: skip
REGISTRIES = {"modelscope_dolly", "modelscope_dolly.model", "modelscope_dolly.pipeline"}
HUB_CLIENT = {"modelscope_dolly.checkpoint.download"}
HEAVY = {"torch", "transformers", "modelscope", "accelerate", "datasets", "deepspeed", "lm_eval", "gradio"}
LIGHT = ("", "errors", "files", "legacy_uploads", "prompt", "checkpoint.manifest", "cli.main", "benchmark",
         "evaluation", "evaluation.published", "evaluation.comparison", "evaluation.tables", "evaluation.task_data",
         "evaluation.store", "evaluation.own_task_files", "evaluation.own_tasks", "evaluation.command", "compare",
         "compare.held_out", "cli.compare", "benchmark.bench_options",
         "server", "server.server_settings", "web.launch", "web.words")  # fmt: skip


def part(module: str) -> str:
    """The file or folder of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_every_part_has_its_place_in_the_order():
    assert {part(name) for name in modules(PACKAGE)} == {"", *ORDER}


def test_imports_point_down():
    wrong, seen = [], 0
    for name, wanted in module_imports(PACKAGE).items():
        for other in wanted:
            if part(name) and part(other) and part(name) != part(other):
                seen += 1
                if ORDER.index(part(other)) > ORDER.index(part(name)):
                    wrong.append(f"{name} imports {other}")
    assert wrong == [] and seen > 50


@pytest.mark.parametrize("package", [PACKAGE, RECIPE], ids=lambda path: path.name)
def test_no_circle_of_imports(package):
    graph = module_imports(package)
    TopologicalSorter({name: wanted - {name} for name, wanted in graph.items()}).prepare()  # CycleError names it
    assert sum(map(len, graph.values())) > 40


def test_no_circle_of_c_headers():
    sources = {path.name: path for path in (PACKAGE / "kernels" / "csrc").iterdir()}
    graph = {
        name: set(re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)) for name, path in sources.items()
    }
    TopologicalSorter(graph).prepare()
    assert set().union(*graph.values()) <= set(sources) and any(graph.values())


@pytest.mark.parametrize("package", [PACKAGE, RECIPE], ids=lambda path: path.name)
def test_no_two_modules_share_a_base_name(package):
    """Commands apart: cli/plan.py, train/plan.py."""
    names = [
        path.stem
        for path in modules(package).values()
        if path.stem not in ("__init__", "__main__") and path.parent not in (PACKAGE / "cli", RECIPE)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_nothing_of_what_hangs_on_it(name):
    extras = tuple(f"modelscope_dolly.{extra}" for extra in EXTRAS)
    wanted = imports(modules(PACKAGE)[f"modelscope_dolly.{name}"])
    assert [other for other in wanted if other.startswith(extras)] == []


def test_the_plugin_never_imports_the_recipe_and_one_module_imports_lm_eval():
    seen = {name: {dotted.split(".")[0] for dotted in imports(path)} for name, path in modules(PACKAGE).items()}
    assert not set().union(*seen.values()) & {"train", "tests", "deepspeed"}
    assert [name for name, tops in seen.items() if "lm_eval" in tops] == ["modelscope_dolly.evaluation.lm_eval_adapter"]


def test_only_some_modules_touch_modelscope():
    for name, path in modules(PACKAGE).items():
        dotted = {whole for whole in imports(path) if whole.startswith("modelscope.")}
        hub = {whole for whole in dotted if ".hub" in whole}
        assert not hub or name in HUB_CLIENT, f"{name} imports {hub}"
        assert not dotted - hub or name in REGISTRIES, f"{name} imports {dotted - hub}"


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy_at_the_top(name):
    """Nor do the modules of ours that they import there."""
    graph, known = module_imports(PACKAGE, top_level_only=True), modules(PACKAGE)
    waiting, seen = [f"modelscope_dolly.{name}".rstrip(".")], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        tops = {dotted.split(".")[0] for dotted in imports(known[module], top_level_only=True)}
        assert not tops & HEAVY, f"{module} imports {tops & HEAVY}"
        waiting.extend(graph[module] - seen)


def test_only_the_prompt_module_spells_a_key():
    sources = [*PACKAGE.rglob("*.py"), *RECIPE.rglob("*.py")]
    spelled = [path for path in sources if path != PACKAGE / "prompt.py" and "### " in path.read_text()]
    assert spelled == [] and len(sources) > 60


def test_no_third_party_import_is_undeclared():
    setup = (ROOT / "setup.py").read_text()
    seen = {dotted.split(".")[0] for path in modules(PACKAGE).values() for dotted in imports(path)}
    third_party = {name for name in seen if name not in sys.stdlib_module_names and name != "modelscope_dolly"}
    assert third_party, "no import was seen"
    for name in third_party:
        named = {f"{quote}{spelled}" for quote in "\"'" for spelled in (name, name.replace("_", "-"))}
        assert any(one in setup for one in named), f"{name} is imported but not in setup.py"


def test_each_test_stands_where_its_module_does():
    """tests/a/b/test_c.py is about a folder that the package or the recipe has."""
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    special = {Path("."), Path("support"), Path("fuzz"), Path("gpu"), Path("train")}
    for folder in folders - special:
        inside = ROOT / folder if folder.parts[0] == "train" else PACKAGE / folder
        assert inside.is_dir(), folder
