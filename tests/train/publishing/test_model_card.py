"""README.md of a published directory: true, complete, and unbroken by whatever a user has called his files."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelscope_dolly.errors import CheckpointError, SettingError
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.store import RunIdentity
from tests.support.training_runs import finished
from train.publishing.model_card import write_card
from train.publishing.run_metadata import KNOWN_DATASETS, card_license, describe_base

ID, TAG = "me/dolly-v2-tiny", "v1.0.3"
DOLLY = next(iter(KNOWN_DATASETS))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two starts on the whole of databricks-dolly-15k, with records dropped and adapters."""
    folder = tmp_path_factory.mktemp("runs") / "dolly-v2-tiny"
    folder.mkdir()
    settings = {
        "model": "EleutherAI/pythia-2.8b", "dataset": "/home/ann/secret-project/dolly.jsonl",
        "output_dir": "/home/ann/x",
        "epochs": 2, "max_steps": 0, "learning_rate": 5e-6, "batching": "packed", "tokens_per_batch": 2048,
        "padded_batch_size": 6, "adam_epsilon": 1e-8, "schedule": "warmup", "seed": 42, "max_length": 2048,
        "report_to": "wandb", "publish": {"token": "ms-0123"}, "lora": {"r": 16, "alpha": 32},
    }  # fmt: skip
    dropped = {"not_utf8": 0, "too_long": 7, "empty_response": 2}
    start = {
        "time": "2026-11-20T10:11:12+0000",
        "settings": settings,
        "data": {"dataset": settings["dataset"], "sha256": DOLLY},
        "base": {"name": "EleutherAI/pythia-2.8b", "hub": True, "revision": "v1", "license": "apache-2.0"},
        "plan": {
            "records": 15015, "records_kept": 15006, "records_held_out": 200, "tokens": 3000000,
            "label_tokens": 1200000,
            "steps": 618, "plan_hash": "ab" * 32, "order_hash": "cd" * 32,
            "report": {"name": settings["dataset"], "dropped": dropped, "problems": [{"excerpt": "my private record"}]},
        },
        "world": 8,
        "hardware": {"name": "NVIDIA A100-SXM4-80GB", "gpus": 8},
        "chosen": {"dtype": "bf16", "zero_stage": 2, "offload": "none", "checkpoint_activations": True},
        "resumed_from": None,
        "versions": {"modelscope_dolly": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "surprise": "1"},
    }  # fmt: skip
    abandoned = json.loads(json.dumps(start)) | {"world": 3}
    abandoned["settings"]["learning_rate"] = 7.0
    resumed = json.loads(json.dumps(start)) | {"resumed_from": "/home/ann/x/checkpoint-200"}
    resumed["settings"]["learning_rate"] = 1e-6
    (folder / "run.json").write_text(json.dumps({"starts": [abandoned, start, resumed]}))
    rows = [{"step": i, "loss": 2.5 / i, "tokens": 9000, "seconds": 1.5} for i in range(1, 619)]
    rows += [{"step": 618, "eval_loss": 1.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def directory(checkpoint_dir, tmp_path):
    shutil.copytree(checkpoint_dir, tmp_path / "staged")
    return tmp_path / "staged"


def card(directory, *arguments, **keywords) -> tuple[dict, str]:
    """The YAML head and the text behind it."""
    write_card(directory, *(arguments or (ID, TAG)), **keywords)
    text = (directory / "README.md").read_text(encoding="utf-8")
    _, head, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), body


def halves(body: str) -> tuple[str, str]:
    english, chinese = body.split("\n## 中文\n")
    return english, chinese


def test_head_has_the_keys_of_both_hubs_and_only_known_values(directory, run):
    head, _ = card(directory, run=run, license="cc-by-sa-3.0")
    assert head == {
        "tasks": ["text-generation"],
        "frameworks": ["pytorch"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "license": "cc-by-sa-3.0",
        "language": ["en"],
        "base_model": ["EleutherAI/pythia-2.8b"],
        "base_model_relation": "finetune",
        "datasets": ["databricks/databricks-dolly-15k"],
        "tags": ["dolly-v2", "gpt_neox", "lora"],
    }


def test_body_tells_what_the_run_recorded_in_both_languages(directory, run):
    _, body = card(directory, run=run, license="cc-by-sa-3.0")
    for half in halves(body):
        for told in (
            '    model="me/dolly-v2-tiny",\n    model_revision="v1.0.3",\n', "import modelscope_dolly",
            "| 15,015 |", "| 15,006 |", "| 9, `empty_response` 2, `too_long` 7 |", "| 200 |", f"`{DOLLY}`",
            "`dolly.jsonl`",
            f"`{'ab' * 32}`", f"`{'cd' * 32}`", "| 618 |", "| 5,562,000 |", "| 927 |", "| 2.5000, 0.0040 |",
            "| 1.2500, 1.2500 |",
            "| `learning_rate` | `5e-06` → `1e-06` |", "| `epochs` | `2` |", "| `tokens_per_batch` | `2048` |",
            "| `lora.r` | `16` |",
            "| `zero_stage` | `2` |", "| `dtype` | `bf16` |", "`8 x NVIDIA A100-SXM4-80GB`", "| 2026-11-20 |",
            "torch `2.13.0`",
            "`v1`", "| `apache-2.0` |", "| `CC BY-SA 3.0` |", "| `cc-by-sa-3.0` |", "](loss.png)",
        ):  # fmt: skip
            assert told in half, told
    assert "| starts of the run | 2 |" in body  # the abandoned one left nothing in the weights
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_meant_for_others_stays_out(directory, run):
    _, body = card(directory, run=run)
    for kept in ("/home", "ann", "secret-project", "ms-0123", "wandb", "private record", "surprise",
    "padded_batch_size",
                 "max_steps", "checkpoint-200", "7.0"):  # fmt: skip
        assert kept not in body, kept


def test_without_a_run_nothing_is_claimed_about_training(directory):
    head, body = card(directory)
    assert set(head) == {"tasks", "frameworks", "pipeline_tag", "library_name", "tags"}
    for half in halves(body):
        assert "|---" not in half and "loss.png" not in half and ID in half
    assert not (directory / "loss.png").exists()


def test_an_empty_record_gives_no_empty_cells(directory, tmp_path):
    (tmp_path / "run.json").write_text('{"starts": [{}]}')
    _, body = card(directory, run=tmp_path)
    assert not re.search(r"\|\s*\|\s*$|None|nan|`` ", body, re.MULTILINE)


def test_a_base_in_a_relative_folder_is_not_taken_for_a_hub_id(directory, tmp_path):
    base = {"name": "runs/nano-base", "hub": False, "revision": None, "license": None}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"base": base}]}))
    head, body = card(directory, run=tmp_path)
    assert "base_model" not in head and "| `nano-base` |" in body and "runs/nano-base" not in body


