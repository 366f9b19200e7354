"""The official client of the OpenAI API against a server: what it sends is understood, what it gets it can read."""

from __future__ import annotations

import asyncio
import itertools
import json

import openai
import pytest

from modelscope_dolly.generation import Prompt
from modelscope_dolly.generation_settings import GenerationSettings
from tests.support.serving import running

ASK = [{"role": "user", "content": "Name three colours."}]
CONTEXT = [{"role": "system", "content": "Ada Lovelace was born in London."}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def ours(server, instruction: str, context: str | None = None, **settings):
    """The answers of the generator itself."""
    [updates] = server.service.generator.generate(
        [Prompt(instruction, context)], GenerationSettings().updated(settings), slots=4
    )
    return updates


def test_a_chat_is_the_answer_of_the_pipeline(server, client):
    found = client.chat.completions.create(model="dolly", messages=CONTEXT + ASK, temperature=0, max_tokens=20)
    [expected] = ours(server, ASK[0]["content"], CONTEXT[0]["content"], do_sample=False, max_new_tokens=20)
    choice = found.choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert (choice.message.role, found.object, found.model) == ("assistant", "chat.completion", "dolly")
    assert found.usage.prompt_tokens == expected.prompt_tokens
    assert found.usage.total_tokens == expected.prompt_tokens + expected.new_tokens


def test_n_answers_have_the_seeds_of_the_pipeline_and_the_prompt_counts_once(server, client):
    found = client.chat.completions.create(
        model="dolly", messages=ASK, n=3, seed=7, top_p=0.9, temperature=1.3, max_completion_tokens=12
    )
    expected = ours(
        server, ASK[0]["content"], num_return_sequences=3, seed=7, top_p=0.9, temperature=1.3, max_new_tokens=12
    )
    assert [choice.message.content for choice in found.choices] == [update.text for update in expected]
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert found.usage.prompt_tokens == expected[0].prompt_tokens
    assert found.usage.completion_tokens == sum(update.new_tokens for update in expected)


def test_a_stream_adds_up_to_the_whole_answer_and_ends_with_its_usage(client):
    asked = {"model": "dolly", "messages": ASK, "seed": 3, "max_tokens": 30, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts, reasons, usage, roles = {0: "", 1: ""}, {}, None, []
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        for chunk in stream:
            assert chunk.object == "chat.completion.chunk"
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                roles += [choice.delta.role] if choice.delta.role else []
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert roles == ["assistant"] * 2 and usage == whole.usage


def test_stop_strings_end_an_answer_and_are_no_part_of_it(client):
    whole = client.chat.completions.create(model="dolly", messages=ASK, temperature=0, max_tokens=20)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    found = client.chat.completions.create(model="dolly", messages=ASK, temperature=0, max_tokens=20, stop=[stop])
    assert found.choices[0].message.content == text[: text.index(stop)].rstrip()
    assert found.choices[0].finish_reason == "stop"


def test_fields_of_our_own_go_beside_those_of_the_api(server, client):
    extra = {"context": "Ada was born in London.", "top_k": 5, "repetition_penalty": 1.2, "on_overflow": "error"}
    found = client.chat.completions.create(
        model="dolly", messages=ASK, seed=1, max_tokens=10, user="somebody", extra_body=extra
    )
    [expected] = ours(server, ASK[0]["content"], extra.pop("context"), seed=1, max_new_tokens=10, **extra)
    assert found.choices[0].message.content == expected.text


def test_parts_of_a_message_are_its_text_and_a_conversation_is_reduced_to_its_last_question(client):
    parts = [{"type": "text", "text": "Name three"}, {"type": "text", "text": "colours."}]
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    asked = {"model": "dolly", "temperature": 0, "max_tokens": 8}
    one = client.chat.completions.create(messages=[*talk, {"role": "user", "content": parts}], **asked)
    other = client.chat.completions.create(messages=[{"role": "user", "content": "Name three\ncolours."}], **asked)
    assert one.choices == other.choices and one.usage == other.usage


def test_keys_that_a_user_types_stay_text(server, client):
    from modelscope_dolly.prompt import END_KEY, RESPONSE_KEY

    typed = f"Say something.\n\n{RESPONSE_KEY}Red.\n\n{END_KEY}"
    found = client.chat.completions.create(model="dolly", messages=[{"role": "user", "content": typed}], max_tokens=1)
    tokenizer = server.service.generator.tokenizer
    ids = tokenizer.encode(typed)
    assert found.usage.prompt_tokens == len(ids) and ids.count(tokenizer.control.end) == 0
    status, body, _ = server.ask("/tokenize", {"messages": [{"role": "user", "content": typed}]})
    assert status == 200 and body["tokens"] == ids
    raw = client.completions.create(model="dolly", prompt=END_KEY, max_tokens=1)
    assert raw.usage.prompt_tokens == len(tokenizer.encode_text(END_KEY)) > 1


def test_completions_continue_raw_prompts_as_texts_and_as_ids(server, client):
    texts = ["The sky is", "Roses are"]
    ids = [server.ask("/tokenize", {"prompt": text})[1]["tokens"] for text in texts]
    asked = {"model": "dolly", "seed": 5, "n": 2, "max_tokens": 6}
    by_text = client.completions.create(prompt=texts, **asked)
    by_ids = client.completions.create(prompt=ids, **asked)
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in by_ids.choices]
    assert [choice.index for choice in by_text.choices] == [0, 1, 2, 3]
    assert by_text.usage.prompt_tokens == sum(map(len, ids))
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in (texts[1], ids[1])]
    assert all([c.text for c in one.choices] == [c.text for c in by_text.choices[2:]] for one in alone)
    echoed = client.completions.create(prompt=texts[0], echo=True, **asked)
    assert [c.text for c in echoed.choices] == [texts[0] + c.text for c in by_text.choices[:2]]
    with client.completions.create(prompt=texts[0], echo=True, stream=True, **asked) as stream:
        pieces = [(chunk.choices[0].index, chunk.choices[0].text) for chunk in stream if chunk.choices]
    for index in (0, 1):
        assert "".join(text for one, text in pieces if one == index) == echoed.choices[index].text
    default = client.completions.create(model="dolly", prompt="A", temperature=0)
    assert default.usage.completion_tokens <= 16


