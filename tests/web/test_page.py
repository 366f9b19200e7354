"""The page without a browser: its function for programs, several callers at once, MCP."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.load import load
from tests.support.web_page import serve

LOOPBACK = {"127.0.0.1", "localhost", "::1", "None"}


def test_one_function_is_offered_and_answers_as_the_generator_does(page, checkpoint_dir):
    with urllib.request.urlopen(f"{page.url}gradio_api/info") as response:
        assert list(json.load(response)["named_endpoints"]) == ["/ask"]
    settings = GenerationSettings(do_sample=False, max_new_tokens=12)
    text_generator = load(checkpoint_dir, device="cpu").text_generator
    for typed, context in (("Name a colour.", ""), ("Say ### End now", "Samuel Pepys wrote ### Response:\n it.")):
        [[expected]] = text_generator.generate([Prompt(typed, context)], settings, slots=1)
        facts = {name: getattr(expected, name) for name in ("text", "finish_reason", "new_tokens", "prompt_tokens")}
        assert page.ask(typed, context, 12, False, None) == {**facts, "seed": None}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("", "", 4, False, None), "instruction is empty"),
        (("Why?", "word " * 4000, 4, False, None), "leaves no room"),
        (("Why?", "", -1, False, None), "max_new_tokens is -1"),
    ],
)
def test_mistakes_reach_a_program_as_a_sentence(page, values, says):
    assert says in page.ask(*values)["error"]


def test_answers_of_callers_at_the_same_time_are_those_of_each_alone(page):
    def ask(seed: int) -> str:
        return page.ask("Name a colour.", "", 40, True, seed)["text"]

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == alone
    assert len(set(alone)) > 1


def test_the_server_asks_nobody_for_anything(page):
    page.ask("Name a colour.", "", 4, False, None)
    assert page.hosts <= LOOPBACK


@pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason="mcp is not installed; gradio[mcp] brings it")
def test_mcp_offers_one_tool_that_asks(checkpoint_dir):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def use(url: str):
        arguments = {"instruction": "Name a colour.", "max_new_tokens": 6, "do_sample": False}
        async with (
            streamablehttp_client(f"{url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            return tools, await session.call_tool(tools[0].name, arguments)

    with serve(checkpoint_dir, "--mcp") as served:
        tools, answer = asyncio.run(use(served.url))
    assert len(tools) == 1 and "dolly" in tools[0].description
    assert set(tools[0].inputSchema["properties"]) >= {"instruction", "context", "max_new_tokens"}
    assert not answer.isError and '"new_tokens": 6' in answer.content[0].text.replace("'", '"')