def test_same_inputs_give_the_same_bytes(directory, run):
    card(directory, run=run)
    before = {name: (directory / name).read_bytes() for name in ("README.md", "loss.png")}
    card(directory, run=run)
    assert before == {name: (directory / name).read_bytes() for name in before}


def test_picture_does_not_go_through_a_link(directory, run, tmp_path):
    (tmp_path / "other.png").write_bytes(b"another's")
    (directory / "loss.png").hardlink_to(tmp_path / "other.png")
    card(directory, run=run)
    assert (tmp_path / "other.png").read_bytes() == b"another's"


def test_sample_runs_as_it_stands(directory):
    _, body = card(directory, str(directory), TAG)
    for half in halves(body):
        (code,) = re.findall(r"```python\n(.*?)```", half, re.DOTALL)
        assert code.count("model_revision=") == 1
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_real_run_records_what_the_card_wants(directory):
    head, body = card(directory, run=finished())
    assert "base_model" not in head and "datasets" not in head and "language" not in head
    english, _ = halves(body)
    for label in ("data set", "SHA-256 of the records", "records read", "records dropped", "base model", "processes",
                  "optimizer steps", "hash of the batch plan", "hardware", "tokens processed", "versions"):  # fmt: skip
        assert f"\n| {label} | " in english, label
    assert "| base model | `base` |" in english and "| `dtype` | `fp32` |" in english
    assert str(finished().parent) not in body


@pytest.mark.parametrize(("name", "text"), [("run.json", "{"), ("run.json", '{"starts": []}'), ("metrics.jsonl", "{"),
                                            ("metrics.jsonl", "[1]\nnull")])  # fmt: skip
def test_a_damaged_record_is_an_error_that_names_the_file(directory, run, tmp_path, name, text):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        card(directory, run=tmp_path / "run")