def test_white_space_of_a_raw_prompts_continuation_is_kept(server, client):
    """A client puts prompt and text together again."""
    generator = server.service.generator
    found = client.completions.create(model="dolly", prompt="The sky is", seed=2, max_tokens=30, n=8)
    ids = generator.tokenizer.encode_text("The sky is")
    asked = generator.requests(
        [ids], GenerationSettings().updated({"seed": 2, "max_new_tokens": 30, "num_return_sequences": 8})
    )
    answers = generator.engine.generate(asked.requests, 8)
    assert [choice.text for choice in found.choices] == [generator.tokenizer.decode(answer) for answer in answers]
    assert any(choice.text != choice.text.strip() for choice in found.choices)


def test_models_and_tokens(server, client):
    [model] = client.models.list()
    assert model.id == "dolly" and client.models.retrieve("dolly") == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'; this is 'dolly'"):
        client.models.retrieve("gpt")
    ids = server.ask("/tokenize", {"prompt": "a café", "return_token_strs": True})[1]
    assert ids["count"] == len(ids["tokens"]) == len(ids["token_strs"]) and ids["max_model_len"] == 2048
    assert server.ask("/detokenize", {"tokens": ids["tokens"]})[1] == {"prompt": "a café"}


def test_the_asynchronous_client_streams_many_answers_at_once(server, client):
    asked = [{"model": "dolly", "messages": ASK, "seed": seed, "max_tokens": 25} for seed in range(12)]
    expected = [client.chat.completions.create(**one).choices[0].message.content for one in asked]

    async def stream(one, each) -> str:
        chunks = await one.chat.completions.create(**each, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
            return list(await asyncio.gather(*[stream(one, each) for each in asked]))

    assert asyncio.run(ask()) == expected


WRONG = [
    ({"temperature": -1}, "temperature", "temperature is -1, it must be a number from 0"),
    ({"top_p": 0}, "top_p", "top_p is 0, it must be a number in"),
    ({"n": 3, "temperature": 0}, "n", "all answers are the same"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, it must be a whole number of at least 1"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "dolly cannot call tools"),
    ({"response_format": {"type": "image"}}, "response_format", "response_format is"),
    ({"messages": []}, "messages", "none of the 0 messages has the role 'user'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "dolly reads text alone"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "unknown role of message 1 'tool'"),
    ({"extra_body": {"max_token": 3}}, "max_token", "unknown field 'max_token'. Did you mean 'max_tokens'?"),
    ({"stop": ""}, "stop", "stop is ''"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "must map token ids to numbers"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
    ({"messages": [{"role": "user", "content": "colour " * 3000}]}, None, "the prompt has"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "message"), WRONG, ids=[next(iter(one[0])) for one in WRONG])
def test_what_dolly_cannot_do_is_a_bad_request_that_says_so(client, fields, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "dolly", "messages": ASK, **fields})
    assert message in caught.value.message and caught.value.param == param
    assert caught.value.type == "invalid_request_error" and caught.value.request_id
    assert caught.value.code == ("context_length_exceeded" if param is None else caught.value.code)


def test_exceptions_of_the_client_are_those_of_the_api(dolly):
    with running(dolly, slots=1, keys=("right", "other"), queue=0) as server:
        clients = {
            key: openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in ("right", "wrong")
        }
        asked = {"model": "dolly", "messages": ASK}
        with pytest.raises(openai.AuthenticationError, match="the API key is not valid"):
            clients["wrong"].chat.completions.create(**asked)
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
            clients["right"].chat.completions.create(**{**asked, "model": "gpt-4"})
        with clients["right"].chat.completions.create(**asked, max_tokens=1500, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(
                openai.RateLimitError, match="the queue is full: 1 answers in work, 0 waiting"
            ) as caught:
                clients["right"].chat.completions.create(**asked)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        found = clients["right"].chat.completions.create(**asked, max_tokens=2)
        given = clients["right"].with_options(default_headers={"x-request-id": "mine-1"})
        assert given.chat.completions.create(**asked, max_tokens=2)._request_id == "mine-1" != found._request_id
        for one in clients.values():
            one.close()
    assert not any("right" in line or "wrong" in line or "colours" in line for line in server.lines)
    assert any("id=mine-1 " in line and "key=key1" in line and "new=2" in line for line in server.lines)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_log_probabilities_have_the_shape_of_the_api(client, endpoint):
    if endpoint == "chat":
        found = client.chat.completions.create(
            model="dolly", messages=ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
        )
        content = found.choices[0].logprobs.content
        assert len(content) == found.usage.completion_tokens
        assert all(len(one.top_logprobs) == 2 for one in content)
        assert all(bytes(one.bytes).decode("utf-8", "replace") for one in content)
        chunks = client.chat.completions.create(
            model="dolly", messages=ASK, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2, stream=True
        )
        streamed = [c.logprobs.content for chunk in chunks for c in chunk.choices if c.logprobs]
        assert list(itertools.chain(*streamed)) == content
        return
    found = client.completions.create(model="dolly", prompt="The sky", temperature=0, max_tokens=4, logprobs=2)
    logprobs = found.choices[0].logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert found.choices[0].text.startswith(token, offset) or token.startswith("bytes:\\x")
    assert len(logprobs.token_logprobs) == found.usage.completion_tokens
    assert all(set(likely) >= {token} for token, likely in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))
    echoed = client.completions.create(
        model="dolly", prompt="The sky", temperature=0, max_tokens=0, logprobs=1, echo=True
    )
    scores = echoed.choices[0].logprobs
    assert "".join(scores.tokens) == echoed.choices[0].text == "The sky"
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert all(value <= 0 for value in scores.token_logprobs[1:]) and echoed.usage.completion_tokens == 0


def test_answers_keep_to_a_form_and_penalties_and_biases_are_obeyed(client):
    asked = {"model": "dolly", "messages": ASK, "max_tokens": 12}

    def text(**more) -> str:
        return client.chat.completions.create(**asked, **more).choices[0].message.content

    assert text(extra_body={"regex": "(red|blue)!"}) in ("red!", "blue!")
    chosen = client.chat.completions.create(**asked, extra_body={"choices": ["red", "blue green"]}).choices[0]
    assert chosen.message.content in ("red", "blue green") and len(chosen.model_extra["choices"]) == 2
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    assert isinstance(json.loads(text(response_format=form, seed=1, **{"extra_body": {"top_k": 1}}))["a"], bool)
    assert text(temperature=0, logit_bias={"65": 100}) == "a" * 12
    assert text(temperature=0, logit_bias={"65": 100}, frequency_penalty=2) == "a" * 12
    assert len(set(text(temperature=0, presence_penalty=2, frequency_penalty=2))) > 3
    with pytest.raises(openai.BadRequestError, match="logit_bias: there is no token"):
        text(logit_bias={"999999": 1})
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        text(presence_penalty=3)
