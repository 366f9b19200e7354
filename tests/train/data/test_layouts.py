"""Columns are recognised by their names, and a conversation of one question is a record like any other."""

from __future__ import annotations

import pytest

from modelscope_dolly.errors import SettingError
from tests.support.record_files import GOOD, jsonl, write
from train.data.data_report import RecordsRefused
from train.data.sources import read_records
from train.data.validate import CheckedRecords, check_records


@pytest.fixture
def check(tmp_path, tokenizer):
    def run(*rows, columns=None, **options) -> CheckedRecords:
        return check_records(
            read_records(write(tmp_path / "d.jsonl", jsonl(rows)), columns), tokenizer, 2048, **options
        )

    return run


def messages(*pairs: str) -> list[dict]:
    """`user Why?` -> a message."""
    return [dict(zip(("role", "content"), pair.split(" ", 1), strict=True)) for pair in pairs]


def sharegpt(*pairs: str) -> list[dict]:
    return [dict(zip(("from", "value"), pair.split(" ", 1), strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"instruction": "Why?", "context": "It rains.", "response": "So."}, "dolly"),
        ({"instruction": "Why?", "input": "It rains.", "output": "So."}, "alpaca"),
        ({"query": "Why?", "system": "It rains.", "response": "So.", "history": []}, "query/response"),
        ({"messages": messages("system It rains.", "user Why?", "assistant So.")}, "messages"),
        ({"conversations": sharegpt("system It rains.", "human Why?", "gpt So.")}, "ShareGPT"),
        ({"conversations": sharegpt("human Why?", "gpt So."), "system": "It rains."}, "ShareGPT"),
        ({"conversations": messages("system It rains.", "user Why?", "assistant So.")}, "ShareGPT"),
    ],
)
def test_the_same_record_in_every_layout_has_the_same_ids_and_hash(check, tokenizer, row, layout):
    checked = check(row, strict=True)
    assert list(checked.ids[0]) == tokenizer.encode_example("Why?", "It rains.", "So.")[0]
    assert checked.report.sources[0].layout == layout and f"({layout})" in str(checked.report)
    assert checked.report.sources[0].unused == ()
    plain = check({"instruction": "Why?", "context": "It rains.", "response": "So."})
    assert checked.report.sha256 == plain.report.sha256


def test_prompt_and_completion_and_the_columns_that_nothing_reads(check):
    report = check({"prompt": "Why?", "completion": "So.", "id": 1}, strict=True).report
    assert (report.sources[0].layout, report.sources[0].unused) == ("prompt/completion", ("id",))


def test_our_own_columns_decide_and_others_that_fit_twice_are_refused(check):
    assert check({**GOOD, "query": "What?", "output": "x"}).report.sources[0].layout == "dolly"
    both = {"prompt": "Why?", "completion": "So.", "messages": messages("user Why?", "assistant So.")}
    with pytest.raises(SettingError, match=r"fit prompt/completion \(prompt, completion\) and messages \(messages\)"):
        check(both)
    assert check(both, columns={"messages": "messages"}).report.sources[0].layout == "messages, by columns"
    by_name = {"instruction": "prompt", "response": "completion"}
    assert check(both, columns=by_name).report.sources[0].layout == "by columns"


def test_conversations_may_be_in_any_column(check):
    checked = check({"chat": sharegpt("human Why?", "gpt So.")}, columns={"messages": "chat"})
    assert checked.records[0].response == "So."
    with pytest.raises(SettingError, match=r"no column 'chats'. Did you mean columns: \{messages: chat\}"):
        check({"chat": []}, columns={"messages": "chats"})
    with pytest.raises(SettingError, match="messages holds whole conversations and stands alone"):
        check({"chat": []}, columns={"messages": "chat", "response": "chat"})


LONG = ("system Be kind.", "user One?", "assistant 1.", "user Two?", "assistant 2.")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": messages(*LONG)},
        {"messages": messages(*LONG, "user Three?")},
        {"conversations": sharegpt("system Be kind.", "human One?", "gpt 1.", "human Two?", "gpt 2.")},
        {"query": "Two?", "response": "2.", "system": "Be kind.", "history": [["One?", "1."]]},
    ],
)
def test_several_turns_are_dropped_and_listed_or_their_last_pair_is_taken(check, row):
    with pytest.raises(RecordsRefused, match=r"none of the 1 records is usable \(multi_turn 1\): line 1: multi_turn, "):
        check(row)
    checked = check(row, multi_turn="last", strict=True)
    record = checked.records[0]
    assert (record.instruction, record.context, record.response) == ("Two?", "Be kind.", "2.")
    assert checked.report.noted["last_pair"] == 1


@pytest.mark.parametrize(
    ("conversation", "kind", "detail"),
    [
        (None, "missing", "no messages"),
        ("Why?", "wrong_type", "messages must be a list of messages, found str"),
        ([], "missing", "no message of the assistant"),
        (["Why?"], "wrong_type", "message 1 must be an object, found str"),
        ([{"role": "user"}], "wrong_type", "message 1 has neither role and content nor from and value"),
        (messages("user Why?"), "missing", "no message of the assistant"),
        (messages("assistant So."), "wrong_type", "the last answer does not follow a message of the user"),
        (messages("user Why?", "tool 5", "assistant So."), "wrong_type", "does not follow a message of the user"),
        (messages("tool 5", "user Why?", "assistant So."), "wrong_type", "unknown role of message 1 'tool'"),
        (sharegpt("observation 5", "human Why?", "gpt So."), "wrong_type", "unknown speaker of message 1 'obs"),
        ([{"from": [], "value": ""}], "wrong_type", "unknown speaker of message 1"),
        ([{"role": "user", "content": [{"type": "text"}]}, *messages("assistant So.")], "wrong_type", "content of m"),
        (messages("user  ", "assistant So."), "empty_instruction", "the message of the user is empty"),
        (messages("user Why?", "assistant "), "empty_response", "response is empty"),
        ([*messages("user Why?"), {"role": "assistant", "content": 5}], "wrong_type", "response must be text"),
    ],
)  # fmt: skip
def test_a_conversation_that_is_none_is_named(check, conversation, kind, detail):
    good = {"messages": messages("user Why?", "assistant So.")}
    [problem] = check(good, {"messages": conversation}).report.problems
    assert (problem.line, problem.kind) == (2, kind) and detail in problem.detail


def test_history_of_another_kind_is_named(check):
    good = {"query": "Why?", "response": "So."}
    [problem] = check(good, {**good, "history": "x"}).report.problems
    assert problem.detail == "history must be a list of pairs, found str"
