"""Samples are greedy answers of the weights as they are, whatever shards them, and are shown in every place."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modelscope_dolly.errors import SettingError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.load import load
from tests.support.training_runs import STEPS, complete, material, needs_deepspeed, write_recipe
from train.config import build
from train.data.validate import TrainingRecord
from train.training.report_sections import samples_section
from train.training.samples import SampleAnswer, Samples, as_text, send

ASKED = [
    "Name three colours.",
    {"instruction": "What is it about?", "context": "A note on `dew`."},
    "Why does it rain?",
]
STEPS_TOLD = [0, 4, 8, 12, 16]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def greedy(model: Path, limit: int) -> list[str]:
    """What the engine answers."""
    dolly = load(model, device="cpu", dtype="fp32")
    settings = GenerationSettings().updated({"do_sample": False, "max_new_tokens": limit})
    prompts = [Prompt(one) if isinstance(one, str) else Prompt(**one) for one in ASKED]
    return [update.text for [update] in dolly.text_generator.generate(prompts, settings, 2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one process that tells TensorBoard."""
    folder = tmp_path_factory.mktemp("samples")
    changes = {"samples": ASKED, "sample_tokens": 12, "report_to": "tensorboard", "learning_rate": 5e-3}
    return complete(write_recipe(folder, **changes))


def test_they_are_the_greedy_answers_of_the_base_and_of_the_result(run):
    found = rows(run.folder / "run")
    assert [row["step"] for row in found] == [step for step in STEPS_TOLD for _ in ASKED]
    assert [row["answer"] for row in found[:3]] == greedy(material() / "base", 12)
    assert [row["answer"] for row in found[-3:]] == greedy(run.folder / "run" / "final", 12)
    assert found[1]["context"] == "A note on `dew`." and found[:3] != found[-3:] and STEPS_TOLD[-1] == STEPS


def test_the_log_the_report_and_tensorboard_show_them(run):
    assert "step 16: samples\n  Name three colours. -> " in run.stdout()
    report = (run.folder / "run" / "report.md").read_text()
    assert "**Sample 2**\n\n```text\nWhat is it about?\n\nA note on `dew`.\n```" in report and "Step 0" in report
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [events] = (run.folder / "run" / "tensorboard").rglob("events.out.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    told = reader.Tensors("samples/text_summary")
    assert [event.step for event in told] == STEPS_TOLD
    assert "Name three colours." in told[0].tensor_proto.string_val[0].decode()


@needs_deepspeed
@pytest.mark.parametrize("zero_stage", ["0", "2", "3"])
def test_two_processes_give_the_same_answers_at_every_stage(run, tmp_path, zero_stage):
    changes = {"samples": ASKED, "sample_tokens": 12, "learning_rate": 5e-3, "epochs": 2}
    complete(write_recipe(tmp_path, **changes), "--zero-stage", zero_stage, world=2)
    assert rows(tmp_path / "run") == rows(run.folder / "run")[: 3 * 3]  # up to step 8
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"] > 0


def test_a_resume_cuts_what_comes_after_its_checkpoint(tokenizer, tmp_path):
    samples = Samples(config(samples=["Why?"], output_dir=str(tmp_path)), tokenizer, [])
    samples.start(0)
    for step in (0, 4, 8):
        samples.record([SampleAnswer(step, "Why?", "", "So.", True)])
    with open(samples.path, "a") as file:
        file.write('{"step": 9, "instr')  # killed
    samples.start(4)
    assert [row["step"] for row in map(json.loads, samples.path.read_text().splitlines())] == [0, 4]


def records(count: int) -> list[TrainingRecord]:
    return [TrainingRecord(f"Question {number}?", "", "So.", number) for number in range(count)]


def config(**changes):
    return build({"model": "m", "dataset": "d", "output_dir": "o", **changes}).config


def test_a_number_takes_held_out_records(tokenizer):
    assert Samples(config(samples=2), tokenizer, records(3)).prompts == [("Question 0?", ""), ("Question 1?", "")]
    with pytest.raises(SettingError, match="samples is 4, but 3 records are held out"):
        Samples(config(samples=4), tokenizer, records(3))


def test_one_that_leaves_no_room_is_refused_before_the_training(tokenizer):
    with pytest.raises(SettingError, match=r"a sample of \d+ tokens \('word word .*lower sample_tokens"):
        Samples(config(samples=["word " * 3000]), tokenizer, [])


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (-1, "samples is -1, it must be 0 to 100, or a list of as many instructions"),
        (["a"] * 101, "it must be 0 to 100"),
        ([" "], "entry 1 of samples is ' ', it must be text or {instruction: ..., context: ...}"),
        ([{"context": "a"}], "entry 1 of samples is {'context': 'a'}"),
        ([5], "entry 1 of samples is 5"),
        ("a", "samples is 'a', it must be a whole number, or a list of instructions"),
        (True, "samples is True, it must be a whole number"),
    ],
)
def test_a_wrong_sample_is_named(samples, says):
    with pytest.raises(SettingError) as caught:
        config(samples=samples)
    assert says in str(caught.value)


def test_an_answer_ends_where_the_model_ends_it(tokenizer):
    samples = Samples(config(samples=["a", "b"], sample_tokens=5), tokenizer, [])
    colour = tokenizer.encode_text("red")[0]
    script = {"a": [colour, tokenizer.control.end], "b": [colour] * 5}
    calls = []

    def logits(inputs, places):
        lengths = inputs["record_lengths"]
        calls.append(len(lengths))
        answered = [length - len(samples.ids[0]) for length in lengths]
        wanted = [script["a"], script["b"]][-len(lengths) :]
        made = torch.zeros(len(lengths), 2000)
        for row, (ids, at) in enumerate(zip(wanted, answered, strict=True)):
            made[row, ids[at]] = 1
        return made

    first, second = samples.answer(logits, 7, 0, 1, torch.device("cpu"))
    assert (first.answer, first.ended, first.step) == (tokenizer.decode([colour]), True, 7)
    assert (second.answer, second.ended) == (tokenizer.decode([colour] * 5), False)
    assert calls == [2, 2, 1, 1, 1]


def test_swanlab_and_wandb_get_text():
    """Neither is installed with this project: stand-ins with the names of their functions."""
    answers = [SampleAnswer(4, "Why?", "", "So.", True)]
    sent = []
    swanlab = SimpleNamespace(
        get_run=lambda: object(),
        Text=lambda text, caption: (text, caption),
        log=lambda *one, **two: sent.append((one, two)),
    )
    wandb = SimpleNamespace(run=object(), Table=lambda columns, data: data, log=lambda row: sent.append(row))
    idle = SimpleNamespace(_wandb=SimpleNamespace(run=None))
    send(answers, [SimpleNamespace(_swanlab=swanlab), SimpleNamespace(_wandb=wandb), idle, object()])
    assert sent == [
        (({"samples": [("So.", "Why?")]},), {"step": 4}),
        {"samples": [[4, "Why?", "", "So."]], "train/global_step": 4},
    ]
    assert as_text(answers) == "**Why?**\n\nSo."


def test_the_report_shows_an_answer_once_for_all_the_steps_that_gave_it(tmp_path):
    path = tmp_path / "samples.jsonl"
    told = [(0, "```a", False), (4, "b", True), (8, "b", True)]
    lines = [vars(SampleAnswer(step, "Why?", "", answer, ended)) for step, answer, ended in told]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = "\n\n".join(samples_section(path))
    assert "Step 0:\n\n````text\n```a ...\n````" in text and "Step 4 to 8:\n\n```text\nb\n```" in text
    assert samples_section(tmp_path / "none") == []