def test_evaluation_stands_beside_the_published_rows(directory, run, tmp_path):
    settings = {"dtype": "bfloat16", "softmax_dtype": "float32", "device": "cpu", "scorer": "shared", "batch_size": "8"}
    model = RunIdentity(
        "<b>mine", None, "ab" * 32, **settings, limit=None, template="none", versions={"lm_eval": "0.4.13"}
    )
    right = {"acc": 1500, "acc_norm": 1500}
    store.write(tmp_path, store.TaskResult("piqa", model, "d" * 64, "1.0", 1838, right, True), [])
    _, body = card(directory, run=run, evaluation=tmp_path)
    for half in halves(body):
        assert "| &lt;b>mine | " in half and "0.816104" in half and "| dolly-v2-3b (card) | 0.384 |" in half
    assert "No evaluation" not in body


def test_an_evaluation_without_results_is_an_error(directory, tmp_path):
    with pytest.raises(SettingError, match="holds no results"):
        card(directory, evaluation=tmp_path)


def test_base_from_a_hub_and_from_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# hello\n")
    here = describe_base("owner/name", "master", tmp_path / "owner" / "name")
    assert here == {"name": "owner/name", "hub": False, "revision": None, "license": "mit"}
    assert (
        describe_base("other/name", "v1", tmp_path)["hub"]
        and describe_base("other/name", "v1", tmp_path)["revision"] == "v1"
    )


@pytest.mark.parametrize("text", ["", "---\n", "---\na: [\n---\n", "---\nlicense: [mit]\n---\n",
                                  "---\n- license\n---\n",
                                  "text\n---\nlicense: mit\n---\n"])  # fmt: skip
def test_a_card_without_a_plain_licence_has_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert card_license(tmp_path) is None


NASTY = [
    "a|b`c``d", "---\nlicense: mit\n---", "```\n# heading", "<script>alert(1)</script>", "![x](http://x)",
    "\u2028x\u202e",
    "a: b # c", "'\"\\", "{{x}}", "|", "`", "\\", "\\|", "- x", "*&!%@", "\ud800", "\0", "x\r\n\r\n# y",
    "C:\\Users\\ann\\my data.csv",
]  # fmt: skip
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=40))


def skeleton(body: str) -> list[str]:
    """The blocks of a page outside its tables, and whatever is inside lines that is neither text nor a code span."""
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(body)
    spans = [child.type for token in tokens for child in token.children or []]
    blocks = [token.type for token in tokens if token.type[:3] not in ("tr_", "td_", "inl")]
    return blocks + [kind for kind in spans if kind not in ("text", "code_inline")]


@settings(max_examples=60, deadline=None)
@given(
    dataset=texts,
    base=texts,
    model_id=texts,
    tag=texts,
    license=texts.map("x{}".format),
    hardware=texts,
    schedule=texts,
)
@example(*["a|b`c\\"] * 7)
@example(*["\ud800\u202e\u2028x"] * 7)
@example("hf:a/b@c", "a/b", "a/b", "v1", "mit", "x", "y")
def test_no_text_of_a_user_breaks_the_page(
    checkpoint_dir, tmp_path_factory, run, dataset, base, model_id, tag, license, hardware, schedule
):
    folder = tmp_path_factory.getbasetemp() / "nasty"
    folder.mkdir(exist_ok=True)
    shutil.copy(checkpoint_dir / "config.json", folder)
    start = json.loads((run / "run.json").read_text())["starts"][-1]

    def write(dataset, base, model_id, tag, license, hardware, schedule) -> tuple[dict, str]:
        start["data"] |= {"dataset": dataset, "sha256": "12" * 32}
        start["base"] |= {"name": base, "license": license, "revision": tag}
        start["hardware"]["name"] = hardware
        start["settings"]["schedule"] = start["versions"]["torch"] = schedule
        (folder / "run.json").write_text(json.dumps({"starts": [start]}))
        return card(folder, model_id, tag, run=folder, license=license)

    _, plain = write(*"abcdefg")
    head, body = write(dataset, base, model_id, tag, license, hardware, schedule)
    assert set(head) <= {"tasks", "frameworks", "pipeline_tag", "library_name", "license", "base_model",
                         "base_model_relation", "datasets", "tags"}  # fmt: skip
    assert all(isinstance(value, (str, list)) for value in head.values()) and "\n" not in head.get("license", "")
    assert all(char.isprintable() or char == "\n" for char in body)
    assert skeleton(body) == skeleton(plain)
    assert {line.count("|") for line in body.splitlines() if line.startswith("|")} == {3}
    (code, _) = re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE)
    called = next(node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and node.keywords)
    assert [ast.literal_eval(keyword.value) for keyword in called.keywords] == [model_id, tag, "gpu"]
