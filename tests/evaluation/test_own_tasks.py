"""Tasks of one's own: scored as their definition says, stored apart, and never a part of the card's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from modelscope_dolly.cli import main
from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation.own_task_files import check_yaml, own_name, read_own_rows
from modelscope_dolly.evaluation.own_tasks import stored
from tests.support.paths import FIXTURES

CHOICES = [
    {"prompt": "The sky is", "choices": ["blue", "a very old kind of stone"], "answer": 0},
    {"prompt": "Water is", "choices": ["dry", "wet", "square"], "answer": "wet"},
    {"prompt": "Two and two are {{7*7}}", "choices": ["five", "four"], "answer": 1},
]


def lines(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(model: Path, output: Path, *arguments: str) -> int:
    return main(["eval", str(model), "--device", "cpu", "--dtype", "fp32", "--output", str(output), *arguments])


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    ids = tokenizer.encode(context + continuation, add_special_tokens=False)
    first = len(tokenizer.encode(context, add_special_tokens=False))
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(first, len(ids)))


def test_multiple_choice_is_scored_as_its_definition_says(checkpoint_dir, tokenizer, tmp_path, capsys):
    task = lines(tmp_path / "mine.jsonl", CHOICES)
    assert run(checkpoint_dir, tmp_path / "out", "--tasks", task) == 0
    printed = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir).eval()
    picks, normed = [], []
    for row in CHOICES:
        likelihoods = [log_likelihood(model, tokenizer.tokenizer, row["prompt"], f" {text}") for text in row["choices"]]
        by_length = [value / len(text) for value, text in zip(likelihoods, row["choices"], strict=True)]
        picks.append(likelihoods.index(max(likelihoods)))
        normed.append(by_length.index(max(by_length)))
    gold = [0, 1, 1]
    [result] = stored(tmp_path / "out")
    assert result.metrics["acc"] == pytest.approx(sum(map(int.__eq__, picks, gold)) / 3)
    assert result.metrics["acc_norm"] == pytest.approx(sum(map(int.__eq__, normed, gold)) / 3)
    assert result.errors["acc"] is not None and (result.size, result.run.scorer) == (3, "hf")
    assert "mine" in printed and "acc_norm" in printed and "pythia" not in printed  # no table of the card
    samples = next((tmp_path / "out").glob("*/own/mine.samples.jsonl")).read_text().splitlines()
    assert json.loads(samples[2])["doc"]["prompt"] == CHOICES[2]["prompt"]  # data are no template


def test_generation_is_greedy_and_one_of_the_answers_counts(checkpoint_dir, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir).eval()
    prompt = "Question: Name a planet.\nAnswer:"
    ids = tokenizer.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
    said = tokenizer.tokenizer.decode(made, skip_special_tokens=True).split("\n")[0].strip()
    rows = [{"prompt": prompt, "answer": ["Mars", said.upper()]}, {"prompt": prompt, "answer": "never this at all"}]
    assert run(checkpoint_dir, tmp_path / "out", "--tasks", lines(tmp_path / "gen.jsonl", rows)) == 0
    [result] = stored(tmp_path / "out")
    [(metric, value)] = result.metrics.items()
    assert metric.startswith("exact_match") and value == (0.5 if said else 0.0)


def test_what_is_stored_is_not_run_again_and_changed_questions_are(checkpoint_dir, tmp_path, monkeypatch, capsys):
    from modelscope_dolly.evaluation import evaluate as evaluation

    task = lines(tmp_path / "mine.jsonl", CHOICES[:2])
    assert run(checkpoint_dir, tmp_path / "out", "--tasks", task, "--json") == 0
    first = json.loads(capsys.readouterr().out)["own"]
    real = evaluation.open_lm
    monkeypatch.setattr(evaluation, "open_lm", lambda *_: pytest.fail("the model was loaded"))
    assert run(checkpoint_dir, tmp_path / "out", "--tasks", task, "--json") == 0
    assert json.loads(capsys.readouterr().out)["own"] == first
    monkeypatch.setattr(evaluation, "open_lm", real)
    lines(tmp_path / "mine.jsonl", CHOICES)
    assert run(checkpoint_dir, tmp_path / "out", "--tasks", task) == 0
    assert [result.size for result in stored(tmp_path / "out")] == [3]


def test_tasks_of_the_card_beside_them_give_the_same_row_as_alone(checkpoint_dir, tmp_path, capsys):
    task, data = lines(tmp_path / "mine.jsonl", CHOICES), ("--data", str(FIXTURES / "evals"))
    assert run(checkpoint_dir, tmp_path / "alone", "--tasks", "piqa", *data) == 0
    assert run(checkpoint_dir, tmp_path / "beside", "--tasks", f"piqa,{task}", *data, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out[captured.out.rindex('{\n  "rows"') :])["this"]["scores"].keys() == {"piqa"}
    for name in ("table.md", "table.csv", "table.json"):
        assert (tmp_path / "alone" / name).read_text() == (tmp_path / "beside" / name).read_text()
    assert "mine" in (tmp_path / "beside" / "own_tasks.md").read_text()


def test_a_yaml_file_is_a_task_of_lm_eval(checkpoint_dir, tmp_path):
    lines(tmp_path / "rows.jsonl", [{"q": "The sky is", "a": ["blue", "red"], "gold": 0}] * 3)
    content = {
        "task": "sky", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")},
                                                                  "cache_dir": str(tmp_path / "cache")},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{a}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "sky.yaml").write_text(yaml.safe_dump(content))
    assert run(checkpoint_dir, tmp_path / "out", "--tasks", str(tmp_path / "sky.yaml"), "--limit", "2") == 0
    [result] = stored(tmp_path / "out")
    assert (result.task, result.size, set(result.metrics)) == ("sky", 2, {"acc"})
    assert "limit 2" in (tmp_path / "out" / "own_tasks.md").read_text()


def said(capsys, model: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["eval", str(model), "--device", "cpu", *arguments]) == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert out == "" and line.startswith("dolly: ")
    return line


def test_a_template_cannot_reach_beyond_its_text(checkpoint_dir, tmp_path, capsys):
    lines(tmp_path / "rows.jsonl", [{"q": "a", "a": ["b", "c"], "gold": 0}])
    trap = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    content = {
        "task": "trap", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")},
                                                                   "cache_dir": str(tmp_path / "cache")},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": trap, "doc_to_choice": "{{a}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "trap.yaml").write_text(yaml.safe_dump(content))
    line = said(capsys, checkpoint_dir, "--tasks", str(tmp_path / "trap.yaml"), "--output", str(tmp_path / "out"))
    assert "SecurityError" in line and "unsafe" in line


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("task: a\ndoc_to_text: !function utils.text\n", "a.yaml:2: '!function' runs Python code"),
        ("task: a\nclass: !function task.Own\n", "a.yaml:2: 'class:' runs Python code"),
        ("metric_list:\n  - metric: x\n    hf_evaluate: true\n", "a.yaml:3: 'hf_evaluate:' runs"),
        ("include: b.yaml\n", "b.yaml:1: '!function' runs Python code"),
    ],
)
def test_a_file_that_would_run_code_is_refused(tmp_path, text, found):
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text("process_docs: !function utils.docs\n")
    with pytest.raises(SettingError, match=found):
        check_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": " ", "answer": "a"}, "prompt must be text that is not blank"),
        ({"answer": "a"}, "prompt must be text"),
        ({"prompt": "a"}, "answer must be text that is not blank, or a list of such texts"),
        ({"prompt": "a", "answer": []}, "answer must be text"),
        ({"prompt": "a", "answer": ["b", 5]}, "answer must be text"),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "multiple choice and generation are two files"),
    ],
)
def test_a_bad_row_of_generation_is_named_by_its_line(tmp_path, row, says):
    with pytest.raises(SettingError) as caught:
        read_own_rows(Path(lines(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}, row])))
    assert f"a.jsonl:2: {says}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"choices": ["a"], "answer": 0}, "choices must be a list of two or more texts, none blank"),
        ({"choices": ["a", ""], "answer": 0}, "choices must be a list"),
        ({"choices": "ab", "answer": 0}, "choices must be a list"),
        ({"choices": ["a", "a"], "answer": 0}, "choices must differ"),
        ({"choices": ["a", "b"], "answer": 2}, "answer is 2, expected 0 to 1 or the text of a choice"),
        ({"choices": ["a", "b"], "answer": True}, "answer is True"),
        ({"choices": ["a", "b"], "answer": "c"}, "answer is 'c'"),
    ],
)
def test_a_bad_row_of_multiple_choice_is_named_by_its_line(tmp_path, row, says):
    with pytest.raises(SettingError) as caught:
        read_own_rows(Path(lines(tmp_path / "a.jsonl", [CHOICES[0], {"prompt": "a", **row}])))
    assert f"a.jsonl:2: {says}" in str(caught.value)


def test_names_and_files_that_cannot_be_are_one_line(checkpoint_dir, tmp_path, capsys):
    task = lines(tmp_path / "piqa.jsonl", CHOICES)
    assert "piqa is a task of the card; give the file another name" in said(capsys, checkpoint_dir, "--tasks", task)
    assert "none.jsonl: missing" in said(capsys, checkpoint_dir, "--tasks", str(tmp_path / "none.jsonl"))
    assert "none.yaml: missing" in said(capsys, checkpoint_dir, "--tasks", str(tmp_path / "none.yaml"))
    (tmp_path / "broken.yaml").write_text("task: [")
    broken = said(capsys, checkpoint_dir, "--tasks", str(tmp_path / "broken.yaml"))
    assert "not a task of lm-eval that can be loaded" in broken
    gen = lines(tmp_path / "gen.jsonl", [{"prompt": "a", "answer": "b"}])
    assert "for multiple choice alone, not for gen" in said(
        capsys, checkpoint_dir, "--tasks", gen, "--template", "dolly"
    )
    with pytest.raises(SettingError, match="is no name for results"):
        own_name("/tmp/a b.jsonl")


def test_a_task_of_lm_eval_by_its_name_wants_its_data_set(checkpoint_dir, tmp_path, capsys, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "copa: its data set cannot be had" in said(capsys, checkpoint_dir, "--tasks", "copa")
