"""docs/dolly.ipynb runs from top to bottom on the nano settings, beside a hub on this machine, and has no output."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.loopback_hub import LoopbackHub
from tests.support.paths import FIXTURES, ROOT
from tests.support.training_runs import needs_deepspeed

NOTEBOOK = ROOT / "docs" / "dolly.ipynb"
KERNEL = "dolly-test"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def test_it_is_kept_without_output(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 8
    for cell in code:
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert NOTEBOOK.read_text("utf-8") == nbformat.writes(notebook, indent=1) + "\n"


def test_every_text_is_in_both_languages(notebook):
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(texts) >= 6
    for text in texts:
        assert re.search(r"[\u4e00-\u9fff]", text) and re.search(r"\b\w+ \w+ \w+\b", text, re.ASCII), text


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """This interpreter as a kernel, known to this test alone."""
    spec = tmp_path / "jupyter" / "kernels" / KERNEL
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": KERNEL, "language": "python"}))
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    return KERNEL


@needs_deepspeed
def test_it_runs_from_top_to_bottom(notebook, kernel, tmp_path):
    settings = {
        "RUNS": str(tmp_path / "runs"),
        "FLAGS": ["--epochs", "2", "--save-every", "16"],
        "EVAL_DATA": str(FIXTURES / "evals"),
        "MODEL_ID": "tester/dolly-nano",
    }
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    chosen = "\n".join(f"{name} = {value!r}" for name, value in settings.items())  # as papermill does it
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(chosen))
    before = files_of_the_checkout()
    with LoopbackHub() as hub:
        environment = hub.environ(tmp_path / "home", hub.token, PYTHONPATH=str(ROOT))
        client = NotebookClient(
            notebook, timeout=1800, kernel_name=kernel, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
        )
        client.execute(env=environment)
        assert hub.repositories == {}
    printed = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    final = Path(settings["RUNS"]) / "nano" / "final"
    assert f"wrote {final}" in printed["train"]
    assert any("image/png" in output.get("data", {}) for output in cell_of(notebook, "loss").outputs)
    questions = re.findall(r'^    "(.+)",$', cell_of(notebook, "ask").source, re.MULTILINE)
    assert len(questions) == 2
    assert all(f"> {question}\n" in printed[name] for question in questions for name in ("ask", "again"))
    assert printed["ask"] != printed["again"]
    assert (
        re.search(r"^\d+ of 128 records", printed["evaluate"], re.MULTILINE) and "dolly-v2-12b" in printed["evaluate"]
    )
    assert (Path(settings["RUNS"]) / "eval" / "table.md").is_file()
    assert re.search(r"\d\s+model\.safetensors\n", printed["stage"]) and "v1.0.0" in printed["stage"]
    assert "would create tester/dolly-nano (private)" in printed["publish"]
    assert "nothing was changed on the hub" in printed["publish"] and hub.token not in str(notebook)
    assert files_of_the_checkout() == before


def cell_of(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if cell.id == name)


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, and the texts it displayed."""
    shown = (output.get("text") or output.get("data", {}).get("text/markdown", "") for output in cell.outputs)
    return "".join(shown)


def files_of_the_checkout() -> set[Path]:
    """In the folders where the notebook and its commands are."""
    found = {path for folder in ("docs", "train") for path in (ROOT / folder).rglob("*")}
    return {path for path in found if "__pycache__" not in path.parts}
