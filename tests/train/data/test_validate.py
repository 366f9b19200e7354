"""Checking records: every kind of mistake is named and counted, and nothing vanishes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelscope_dolly.errors import DollyError, SettingError
from modelscope_dolly.prompt import CONTROL_KEYS, END_KEY, END_OF_TEXT, RESPONSE_KEY, DollyTokenizer
from tests.support.paths import SHARED_DATA, needs_shared_data
from tests.support.record_files import BOM, GOOD, as_csv, examples, jsonl, write
from train.data.data_report import DROPPED, NOTED, DataReport, RecordProblem, SourceReport
from train.data.layouts import FIELDS
from train.data.sources import read_records
from train.data.validate import (
    CheckedRecords,
    TrainingRecord,
    check_records,
    split,
)
from train.nano import RECORDS


@pytest.fixture
def check(tmp_path, tokenizer):
    """Check the lines of a .jsonl file: rows, or bytes as they are."""

    def run(*lines, max_length: int = 2048, **options) -> CheckedRecords:
        data = b"".join(line + b"\n" if isinstance(line, bytes) else jsonl([line]) for line in lines)
        return check_records(read_records(write(tmp_path / "data.jsonl", data)), tokenizer, max_length, **options)

    return run


# Problems


@pytest.mark.parametrize(
    ("bad", "kind", "detail", "excerpt"),
    [
        (b'{"instruction": "caf\xe9"}', "not_utf8", "byte 0xe9 at offset {offset} of the file", r"caf\\xe9"),
        (b'{"instruction": "\xed\xa0\x80"}', "not_utf8", "byte 0xed", r"\\xed"),
        (b"{'a': 1}", "not_json", "Expecting property name enclosed in double quotes at column 2", "{'a': 1}"),
        (jsonl([GOOD, GOOD], end=""), "not_json", "Extra data", "What is dew?"),
        (b"[" * 100_000, "not_json", "maximum recursion depth", "[[["),
        (b'{"instruction": ' + b"1" * 5000 + b"}", "not_json", "Exceeds the limit", "1111"),
        (["a", "b"], "wrong_type", "an object with the columns is needed, found list", "['a', 'b']"),
        (None, "wrong_type", "found NoneType", "None"),
        ({**GOOD, "instruction": 5}, "wrong_type", "instruction must be text, found int", "Water."),
        ({**GOOD, "context": ["a"]}, "wrong_type", "context must be text, found list", "What is dew?"),
        ({**GOOD, "response": {"text": "a"}}, "wrong_type", "response must be text, found dict", "What is dew?"),
        ({**GOOD, "response": "a\ud800b"}, "wrong_type", "lone surrogate '\\ud800' at character 1", "What is dew?"),
        ({"instruction": "Why?"}, "missing", "no response", "Why?"),
        ({"response": "So.", "instruction": None}, "missing", "no instruction", "So."),
        ({}, "missing", "no instruction; no response", "{}"),
        ({**GOOD, "instruction": " \n\u3000"}, "empty_instruction", "instruction is empty", "Water."),
        ({**GOOD, "response": ""}, "empty_response", "response is empty", "What is dew?"),
        ({"instruction": "", "response": 3}, "empty_instruction", "instruction is empty; response must be text", "3"),
        ({**GOOD, "response": "word " * 3000}, "too_long", "tokens, they must be fewer than max_length 2,048", "dew"),
    ],
)
def test_an_unusable_record_is_dropped_and_named(check, bad, kind, detail, excerpt):
    before = [{**GOOD, "response": "Før"}, b""]
    checked = check(*before, bad, {**GOOD, "instruction": "And rain?"})
    offset = len(jsonl(before[:1])) + 1 + 20
    assert [record.line for record in checked.records] == [1, 4]
    assert [(problem.line, problem.kind) for problem in checked.report.problems] == [(3, kind)]
    problem = checked.report.problems[0]
    assert detail.format(offset=offset) in problem.detail
    assert excerpt in problem.excerpt
    assert checked.report.dropped == dict.fromkeys(DROPPED, 0) | {kind: 1}
    assert f"line 3: {kind}, {problem.detail}: {problem.excerpt}" in str(checked.report).splitlines()[2]
    with pytest.raises(DollyError, match="strict is on and 1 of 3 records are unusable") as caught:
        check(*before, bad, {**GOOD, "instruction": "And rain?"}, strict=True)
    assert f"({kind} 1): line 3: {kind}, {problem.detail}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", [b"", BOM])
def test_the_offset_of_a_bad_byte_is_that_in_the_file(tmp_path, tokenizer, bom, end):
    data = bom + jsonl([GOOD, {**GOOD, "context": "a\u2028\u0085é"}], end, ensure_ascii=False) + b'{"a": "\xff"}'
    checked = check_records(read_records(write(tmp_path / "data.jsonl", data)), tokenizer, 2048)
    assert len(checked.records) == 2
    assert [problem.detail for problem in checked.report.problems] == [
        f"byte 0xff at offset {data.index(0xFF)} of the file"
    ]


@pytest.mark.parametrize("bom", [b"", BOM])
def test_bytes_that_are_no_utf8_spoil_only_their_own_csv_row(tmp_path, tokenizer, bom):
    good = as_csv([{**GOOD, "response": "ö\n\r\nü"}]).encode()
    other = good.partition(b"\r\n")[2].replace(b"dew", b"fog")
    data = bom + good + b'"a\nb \xff",,c \xe9\n' + other + b"\xc3,,d\n"
    checked = check_records(read_records(write(tmp_path / "data.csv", data)), tokenizer, 2048)
    assert [record.line for record in checked.records] == [2, 7]
    assert [(problem.line, problem.kind) for problem in checked.report.problems] == [(5, "not_utf8"), (10, "not_utf8")]
    for problem, byte in zip(checked.report.problems, (b"\xff", b"\xc3,"), strict=True):
        assert problem.detail == f"byte 0x{byte[0]:02x} at offset {data.index(byte)} of the file"
    assert checked.report.problems[0].excerpt == repr("a\nb \\xff,,c \\xe9")


def test_csv_rows_of_another_width_than_the_header(tmp_path, tokenizer):
    text = "instruction,response,category\nWhy, oh why?,So.,qa\n\nWhy?,So.\nWhy?\n,,\n"
    checked = check_records(read_records(write(tmp_path / "data.csv", text)), tokenizer, 2048)
    assert checked.records == [TrainingRecord("Why?", "", "So.", 4)]
    assert [(problem.line, problem.kind) for problem in checked.report.problems] == [
        (2, "wrong_type"),
        (5, "missing"),
        (6, "empty_instruction"),
    ]
    assert checked.report.problems[0].detail.startswith("4 fields where the header has 3: put quotes around")


def test_the_limit_is_that_of_the_public_recipe(check, tokenizer):
    ids, prompt = tokenizer.encode_example(**GOOD)
    kept = check(GOOD, max_length=len(ids) + 1)
    assert (list(map(list, kept.ids)), kept.prompt_lengths) == ([ids], [prompt])
    with pytest.raises(DollyError, match=r"none of the 1 records is usable \(too_long 1\): line 1: .*Repair them"):
        check(GOOD, max_length=len(ids))
    short = {"instruction": "a", "response": "b"}
    report = check(GOOD, short, max_length=len(ids)).report
    assert (report.kept, report.tokens_dropped, report.dropped["too_long"]) == (1, len(ids), 1)
    short_ids, short_prompt = tokenizer.encode_example("a", None, "b")
    assert (report.tokens_kept, report.label_tokens_kept) == (len(short_ids), len(short_ids) - short_prompt)


@pytest.mark.parametrize("key", [*CONTROL_KEYS, END_OF_TEXT, RESPONSE_KEY.rstrip("\n")])
@pytest.mark.parametrize("field", FIELDS)
def test_a_typed_key_is_noted_and_trained_as_text(check, tokenizer, key, field):
    checked = check(GOOD, {**GOOD, field: f"Say {key}"})
    whole_key = key if key in (*CONTROL_KEYS, END_OF_TEXT) else RESPONSE_KEY
    assert [(problem.line, problem.kind) for problem in checked.report.problems] == [(2, "contains_key")]
    assert repr(whole_key) in checked.report.problems[0].detail
    assert checked.report.noted == dict.fromkeys(NOTED, 0) | {"contains_key": 1}
    control = tokenizer.control
    specials = [[token for token in ids if token in tokenizer.special_ids] for ids in checked.ids]
    assert specials == [[control.instruction, control.response, control.end]] * 2


def test_duplicates_are_noted_and_kept(check):
    checked = check(GOOD, {**GOOD, "context": "a"}, GOOD, {**GOOD, "context": None}, {**GOOD, "category": "qa"})
    assert [(problem.line, problem.kind, problem.detail) for problem in checked.report.problems] == [
        (line, "duplicate", "equal to line 1") for line in (3, 4, 5)
    ]
    assert len(checked.records) == checked.report.kept == 5
    assert check(GOOD, GOOD, strict=True).report.kept == 2


# The report


@examples
@given(
    lines=st.lists(
        st.sampled_from([b"no", b"\xff", {}, [], {**GOOD, "instruction": ""}, {**GOOD, "response": END_KEY}, GOOD]),
        max_size=40,
    )
)
def test_every_row_is_kept_or_reported(check, lines):
    report = check(GOOD, *lines).report
    assert report.rows == len(lines) + 1 == report.kept + sum(report.dropped.values())
    assert report.kept == 1 + sum(line in (GOOD, {**GOOD, "response": END_KEY}) for line in lines)
    assert report.dropped["not_json"] == lines.count(b"no")
    assert len(report.problems) == sum(report.dropped.values()) + sum(report.noted.values())
    again = json.loads(json.dumps(report.as_dict()))
    assert set(again) == {
        "name", "sha256", "sources", "rows", "kept", "tokens_kept", "label_tokens_kept", "tokens_dropped",
        "problems", "dropped", "noted",
    }  # fmt: skip
    shown = [sum(problem["kind"] in kinds for problem in again["problems"]) for kinds in (DROPPED, NOTED)]
    assert shown == [min(10, sum(report.dropped.values())), min(10, sum(report.noted.values()))]


def test_the_terminal_shows_ten_problems_of_each_sort_and_counts_the_rest(check):
    text = str(check(*[GOOD] * 14, *[b"no"] * 12, {**GOOD, "response": ""}).report)
    lines = text.splitlines()
    assert "27 records, 14 kept with" in lines[0]
    assert "13 dropped" in lines[0]
    assert lines[1] == "  dropped: not_json 12, empty_response 1"
    assert lines[2] == "    line 15: not_json, Expecting value at column 1: 'no'"
    assert lines[12] == "    and 3 more"
    assert lines[13] == "  kept, but note: duplicate 13"
    assert lines[-1] == "    and 3 more"
    assert len(lines) == 25


def test_nothing_wrong_is_one_line(check):
    assert len(str(check(GOOD).report).splitlines()) == 1


def test_excerpts_are_printable_and_short(check):
    problem = check(GOOD, {**GOOD, "instruction": "\x1b[31m\n" + "🙂" * 100, "response": ""}).report.problems[0]
    assert problem.excerpt == repr("\x1b[31m\n" + "🙂" * 54 + "...")
    assert problem.excerpt.isprintable()


def test_a_refusal_names_ten_and_counts_all(check):
    with pytest.raises(DollyError) as caught:
        check(*[b"no"] * 12)
    message = str(caught.value)
    assert "none of the 12 records is usable (not_json 12): line 1: not_json" in message
    assert "line 10: not_json" in message
    assert "line 11" not in message
    assert message.endswith("; and 2 more. Repair them")


def test_a_lost_record_is_our_bug():
    problem = RecordProblem(1, "missing", "no response", "'a'")
    DataReport((SourceReport("data", "dolly", "line", (), 2, 2, 1),), "", 5, 2, 0, (problem,))
    with pytest.raises(AssertionError, match="vanished"):
        DataReport((SourceReport("data", "dolly", "line", (), 3, 3, 1),), "", 5, 2, 0, (problem,))


# The split


@examples
@given(count=st.integers(1, 300), seed=st.integers(0, 2**32), data=st.data())
def test_a_split_takes_every_record_once(count, seed, data):
    size = data.draw(st.integers(0, count - 1))
    train, test = split(count, size, seed)
    assert len(test) == size
    assert sorted(train + test) == list(range(count))
    assert (train, test) == (sorted(train), sorted(test))
    assert (train, test) == split(count, size, seed)


def test_a_split_is_the_same_everywhere():
    assert split(10, 3, 42) == ([0, 2, 3, 4, 5, 6, 8], [1, 7, 9])
    assert split(10, 3, 43) != split(10, 3, 42)
    assert split(3, 0, 42) == ([0, 1, 2], [])


def test_a_larger_split_holds_out_what_a_smaller_one_does():
    assert set(split(100, 10, 7)[1]) < set(split(100, 20, 7)[1])


def test_a_split_is_not_biased():
    seeds = 2000
    held_out = [split(5, 2, seed)[1] for seed in range(seeds)]
    times = [sum(index in test for test in held_out) for index in range(5)]
    assert sum(times) == 2 * seeds
    assert all(abs(count - 0.4 * seeds) < 6 * (seeds * 0.4 * 0.6) ** 0.5 for count in times)


@pytest.mark.parametrize(("count", "size"), [(128, 200), (5, 5), (0, 0), (5, -1)])
def test_an_impossible_split_names_both_numbers(count, size):
    with pytest.raises(SettingError, match=rf"test_size is {size}, .* usable records, {count}: hold out fewer"):
        split(count, size, 42)


# Real data


def test_the_nano_records_are_all_usable(tokenizer, records):
    source = read_records(str(RECORDS))
    checked = check_records(source, tokenizer, 2048, strict=True)
    assert [record.instruction for record in checked.records] == [record["instruction"] for record in records]
    assert (checked.report.rows, checked.report.problems) == (128, ())
    expected = [tokenizer.encode_example(*(record[field] for field in FIELDS)) for record in records]
    assert list(zip(map(list, checked.ids), checked.prompt_lengths, strict=True)) == expected


@needs_shared_data
def test_the_public_data_has_the_known_numbers():
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(SHARED_DATA / "gpt-neox-20b-tokenizer.json"))
    backend.add_special_tokens([AddedToken(key, special=True, normalized=False) for key in CONTROL_KEYS])
    tokenizer = DollyTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    source = read_records(str(SHARED_DATA / "databricks-dolly-15k.jsonl"))
    checked = check_records(source, tokenizer, 2048)
    report = checked.report
    assert (report.rows, report.kept) == (15_015, 14_977)
    assert (report.tokens_kept, report.label_tokens_kept) == (2_948_863, 1_213_472)
    assert (report.tokens_kept, report.label_tokens_kept) == (
        sum(map(len, checked.ids)),
        sum(map(len, checked.ids)) - sum(checked.prompt_lengths),
    )
    assert report.tokens_kept + report.tokens_dropped == 3_071_684
    assert report.dropped == dict.fromkeys(DROPPED, 0) | {"too_long": 38}
    assert report.noted == dict.fromkeys(NOTED, 0) | {"duplicate": 15, "near_duplicate": 18}
    assert report.sources[0].unused == ("category",)
    assert report.sources[0].layout == "dolly"
    train, test = split(report.kept, 200, 42)
    assert (len(train), len(test)) == (14_777, 200)
