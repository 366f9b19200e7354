"""The ModelScope pipeline, loaded by ModelScope's own builder."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from modelscope.models import Model
from modelscope.msdatasets import MsDataset
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
from modelscope.utils.input_output import (
    call_pipeline_with_json,
    get_pipeline_information_by_pipeline,
    get_task_schemas,
    pipeline_output_to_service_base64_output,
)
from transformers import AutoModelForCausalLM

from modelscope_dolly import DollyForTextGeneration, DollyTextGenerationPipeline, dolly_pipeline
from modelscope_dolly.errors import HardwareError, PromptError, SettingError
from modelscope_dolly.generation import parse_input
from modelscope_dolly.pipeline import DollyChatPipeline
from modelscope_dolly.prompt import DollyTokenizer
from tests.support.layouts import copy_2023_layout, plain_hf

GREEDY = {"do_sample": False, "max_new_tokens": 24}
CONTEXT = "The diary was written by Samuel Pepys."
#: A conversation; what dolly is asked is the last question, with the system message as context.
TURNS = [
    {"role": "system", "content": CONTEXT},
    {"role": "user", "content": "What is a diary?"},
    {"role": "assistant", "content": "A book."},
    {"role": "user", "content": "Who wrote it?"},
]


@pytest.fixture(scope="module")
def pipe(checkpoint_dir) -> DollyTextGenerationPipeline:
    return pipeline(Tasks.text_generation, model=str(checkpoint_dir), device="cpu")


@pytest.fixture(scope="module")
def questions(records) -> list[dict]:
    return [{key: record[key] for key in ("instruction", "context")} for record in records[:6]]


def test_modelscope_builds_our_pipeline_and_our_model(pipe, checkpoint_dir):
    assert type(pipe) is DollyTextGenerationPipeline
    assert type(Model.from_pretrained(str(checkpoint_dir), device="cpu")) is DollyForTextGeneration


def test_greedy_text_is_what_transformers_generates(pipe, checkpoint_dir, questions, tokenizer: DollyTokenizer):
    import torch

    oracle = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    for question in questions:
        ids = tokenizer.encode(question["instruction"], question["context"])
        made = oracle.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=list(tokenizer.control.stop)
        )[0, len(ids) :].tolist()
        expected = tokenizer.decode([i for i in made if i not in tokenizer.control.stop]).strip()
        assert pipe(question, **GREEDY) == {"text": expected}


def test_list_batch_stream_and_single_agree_greedy_and_sampled(pipe, questions):
    for settings in (GREEDY, {"seed": 5, "max_new_tokens": 24}):
        single = [pipe(question, **settings) for question in questions]
        assert pipe(questions, **settings) == single
        assert pipe(questions, batch_size=1, **settings) == single
        assert pipe(questions, batch_size=4, **settings) == single
        assert [list(pipe.stream_generate(q, **settings))[-1] for q in questions] == single


def test_text_and_dict_inputs_mean_the_same(pipe, questions):
    instruction = questions[0]["instruction"]
    expected = pipe(instruction, **GREEDY)
    for value in ({"instruction": instruction}, {"text": instruction}, {"instruction": instruction, "context": ""}):
        assert pipe(value, **GREEDY) == expected


def test_a_context_beside_the_input_is_the_context_of_each_that_has_none(pipe):
    asked = [{"instruction": "Who wrote it?", "context": CONTEXT}, {"instruction": "When?", "context": CONTEXT}]
    expected = pipe(asked, **GREEDY)
    assert pipe("Who wrote it?", context=CONTEXT, **GREEDY) == pipe("Who wrote it?", CONTEXT, **GREEDY) == expected[0]
    assert pipe(["Who wrote it?", {"text": "When?", "context": ""}], context=CONTEXT, **GREEDY) == expected
    assert [*pipe.stream_generate("Who wrote it?", context=CONTEXT, **GREEDY)][-1] == expected[0]
    assert expected[0] != pipe("Who wrote it?", **GREEDY)


def test_a_conversation_is_answered_with_a_message(pipe):
    text = pipe({"instruction": "Who wrote it?", "context": CONTEXT}, **GREEDY)["text"]
    expected = {"message": {"role": "assistant", "content": text}}
    assert pipe({"messages": TURNS}, **GREEDY) == expected
    assert pipe(TURNS, **GREEDY) == expected  # as ModelScope's server hands it over
    assert pipe([{"messages": TURNS}, TURNS, "Why?"], **GREEDY) == [expected, expected, pipe("Why?", **GREEDY)]
    assert [*pipe.stream_generate({"messages": TURNS}, **GREEDY)][-1] == expected
    assert pipe({"messages": TURNS[2:]}, CONTEXT, **GREEDY) == expected
    several = pipe({"messages": TURNS}, num_return_sequences=2, seed=1, max_new_tokens=4)
    assert [list(answer) for answer in several] == [["message"], ["message"]]


def test_modelscopes_chat_task_answers_everything_with_a_message(pipe):
    chat = pipeline(Tasks.chat, model=pipe.model)
    assert type(chat) is DollyChatPipeline and (chat.group_key, pipe.group_key) == ("chat", "text-generation")
    assert chat({"messages": TURNS}, **GREEDY) == pipe({"messages": TURNS}, **GREEDY)
    assert chat("Why?", **GREEDY)["message"]["content"] == pipe("Why?", **GREEDY)["text"]


def test_modelscope_builds_the_chat_pipeline_from_a_directory(checkpoint_dir):
    assert type(pipeline(Tasks.chat, model=str(checkpoint_dir), device="cpu")) is DollyChatPipeline


@pytest.fixture(scope="module")
def call(pipe) -> Callable[[dict], dict]:
    """What POST /call of `modelscope server` does with a body, with ModelScope's own functions."""
    information = {"task_name": pipe.group_key, "schema": get_task_schemas(pipe.group_key)}

    def answer(body: dict) -> dict:
        result = call_pipeline_with_json(information, pipe, body)
        return pipeline_output_to_service_base64_output(information["task_name"], result)

    return answer


