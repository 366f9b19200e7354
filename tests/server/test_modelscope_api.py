"""POST /call and GET /describe: what ModelScope's own server answers, with the context intact."""

from __future__ import annotations

import pytest
from modelscope.utils.input_output import get_task_schemas

from modelscope_dolly.pipeline import DollyTextGenerationPipeline

CONTEXT = "Ada Lovelace was born in London in 1815."
QUESTION = "Where was she born?"


@pytest.fixture(scope="module")
def pipe(checkpoint_dir) -> DollyTextGenerationPipeline:
    return DollyTextGenerationPipeline(str(checkpoint_dir), device="cpu", dtype="fp32")


@pytest.mark.parametrize(
    "value",
    [
        QUESTION,
        {"text": QUESTION},
        {"instruction": QUESTION, "context": CONTEXT},
        {"messages": [{"role": "system", "content": CONTEXT}, {"role": "user", "content": QUESTION}]},
        [{"role": "user", "content": QUESTION}],
        [QUESTION, {"instruction": QUESTION, "context": CONTEXT}],
    ],
    ids=["text", "dict", "context", "conversation", "messages", "list"],
)
def test_call_returns_what_the_pipeline_returns(server, pipe, value):
    parameters = {"max_new_tokens": 12, "seed": 3, "num_return_sequences": 2}
    status, answer, _ = server.ask("/call", {"input": value, "parameters": parameters})
    assert status == 200 and answer == pipe(value, **parameters)


def test_the_context_counts_as_an_input_and_as_a_parameter(server, pipe):
    parameters = {"max_new_tokens": 12, "do_sample": False}
    given = [
        {"input": {"instruction": QUESTION, "context": CONTEXT}, "parameters": parameters},
        {"input": QUESTION, "parameters": {**parameters, "context": CONTEXT}},
    ]
    assert [server.ask("/call", one)[1] for one in given] == [pipe(QUESTION, context=CONTEXT, **parameters)] * 2
    assert server.ask("/call", {"input": QUESTION, "parameters": parameters})[1] != pipe(
        QUESTION, context=CONTEXT, **parameters
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is missing"),
        ({"input": []}, "input is an empty list"),
        ({"input": 3}, "an input must be a text or a dict"),
        ({"input": "a", "parameters": {"max_length": 3}}, "max_length is not a keyword of dolly"),
        ({"input": "a", "parameters": {"max_new_token": 3}}, "Did you mean 'max_new_tokens'?"),
        ({"input": "a", "parameters": 3}, "parameters is 3, it must be an object"),
    ],
)
def test_a_wrong_call_is_refused(server, body, message):
    status, answer, _ = server.ask("/call", body)
    assert status == 400 and message in answer["error"]["message"]


def test_describe_has_the_shape_of_modelscopes_server_and_its_sample_is_answered(server):
    status, found, _ = server.ask("/describe")
    theirs = get_task_schemas("text-generation")
    assert status == 200 and set(found) == {"schema", "sample"}
    assert set(found["schema"]) == {"task_name", "schema"} and set(found["schema"]["schema"]) == set(theirs)
    parameters = found["schema"]["schema"]["parameters"]["properties"]
    assert parameters["max_new_tokens"] == {"type": "integer", "default": 256} and "max_length" not in parameters
    assert server.ask("/call", found["sample"])[0] == 200
