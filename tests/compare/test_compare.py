"""dolly compare on tiny models: losses by their definition, greedy answers, an interval that covers, a safe page."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli import main
from modelscope_dolly.compare import compare_report
from modelscope_dolly.compare.answers import ModelAnswer, ModelAnswers
from modelscope_dolly.compare.held_out import HeldOutRecord, read_held_out, spread
from modelscope_dolly.compare.marking_page import page
from modelscope_dolly.compare.paired_bootstrap import paired_interval
from modelscope_dolly.compare.side_by_side import ComparedModel, Comparison, compare
from modelscope_dolly.errors import SettingError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.load import load
from modelscope_dolly.prompt import CONTROL_KEYS
from tests.support.models import random_model

EVIL = "</pre></script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> & \x00\u2028"


@pytest.fixture(scope="module")
def held_out(records) -> list[HeldOutRecord]:
    fields = ("instruction", "context", "response")
    return [HeldOutRecord(*(record[name] for name in fields)) for record in spread(records, 9)]


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory, tokenizer) -> Path:
    target = tmp_path_factory.mktemp("other") / "dolly-other"
    return export_checkpoint(random_model(5, vocab_size=len(tokenizer.tokenizer)), tokenizer, target)


@pytest.fixture(scope="module")
def comparison(checkpoint_dir, other_dir, held_out) -> Comparison:
    models = [ComparedModel(str(path), None, path.name) for path in (checkpoint_dir, other_dir)]
    return compare(*models, held_out, max_new_tokens=12, device="cpu", dtype="fp32")


def file_of(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_losses_are_those_of_the_definition_and_answers_are_greedy(comparison, checkpoint_dir, tokenizer, held_out):
    model, dolly = GPTNeoXForCausalLM.from_pretrained(checkpoint_dir).eval(), load(checkpoint_dir, device="cpu")
    total = count = 0
    for record, answer in zip(held_out, comparison.models[0].answers, strict=True):
        ids, prompt = tokenizer.encode_example(record.instruction, record.context, record.response)
        labels = torch.tensor([[-100] * prompt + ids[prompt:]])
        with torch.inference_mode():
            mean = float(model(torch.tensor([ids]), labels=labels).loss)
        assert answer.loss == pytest.approx(mean * (len(ids) - prompt), rel=1e-4)
        total, count = total + answer.loss, count + len(ids) - prompt
        settings = GenerationSettings().updated({"do_sample": False, "max_new_tokens": 12})
        [[update]] = dolly.text_generator.generate([Prompt(record.instruction, record.context or None)], settings, 1)
        assert (answer.text, answer.new_tokens) == (update.text, update.new_tokens)
    assert comparison.loss(0) == pytest.approx(total / count)
    assert comparison.interval.difference == pytest.approx(comparison.loss(1) - comparison.loss(0))
    assert sum(comparison.wins) == len(held_out) and comparison.same_tokens


def test_a_model_against_itself_is_no_different(checkpoint_dir, held_out):
    model = ComparedModel(str(checkpoint_dir), None, "one")
    same = compare(model, model, held_out[:3], max_new_tokens=4, device="cpu")
    assert same.interval == (0.0, 0.0, 0.0) and same.wins == (0, 0)
    assert all(first.text == second.text for first, second in same.pairs)


def test_a_base_model_gets_the_keys_as_in_training(checkpoint_dir, held_out, tmp_path, tokenizer):
    base = tmp_path / "base"
    shutil.copytree(checkpoint_dir, base)
    (base / "manifest.json").unlink()
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in CONTROL_KEYS]
    (base / "tokenizer.json").write_text(json.dumps(content))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (base / name).unlink(missing_ok=True)
    first, second = (ComparedModel(str(path), None, path.name) for path in (base, checkpoint_dir))
    found = compare(first, second, held_out[:2], max_new_tokens=4, device="cpu")
    assert found.interval.difference == 0.0


def test_what_there_is_no_time_for_is_left_out_and_said(checkpoint_dir, other_dir, held_out):
    models = [ComparedModel(str(path), None, path.name) for path in (checkpoint_dir, other_dir)]
    some = compare(*models, held_out, max_new_tokens=4, minutes=1e-9, device="cpu")
    assert (len(some.records), some.wanted) == (8, 9)  # a batch is finished
    assert "time for 8 of 9 records" in compare_report.text(some)


# The interval


def test_the_interval_is_known_and_pairs_cancel_what_both_find_hard():
    draw = random.Random(1)
    hard = [draw.uniform(1, 100) for _ in range(50)]
    better = [value - 1 + draw.gauss(0, 0.1) for value in hard]
    difference, low, high = paired_interval(hard, better, [1] * 50)
    assert low < difference < high < -0.9 and high - low < 0.1
    assert paired_interval(hard, better, [1] * 50) == (difference, low, high)
    assert paired_interval([3.0], [1.0], [4]) == (-0.5, None, None)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw, covered, runs = random.Random(2), 0, 80
    for _ in range(runs):
        tokens = [draw.randint(5, 50) for _ in range(40)]
        first = [count * 2.0 for count in tokens]
        second = [count * (2.0 + draw.gauss(-0.1, 0.3)) for count in tokens]
        _, low, high = paired_interval(first, second, tokens)
        covered += low < -0.1 < high
    assert 0.86 < covered / runs <= 1


# Command


def test_the_command_writes_a_table_json_and_the_page(checkpoint_dir, other_dir, held_out, tmp_path, capsys):
    data = file_of(tmp_path / "held-out.jsonl", [vars(record) for record in held_out[:3]])
    out = tmp_path / "out"
    arguments = [
        "compare",
        str(checkpoint_dir),
        str(other_dir),
        "--data",
        data,
        "--output",
        str(out),
        "--device",
        "cpu",
    ]
    arguments += ["--max-new-tokens", "4"]
    assert main([*arguments, "--names", "before", "after", "--blind"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["before", "after"] and "after minus before: " in printed
    assert "paired bootstrap, 10,000 resamples" in printed and (out / "compare.txt").read_text() in printed
    facts = json.loads((out / "compare.json").read_text())
    assert [model["name"] for model in facts["models"]] == ["before", "after"] and len(facts["records"]) == 3
    assert '<body class="blind"' in (out / "compare.html").read_text()
    assert main([*arguments, "--json", "--records", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["records"]) == 1 and [model["name"] for model in facts["models"]] == ["dolly-tiny", "dolly-other"]


@pytest.mark.parametrize(
    ("rows", "flags", "says"),
    [
        ([{"instruction": "a"}, {"instruction": " "}], [], "held-out.jsonl:2: instruction is empty"),
        ([{"instruction": "a", "response": 5}], [], "held-out.jsonl:1: response must be a string, found int"),
        ([{"response": "a"}], [], "held-out.jsonl:1: instruction must be a string, found NoneType"),
        ([], [], "held-out.jsonl: holds no records"),
        (None, [], "held-out.jsonl: missing"),
        ([{"instruction": "a"}], ["--records", "0"], "--records is 0, it must be at least 1"),
        ([{"instruction": "a"}], ["--minutes", "nan"], "--minutes is nan, it must be above 0"),
        ([{"instruction": "a"}], ["--max-new-tokens", "x"], "--max-new-tokens: invalid int value"),
        ([{"instruction": "a"}], ["--dtype", "int2"], "unknown dtype 'int2'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(checkpoint_dir, tmp_path, capsys, rows, flags, says):
    data = str(tmp_path / "held-out.jsonl") if rows is None else file_of(tmp_path / "held-out.jsonl", rows)
    model, out = str(checkpoint_dir), tmp_path / "out"
    assert main(["compare", model, model, "--data", data, "--output", str(out), *flags]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and len(captured.err.splitlines()) == 1 and not captured.out and not out.exists()


def test_records_are_read_with_what_they_lack(tmp_path):
    path = Path(file_of(tmp_path / "a.jsonl", [{"instruction": "a", "context": None}, {"instruction": "b"}]))
    assert read_held_out(path, 1) == [HeldOutRecord("a")] and len(read_held_out(path)) == 2
    with pytest.raises(SettingError, match="there are no records"):
        compare(ComparedModel("a", None, "a"), ComparedModel("b", None, "b"), [])


def test_without_answers_of_people_there_is_no_loss_and_the_answers_remain(checkpoint_dir):
    model = ComparedModel(str(checkpoint_dir), None, "one")
    found = compare(model, model, [HeldOutRecord("Why?"), HeldOutRecord("word " * 3000)], 4, device="cpu")
    text = compare_report.text(found)
    assert found.interval is None and "there is no held-out loss" in text
    assert "1 prompts leave no room for an answer" in text and "loss" not in text.splitlines()[1]


# The page


def made_up(text: str, count: int = 6) -> Comparison:
    answers = [ModelAnswer(f"{text} {number}", "stop", 3, 1.5 * (number + 1), (1, 2)) for number in range(count)]
    model = ModelAnswers("m", "float32", "cpu", answers, 1.0)
    records = [HeldOutRecord(f"{text} {number}", text, text) for number in range(count)]
    return Comparison((f"{text}1", f"{text}2"), (model, model), records, count)


def test_the_page_asks_nobody_for_anything_and_its_text_is_text():
    made = page(made_up(EVIL))
    assert made.count("<script") == 1 and "<img" not in made and "\x00" not in made
    assert "http" not in made.replace("http-equiv", "") and " src=" not in made.replace("&lt;img src=", "")
    assert "default-src 'none'" in made and math.isfinite(len(made))


def test_a_person_can_mark_hide_the_names_and_export(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is of the extra dev")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium here")
    file = tmp_path / "compare.html"
    file.write_text(page(made_up(EVIL)), encoding="utf-8")
    asked = []
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(accept_downloads=True)
        tab = context.new_page()
        errors = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        assert tab.title() == "Two models, 6 instructions" and tab.locator("article").count() == 6
        first = tab.locator("article").first
        first.locator("button[data-choice=second]").click()
        first.locator("textarea").fill("clear <b>")
        tab.locator("article").nth(1).locator("button[data-choice=bad]").click()
        assert tab.locator("#state").text_content().startswith("2 of 6 marked: ")
        tab.reload()
        assert first.locator("button[data-choice=second]").get_attribute("aria-pressed") == "true"
        assert first.locator("textarea").input_value() == "clear <b>"
        assert first.locator("h3").first.is_visible()
        tab.locator("#blind").check()
        assert not first.locator("h3").first.is_visible()
        assert tab.locator("#state").text_content() == "2 of 6 marked"
        with tab.expect_download() as download:
            tab.locator("#export").click()
        marks = json.loads(Path(download.value.path()).read_text())
        browser.close()
    assert marks["marks"][0]["choice"] == "second" and marks["marks"][0]["note"] == "clear <b>"
    assert marks["models"][0].startswith("</pre>") and marks["marks"][2].get("choice") is None
    assert errors == [] and {url.split(":")[0] for url in asked} <= {"file", "blob"}


def test_names_hidden_the_order_of_the_answers_differs_between_records():
    made = page(made_up("x", 40), blind=True)
    assert 8 < made.count('class="swap"') < 32


def test_times_are_counted(comparison):
    assert all(0 < model.seconds < time.monotonic() for model in comparison.models)
