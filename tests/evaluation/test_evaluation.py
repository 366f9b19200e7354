"""dolly eval on tiny random models: lm-eval's own tasks over invented rows, against the definition."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli import main
from modelscope_dolly.cli.options import MODEL_VARIABLE
from modelscope_dolly.errors import SettingError
from modelscope_dolly.evaluation import evaluate as evaluation
from modelscope_dolly.evaluation import model_under_test, store
from modelscope_dolly.evaluation.evaluate import EvalSettings, evaluate, verify
from modelscope_dolly.evaluation.lm_eval_adapter import card_tasks, requests_and_gold
from modelscope_dolly.evaluation.published import TASK_NAMES
from modelscope_dolly.evaluation.task_data import is_exact, read_rows
from tests.support.layouts import copy_2023_layout, plain_hf
from tests.support.models import random_model
from tests.support.paths import FIXTURES, SHARED_DATA, needs_shared_data

EVALS = FIXTURES / "evals"


@pytest.fixture(scope="module")
def gptj_dir(tmp_path_factory, tokenizer) -> Path:
    """A GPT-J as transformers saves it, with a tokenizer that knows none of the keys."""
    target = tmp_path_factory.mktemp("gptj") / "gpt-j-tiny"
    torch.manual_seed(3)
    config = GPTJConfig(
        vocab_size=len(tokenizer.tokenizer), n_positions=512, n_embd=64, n_layer=2, n_head=4, rotary_dim=8,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTJForCausalLM(config).save_pretrained(target)
    base = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    base["added_tokens"] = base["added_tokens"][:1]
    (target / "tokenizer.json").write_text(json.dumps(base))
    (target / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    return target


def settings(model: Path, output: Path, **changes) -> EvalSettings:
    values = dict(model=str(model), data=EVALS, output=output, device="cpu", dtype="fp32")
    return EvalSettings(**{**values, **changes})


def likelihoods(output: Path, result: store.TaskResult) -> list[list[float]]:
    path = output / result.run.directory / f"{result.task}.samples.jsonl"
    return [json.loads(line)["loglikelihoods"] for line in path.read_text().splitlines()]


@torch.inference_mode()
def directly(model, tokenizer, context: str, continuation: str) -> float:
    """log p(continuation | context), token by token, of one sequence."""
    ids = tokenizer.encode(context + continuation, add_special_tokens=False)
    first = len(tokenizer.encode(context, add_special_tokens=False))
    logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(first, len(ids)))


@pytest.fixture(scope="module")
def asked() -> dict[str, tuple[list, list[int]]]:
    """task -> the requests of each document, and the right choices."""
    with card_tasks(TASK_NAMES, EVALS) as tasks:
        return {name: requests_and_gold(loaded.task) for name, loaded in tasks.items()}


@pytest.mark.parametrize("scorer", ["shared", "hf"])
@pytest.mark.parametrize("architecture", ["neox", "gptj"])
def test_scores_are_the_direct_computation(checkpoint_dir, gptj_dir, tokenizer, asked, tmp_path, architecture, scorer):
    model_dir = gptj_dir if architecture == "gptj" else checkpoint_dir
    results = evaluate(settings(model_dir, tmp_path, scorer=scorer))
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    assert [result.task for result in results] == list(TASK_NAMES)
    for result in results:
        requests, gold = asked[result.task]
        expected = [[directly(model, tokenizer.tokenizer, *args) for args in choices] for choices in requests]
        for found, wanted in zip(likelihoods(tmp_path, result), expected, strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)
        picks = [max(range(len(row)), key=row.__getitem__) for row in expected]
        assert result.correct["acc"] == sum(pick == right for pick, right in zip(picks, gold, strict=True))
        if result.task not in ("winogrande", "boolq"):
            lengths = [[len(text[1:]) if text[0] == " " else len(text) for _, text in row] for row in requests]
            normed = [[v / n for v, n in zip(*pair, strict=True)] for pair in zip(expected, lengths, strict=True)]
            picks = [max(range(len(row)), key=row.__getitem__) for row in normed]
            assert result.card_correct == sum(pick == right for pick, right in zip(picks, gold, strict=True))
        assert result.exact is False and result.run.scorer == scorer


def test_prompts_are_those_of_the_card(asked):
    first = {name: requests[0][0] for name, (requests, _) in asked.items()}
    assert first["openbookqa"] == ("A candle in a closed jar goes out because", " the jar is cold")
    assert first["arc_easy"] == ("Question: Which tool measures temperature?\nAnswer:", " a ruler")
    assert first["winogrande"][0] == "The bucket would not fit under the tap because the bucket"
    assert first["winogrande"][1] == " was too tall."
    assert first["boolq"][0].startswith("Lighthouse -- ") and first["boolq"][0].endswith("ships?\nAnswer:")
    assert [args[1] for args in asked["boolq"][0][0]] == [" no", " yes"]
    hellaswag = asked["hellaswag"][0]
    assert hellaswag[1][0][0] == "Washing a car: A man sprays a car with water. he Then"
    assert hellaswag[2][0] == (
        "Home and Garden: How to plant a bulb. Choose a place. Look for soil that drains well.",
        "  Dig a hole three times as deep as the bulb is tall.",
    )
    assert asked["winogrande"][1] == [0, 1, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("scorer", ["shared", "hf"])
def test_batch_size_changes_nothing(checkpoint_dir, tmp_path, scorer):
    found = {}
    for batch_size in ("1", "16", "auto"):
        results = evaluate(settings(checkpoint_dir, tmp_path, batch_size=batch_size, scorer=scorer))
        found[batch_size] = [value for one in results for row in likelihoods(tmp_path, one) for value in row]
        found[batch_size] += [result.correct for result in results]
    for other in ("16", "auto"):
        for one, two in zip(found["1"], found[other], strict=True):
            assert one == (pytest.approx(two, abs=1e-4) if isinstance(two, float) else two)


def test_an_interrupted_run_goes_on_and_gives_the_same_table(checkpoint_dir, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["eval", str(checkpoint_dir), "--data", str(EVALS), "--device", "cpu", "--output"]
    assert main([*arguments, str(whole)]) == 0
    ran, real = [], evaluation.run_task

    def stops_at_the_third(lm, name, *rest):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(name)
        return real(lm, name, *rest)

    monkeypatch.setattr(evaluation, "run_task", stops_at_the_third)
    capsys.readouterr()
    assert main([*arguments, str(parts)]) == 130
    assert "stopped in winogrande; 2 of 7 tasks are stored" in capsys.readouterr().err
    assert sorted(path.name for path in parts.glob("*/*.json")) == ["arc_easy.json", "openbookqa.json"]
    again = []
    monkeypatch.setattr(evaluation, "run_task", lambda lm, name, *rest: (again.append(name), real(lm, name, *rest))[1])
    assert main([*arguments, str(parts)]) == 0
    assert again == list(TASK_NAMES[2:])
    for name in ("table.md", "table.csv", "table.json"):
        assert (parts / name).read_text() == (whole / name).read_text()


def test_what_is_stored_is_not_run_and_its_model_not_loaded(checkpoint_dir, tmp_path, monkeypatch):
    first = evaluate(settings(checkpoint_dir, tmp_path, tasks=("piqa",)))
    monkeypatch.setattr(evaluation, "open_lm", lambda *_: pytest.fail("the model was loaded"))
    assert evaluate(settings(checkpoint_dir, tmp_path, tasks=("piqa",))) == first


def test_two_models_in_one_directory_do_not_mix(checkpoint_dir, tokenizer, tmp_path):
    other = export_checkpoint(
        random_model(7, vocab_size=len(tokenizer.tokenizer)), tokenizer, tmp_path / "b" / "dolly-tiny"
    )
    output = tmp_path / "out"
    [first] = evaluate(settings(checkpoint_dir, output, tasks=("piqa",)))
    [second] = evaluate(settings(other, output, tasks=("piqa",)))
    assert first.run.model == second.run.model == "dolly-tiny"  # the same name, other weights
    assert first.run.files_sha256 != second.run.files_sha256
    assert likelihoods(output, first) != likelihoods(output, second)
    assert [likelihoods(output, one) for one in evaluate(settings(checkpoint_dir, output, tasks=("piqa",)))] == [
        likelihoods(output, first)
    ]
    assert len(list(output.glob("*/piqa.json"))) == 2


def test_changed_data_are_run_again(checkpoint_dir, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(EVALS, data)
    [before] = evaluate(settings(checkpoint_dir, tmp_path / "out", data=data, tasks=("piqa",)))
    lines = (data / "piqa.jsonl").read_text().splitlines()
    (data / "piqa.jsonl").write_text("\n".join(lines[:5]))
    [after] = evaluate(settings(checkpoint_dir, tmp_path / "out", data=data, tasks=("piqa",)))
    assert (before.size, after.size) == (8, 5)


def test_all_layouts_of_one_model_score_alike(checkpoint_dir, tmp_path):
    plain = plain_hf(checkpoint_dir, tmp_path / "plain")
    old = copy_2023_layout(checkpoint_dir, tmp_path / "old")
    found = []
    for number, directory in enumerate((checkpoint_dir, plain, old)):
        results = evaluate(settings(directory, tmp_path / f"out{number}", tasks=("piqa", "boolq")))
        found.append([likelihoods(tmp_path / f"out{number}", result) for result in results])
    assert found[0] == found[1] == found[2]


def test_the_dolly_template_asks_the_same_as_an_instruction(checkpoint_dir, tokenizer, tmp_path, asked):
    [result] = evaluate(settings(checkpoint_dir, tmp_path, tasks=("piqa",), template="dolly"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir).eval()
    context, continuation = asked["piqa"][0][0][0]
    prompt, answer = tokenizer.encode(context), tokenizer.encode_text(continuation.lstrip())
    with torch.inference_mode():
        logs = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0], -1)
    expected = sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))
    assert likelihoods(tmp_path, result)[0][0] == pytest.approx(expected, abs=1e-4)
    assert result.obstacles == ["template dolly"] and result.exact is None


def test_limit_takes_the_first_documents(checkpoint_dir, tmp_path):
    [whole] = evaluate(settings(checkpoint_dir, tmp_path, tasks=("arc_easy",)))
    [some] = evaluate(settings(checkpoint_dir, tmp_path, tasks=("arc_easy",), limit=3))
    assert some.size == 3 and some.obstacles == ["limit 3"]
    for one, two in zip(likelihoods(tmp_path, some), likelihoods(tmp_path, whole)[:3], strict=True):
        assert one == pytest.approx(two, abs=1e-4)


def test_speed_is_stored(checkpoint_dir, tmp_path):
    for scorer in ("shared", "hf"):
        [result] = evaluate(settings(checkpoint_dir, tmp_path, tasks=("arc_easy",), scorer=scorer))
        speed = result.speed
        assert speed["requests"] == 32 and speed["seconds"] > 0 and 0 <= speed["padding_share"] < 0.5
        assert speed["tokens_computed"] < speed["tokens_asked"] or scorer == "hf"


# --- bad input ------------------------------------------------------------------------------------------------------


def said(capsys, *arguments: str, code: int = 2) -> str:
    """The one line on standard error."""
    capsys.readouterr()
    assert main(["eval", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "", out
    [line] = err.splitlines()
    assert line.startswith("dolly: ")
    return line


def test_unknown_names_suggest_the_nearest(checkpoint_dir, capsys):
    model, data = str(checkpoint_dir), ["--data", str(EVALS)]
    assert "unknown task 'piqaa'. Did you mean 'piqa'?" in said(capsys, model, *data, "--tasks", "boolq,piqaa")
    assert "Did you mean 'dolly'?" in said(capsys, model, *data, "--template", "doly")
    assert "Did you mean 'shared'?" in said(capsys, model, *data, "--scorer", "share")
    assert "--tasks names no task; allowed: openbookqa" in said(capsys, model, *data, "--tasks", ",")
    assert "--limit is 0" in said(capsys, model, *data, "--limit", "0")
    assert "--batch-size is '0'" in said(capsys, model, *data, "--batch-size", "0")
    assert "unknown dtype 'int2'" in said(capsys, model, *data, "--dtype", "int2")
    assert "'cuda:9' was asked for" in said(capsys, model, *data, "--device", "cuda:9")


def test_missing_files_and_directories(checkpoint_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    assert "no such directory" in said(capsys, str(checkpoint_dir), "--data", str(tmp_path / "none"))
    shutil.copy(EVALS / "piqa.jsonl", tmp_path)
    assert "openbookqa.jsonl: missing; the directory has piqa.jsonl" in said(
        capsys, str(checkpoint_dir), "--data", str(tmp_path)
    )
    assert "no model named" in said(capsys, "--data", str(EVALS))
    assert "no such directory" in said(capsys, "no/such/model/here", "--data", str(EVALS))


BAD_ROWS = [
    ("piqa", b"{", "not JSON"),
    ("piqa", b'{"goal": "caf\xe9"}', "not JSON in UTF-8"),
    ("piqa", b"[1]", "must be a JSON object, found list"),
    ("piqa", b'{"goal": "x", "sol1": "a", "label": 0}', "column sol2 is missing; found goal, label, sol1"),
    ("piqa", b'{"goal": "x", "sol1": "a", "sol2": 5, "label": 0}', "sol2 must be text, found int"),
    ("piqa", b'{"goal": "x", "sol1": "a", "sol2": "b", "label": 2}', "label is 2, expected 0 to 1"),
    ("boolq", b'{"passage": "x", "question": "q", "label": true}', "label is True"),
    ("winogrande", b'{"sentence": "x", "option1": "a", "option2": "b", "answer": "1"}', "has no _"),
    ("winogrande", b'{"sentence": "_", "option1": "a", "option2": "b", "answer": "3"}', "answer is '3'"),
    ("arc_easy", b'{"question": "x", "choices": ["a"], "answerKey": "A"}', "choices must be"),
    ("arc_easy", b'{"question": "x", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}', "2 texts"),
    ("openbookqa", b'{"question_stem": "x", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}',
     "answerKey is 'C'"),
    ("hellaswag", b'{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["x"], "label": "0"}', "four texts"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "row", "says"), BAD_ROWS)
def test_a_malformed_row_is_named_by_its_line(tmp_path, task, row, says):
    good = (EVALS / f"{task}.jsonl").read_bytes().splitlines()
    (tmp_path / f"{task}.jsonl").write_bytes(b"\n".join([*good[:2], b"", row, *good[2:]]))
    with pytest.raises(SettingError) as caught:
        read_rows(tmp_path / f"{task}.jsonl", task)
    assert f"{task}.jsonl:4: " in str(caught.value) and says in str(caught.value)


def test_an_empty_file_is_said(tmp_path):
    (tmp_path / "piqa.jsonl").write_text("\n\n")
    with pytest.raises(SettingError, match="has no rows; the card's piqa has 1838"):
        read_rows(tmp_path / "piqa.jsonl", "piqa")


def test_keys_are_needed_for_the_template_only(gptj_dir, tmp_path, capsys):
    arguments = (str(gptj_dir), "--data", str(EVALS), "--tasks", "piqa", "--output", str(tmp_path))
    assert "must be a single token" in said(capsys, *arguments, "--template", "dolly")
    assert main(["eval", *arguments]) == 0


def test_a_model_that_does_not_fit_is_refused_with_numbers(checkpoint_dir, capsys, monkeypatch):
    monkeypatch.setattr(model_under_test, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(evaluation, "load_network", lambda *_: pytest.fail("it was loaded"))
    line = said(capsys, str(checkpoint_dir), "--data", str(EVALS), "--dtype", "fp32", "--device", "cpu")
    assert "weights need 0.00 GB on cpu in float32, 0.00 GB are free" in line


def test_damaged_models_are_refused(checkpoint_dir, tmp_path, capsys):
    copies = iter(range(99))

    def broken(change) -> str:
        directory = plain_hf(checkpoint_dir, tmp_path / f"copy{next(copies)}")
        change(directory)
        return said(capsys, str(directory), "--data", str(EVALS), "--tasks", "piqa", "--output", str(tmp_path / "out"))

    def config(**changes):
        def write(directory: Path) -> None:
            path = directory / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return write

    assert "no weights" in broken(lambda directory: (directory / "model.safetensors").unlink())
    assert "model_type 'llamo'" in broken(config(model_type="llamo"))
    assert "no causal language model" in broken(config(model_type="clip"))
    assert "another shape" in broken(config(intermediate_size=128))
    assert "is in no weight file" in broken(config(num_hidden_layers=4))
    assert "the tokenizer has ids up to" in broken(config(vocab_size=1000))
    assert "no usable tokenizer" in broken(lambda directory: (directory / "tokenizer.json").write_text("{"))
    assert "cannot be loaded" in broken(lambda directory: (directory / "model.safetensors").write_bytes(b"x" * 99))


def test_code_of_a_repository_is_never_run(checkpoint_dir, tmp_path, capsys):
    directory = plain_hf(checkpoint_dir, tmp_path / "trap")
    (directory / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    code = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    path.write_text(json.dumps(raw | {"auto_map": code}))
    arguments = (str(directory), "--data", str(EVALS), "--tasks", "piqa", "--output", str(tmp_path / "out"))
    assert main(["eval", *arguments]) == 0
    path.write_text(json.dumps(raw | {"auto_map": code, "model_type": "trap"}))
    said(capsys, *arguments)
    assert not (tmp_path / "ran").exists()


def test_a_changed_file_under_a_manifest_is_refused(checkpoint_dir, tmp_path, capsys):
    directory = tmp_path / "changed"
    shutil.copytree(checkpoint_dir, directory)
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert "its content changed" in said(capsys, str(directory), "--data", str(EVALS))


def test_a_check_that_cannot_pass_is_refused_before_anything_runs(checkpoint_dir, capsys):
    check = ("--data", str(EVALS), "--check-against", "card")
    assert "no row of that name" in said(capsys, str(checkpoint_dir), *check)
    assert "--limit" in said(capsys, str(checkpoint_dir), *check, "--row", "dolly-v2-3b", "--limit", "5")


def test_a_failed_check_is_exit_code_1(checkpoint_dir, tmp_path, capsys):
    arguments = ["eval", str(checkpoint_dir), "--data", str(EVALS), "--output", str(tmp_path)]
    assert main([*arguments, "--check-against", "card", "--row", "dolly-v2-3b"]) == 1
    assert "does NOT reproduce dolly-v2-3b" in capsys.readouterr().out
    assert main([*arguments, "--check-against", "card", "--row", "dolly-v2-3b", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["check"]["passed"] is False and "not the card's data" in facts["check"]["failures"][0]
    assert facts["this"]["model"] == "dolly-tiny"


def test_without_network_and_data_the_reason_is_one_line(checkpoint_dir, tmp_path, capsys, monkeypatch):
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    line = said(capsys, str(checkpoint_dir), "--tasks", "piqa")
    assert "piqa: its data set cannot be had from the hub; give local files with --data" in line


# --- exactness ------------------------------------------------------------------------------------------------------


def test_invented_rows_are_not_exact():
    [found] = verify(["piqa"], EVALS)
    assert found["exact"] is False and found["note"] == "8 documents, the card's set has 1838"


@needs_shared_data
@pytest.mark.parametrize("task", ["openbookqa", "winogrande", "arc_challenge", "arc_easy", "piqa", "boolq"])
def test_the_sets_of_the_card_are_exact(task, tmp_path):
    with card_tasks([task], SHARED_DATA / "evals") as tasks:
        requests, gold = requests_and_gold(tasks[task].task)
    assert is_exact(task, requests, gold)
    assert not is_exact(task, requests, [1 - gold[0], *gold[1:]])
    changed = [(requests[0][0][0], requests[0][0][1] + "."), *requests[0][1:]]
    assert not is_exact(task, [changed, *requests[1:]], gold)
    assert not is_exact(task, [requests[1], requests[0], *requests[2:]], [gold[1], gold[0], *gold[2:]])


@needs_shared_data
def test_hellaswag_is_reported_as_not_exact(capsys):
    data = SHARED_DATA / "evals"
    assert main(["eval", "--verify-data", "--data", str(data), "--tasks", "hellaswag", "openbookqa"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["openbookqa", "openbookqa.jsonl"],
        ["hellaswag", "hellaswag.jsonl"],
        ["hellaswag", "hellaswag_1000.jsonl"],
        ["hellaswag", "hellaswag_approx.jsonl"],
    ]
    assert [" NOT exact" in line for line in lines] == [False, True, True, True]
    assert main(["eval", "--verify-data", "--data", str(data), "--tasks", "openbookqa"]) == 0