def bodies(pipe) -> list[tuple[dict, dict]]:
    """Bodies of a request to the server, and their answers."""
    asked = {"instruction": "Who wrote it?", "context": CONTEXT}
    text = pipe(asked, **GREEDY)
    message = {"message": {"role": "assistant", "content": text["text"]}}
    return [
        ({"input": "Who wrote it?", "parameters": {"context": CONTEXT, **GREEDY}}, text),
        ({"input": {"text": "Who wrote it?"}, "parameters": {"context": CONTEXT, **GREEDY}}, text),
        ({"input": {"text": asked}, "parameters": GREEDY}, text),
        ({"input": {"messages": TURNS}, "parameters": GREEDY}, message),
    ]


def test_the_functions_of_modelscopes_server_keep_the_context(pipe, call):
    for body, expected in bodies(pipe):
        assert call(body) == expected
    with pytest.raises(SettingError, match="give max_new_tokens"):
        call({"input": "Why?", "parameters": {"max_length": 50}})


def test_modelscopes_server_keeps_the_context(pipe):
    fastapi = pytest.importorskip("fastapi", reason="fastapi is not installed; modelscope[server] brings it")
    from fastapi.testclient import TestClient
    from modelscope.server.api.routers.router import api_router

    app = fastapi.FastAPI()
    app.include_router(api_router)
    app.state.pipeline = pipe
    app.state.pipeline_info = {"task_name": pipe.group_key, "schema": get_task_schemas(pipe.group_key)}
    with TestClient(app) as client:
        for body, expected in bodies(pipe):
            answer = client.post("/call", json=body)
            assert (answer.status_code, answer.json()) == (200, expected)


@pytest.mark.parametrize("task", [Tasks.text_generation, Tasks.chat])
def test_modelscopes_deploy_checker_reads_our_pipelines(pipe, task):
    found = get_pipeline_information_by_pipeline(pipeline(task, model=pipe.model))
    assert found.task_name == task and found.input_schema


def test_dataset_gives_a_generator_in_row_order(pipe, records, tmp_path):
    import json

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({**record, "number": i}) for i, record in enumerate(records[:11])))
    rows = MsDataset.load("json", data_files=str(file), split="train")
    answers = pipe(rows, batch_size=4, **GREEDY)
    assert iter(answers) is answers
    assert list(answers) == pipe(records[:11], **GREEDY)


def test_dataset_of_conversations_gives_messages(pipe, tmp_path):
    import json

    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": turns, "source": "us"}) for turns in (TURNS, TURNS[1:])))
    rows = MsDataset.load("json", data_files=str(file), split="train")
    assert list(pipe(rows, **GREEDY)) == pipe([TURNS, TURNS[1:]], **GREEDY)


def test_several_sequences_come_as_lists_with_consecutive_seeds(pipe, questions):
    several = pipe(questions[:2], num_return_sequences=3, seed=7, max_new_tokens=12)
    for question, answers in zip(questions, several, strict=False):
        assert answers == [pipe(question, seed=seed, max_new_tokens=12) for seed in (7, 8, 9)]


def test_full_text_puts_the_instruction_and_a_newline_first(pipe, questions):
    bare = pipe(questions[0], **GREEDY)["text"]
    assert pipe(questions[0], return_full_text=True, **GREEDY)["text"] == f"{questions[0]['instruction']}\n{bare}"


def test_pipeline_options_are_defaults_of_its_calls(checkpoint_dir, pipe, questions):
    other = pipeline(Tasks.text_generation, model=str(checkpoint_dir), device="cpu", do_sample=False, max_new_tokens=24)
    assert other(questions[0]) == pipe(questions[0], **GREEDY)


def test_empty_list_is_an_empty_list(pipe):
    assert pipe([]) == []


def test_closing_a_stream_early_leaves_the_pipeline_usable(pipe, questions):
    stream = pipe.stream_generate(questions[0], seed=1, max_new_tokens=50)
    next(stream)
    inside = pipe(questions[1], **GREEDY)
    stream.close()
    assert pipe(questions[1], **GREEDY) == inside


def test_threads_get_the_answers_of_sequential_calls(pipe, questions):
    expected = [pipe(question, seed=i, max_new_tokens=20) for i, question in enumerate(questions)]
    found: list = [None] * len(questions)

    def ask(i: int) -> None:
        found[i] = pipe(questions[i], seed=i, max_new_tokens=20)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda pipe: pipe("hello", temprature=2.0), SettingError, "Did you mean 'temperature'"),
        (lambda pipe: pipe("hello", batch_size=0), SettingError, "batch_size is 0"),
        (lambda pipe: pipe("hello", 5), PromptError, "context must be a string, found int"),
        (lambda pipe: pipe({"text": "a", "context": "b"}, context="c"), PromptError, "there are two contexts"),
        (lambda pipe: pipe({"messages": []}), PromptError, "none of the 0 messages has the role 'user'"),
        (lambda pipe: pipe("hello", max_length=50), SettingError, "max_length .* give max_new_tokens"),
        (
            lambda pipe: pipe("hello", eos_token_id=2, pad_token_id=0),
            SettingError,
            "eos_token_id .* give stop .*pad_token",
        ),
        (lambda pipe: pipe.stream_generate("hello", bos_token_id=1), SettingError, "bos_token_id is not a keyword"),
        (lambda pipe: pipe("hello", batch_size=np.arange(2)), SettingError, "batch_size is array"),
        (lambda pipe: dolly_pipeline(None), SettingError, "model is None"),
        (lambda pipe: dolly_pipeline("a/b", model_revision=5), SettingError, "revision is 5"),
        (lambda pipe: DollyForTextGeneration(None), SettingError, "model is None"),
        (lambda pipe: pipe(""), PromptError, "instruction is empty"),
        (lambda pipe: pipe(["good", ""]), PromptError, "instruction is empty"),
        (lambda pipe: pipe(7), PromptError, "found int"),
        (lambda pipe: pipe({"instruction": "a", "contxt": "b"}), PromptError, "Did you mean 'context'"),
        (lambda pipe: pipe("word " * 3000), PromptError, "the window 2048"),
        (lambda pipe: pipe.stream_generate("hello", num_return_sequences=2), SettingError, "a stream is one answer"),
    ],
)
def test_bad_input_is_one_clear_error(pipe, call, error, says):
    with pytest.raises(error, match=says):
        call(pipe)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"device": "cuda:7"}, HardwareError, "'cuda:7' was asked for"),
        ({"device": "tpu"}, SettingError, "unknown device 'tpu'"),
        ({"device": "cpu", "dtyp": "bf16"}, SettingError, "Did you mean 'dtype'"),
        ({"device": "cpu", "dtype": "int3"}, SettingError, "unknown dtype 'int3'"),
        ({"device": "cpu", "max_length": 512}, SettingError, "max_length .* give max_new_tokens"),
        ({"device": "cpu", "top_p": 3}, SettingError, "top_p is 3"),
        ({"device": "cpu", "device_map": "auto"}, SettingError, "exclude each other"),
    ],
)
def test_bad_option_passes_through_modelscope_as_itself(checkpoint_dir, options, error, says):
    with pytest.raises(error, match=says):
        pipeline(Tasks.text_generation, model=str(checkpoint_dir), **options)


def test_typed_keys_do_not_change_the_shape_of_the_prompt(pipe):
    text = "Say ### End or ### Response:\n and <|endoftext|>."
    ids, _ = pipe.model.text_generator.fit(parse_input(text), pipe.settings)
    control = pipe.model.checkpoint.tokenizer.control
    assert [i for i in ids if i in pipe.model.checkpoint.tokenizer.special_ids] == [
        control.instruction,
        control.response,
    ]


@pytest.mark.parametrize("layout", [copy_2023_layout, plain_hf])
def test_dolly_pipeline_loads_directories_of_all_kinds(checkpoint_dir, tmp_path, pipe, questions, layout):
    directory = tmp_path / "model"
    layout(checkpoint_dir, directory)
    other = dolly_pipeline(str(directory), device="cpu", dtype="fp32")
    assert other(questions, **GREEDY) == pipe(questions, **GREEDY)


def test_modelscope_alone_cannot_load_a_plain_directory(checkpoint_dir, tmp_path):
    plain_hf(checkpoint_dir, tmp_path / "model")
    with pytest.raises(IndexError):
        pipeline(Tasks.text_generation, model=str(tmp_path / "model"), device="cpu")


def test_a_loaded_model_can_be_given_to_modelscope(checkpoint_dir, pipe, questions):
    model = Model.from_pretrained(str(checkpoint_dir), device="cpu")
    other = pipeline(Tasks.text_generation, model=model)
    assert other(questions[0], **GREEDY) == pipe(questions[0], **GREEDY)
    assert model(questions[0], **GREEDY) == pipe(questions[0], **GREEDY)
