"""Reading records from every kind of source, and the report on all that is wrong with them."""

from __future__ import annotations

import csv
import functools
import hashlib
import inspect
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHARED_DATA, needs_shared_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelscope_dolly.errors import DollyError, SettingError
from modelscope_dolly.prompt import CONTROL_KEYS, END_KEY, END_OF_TEXT, RESPONSE_KEY, DollyTokenizer
from train import records as module
from train.records import (
    DROPPED,
    FIELDS,
    NOTED,
    Checked,
    Problem,
    Record,
    Report,
    Source,
    check_records,
    read_records,
    split,
)

BOM = b"\xef\xbb\xbf"
GOOD = {"instruction": "What is dew?", "context": "", "response": "Water."}
# csv of Python 3.10 refuses NUL, in one clear line
CSV_TEXT = st.text() if sys.version_info >= (3, 11) else st.text().filter(lambda text: "\0" not in text)
HARD_TEXT = st.text(alphabet="ab\"',;\r\n\t\\\u2028\u0085\ufeff🙂")
examples = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def row_lists(text=CSV_TEXT):
    return st.lists(st.fixed_dictionaries(dict.fromkeys(FIELDS, text | HARD_TEXT)), min_size=1, max_size=6)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def jsonl(rows: list, end: str = "\n", **options) -> bytes:
    return "".join(json.dumps(row, **options) + end for row in rows).encode("utf-8")


def as_csv(rows: list[dict], header=FIELDS, **options) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, header, **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def values(source: Source) -> list:
    return [row.value for row in source.rows]


@pytest.fixture
def check(tmp_path, tokenizer):
    """Check the lines of a .jsonl file: rows, or bytes as they are."""

    def run(*lines, max_length: int = 2048, **options) -> Checked:
        data = b"".join(line + b"\n" if isinstance(line, bytes) else jsonl([line]) for line in lines)
        return check_records(read_records(write(tmp_path / "data.jsonl", data)), tokenizer, max_length, **options)

    return run


# Reading


@examples
@given(rows=row_lists(), bom=st.booleans(), escape=st.booleans(), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_jsonl_gives_back_what_was_written(tmp_path, rows, bom, escape, end):
    data = BOM * bom + jsonl(rows, end, ensure_ascii=escape)
    source = read_records(write(tmp_path / "data.jsonl", data))
    assert values(source) == rows
    step = 2 if end == "\n\n" else 1
    assert [row.line for row in source.rows] == [1 + step * index for index in range(len(rows))]


@examples
@given(rows=row_lists(), bom=st.booleans(), wrapped=st.booleans(), indent=st.sampled_from([None, 2]))
def test_json_gives_back_what_was_written(tmp_path, rows, bom, wrapped, indent):
    text = json.dumps({"version": 1, "data": rows} if wrapped else rows, indent=indent)
    source = read_records(write(tmp_path / "data.json", BOM * bom + text.encode()))
    assert values(source) == rows
    assert [row.line for row in source.rows] == list(range(1, len(rows) + 1))
    assert source.unit == "record"


@examples
@given(rows=row_lists(), bom=st.booleans(), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_csv_gives_back_what_was_written_with_the_line_each_row_begins_in(tmp_path, rows, bom, quoting):
    source = read_records(write(tmp_path / "data.csv", BOM * bom + as_csv(rows, quoting=quoting).encode("utf-8")))
    assert values(source) == rows
    before = [as_csv(rows[:index], quoting=quoting) for index in range(len(rows))]
    assert [row.line for row in source.rows] == [1 + len(re.findall("\r\n|\r|\n", text)) for text in before]


@examples
@given(rows=row_lists())
def test_the_hash_is_that_of_the_records_whatever_the_format(tmp_path, rows):
    turned = [dict(reversed(row.items())) | {"category": "qa"} for row in rows]
    names = [
        write(tmp_path / "a.jsonl", jsonl(rows)),
        write(tmp_path / "b.jsonl", BOM + jsonl(turned, "\r\n", ensure_ascii=False)),
        write(tmp_path / "a.json", json.dumps({"data": rows})),
        write(tmp_path / "a.csv", as_csv(rows)),
        write(tmp_path / "b.csv", as_csv(turned, ("category", *FIELDS))),
    ]
    assert len({read_records(name).sha256 for name in names}) == 1
    changed = [{**rows[0], "response": rows[0]["response"] + "."}, *rows[1:]]
    assert read_records(write(tmp_path / "c.jsonl", jsonl(changed))).sha256 != read_records(names[0]).sha256


def test_the_hash_sees_order_and_mapping_and_takes_no_context_for_an_empty_one(tmp_path):
    def digest(*rows, columns=None):
        return read_records(write(tmp_path / "data.jsonl", jsonl(rows)), columns).sha256

    other = {**GOOD, "instruction": "What is rain?"}
    assert digest(GOOD, other) != digest(other, GOOD)
    assert digest(GOOD) == digest({**GOOD, "context": None})
    assert digest(GOOD) == digest({"instruction": "What is dew?", "response": "Water."})
    assert digest(GOOD) != digest(GOOD, columns={"instruction": "response", "response": "instruction"})


def test_the_formula_of_the_hash_is_kept(tmp_path):
    """Runs record it: hashes of different days must be comparable."""
    rows = [{**GOOD, "response": "é"}, {"instruction": 5}, ["a"]]
    source = read_records(write(tmp_path / "data.jsonl", jsonl(rows, "\r\n") + b"no\r\n"))
    hashed = b"""["What is dew?", "", "\\u00e9"]
[{"type": "int"}, "", null]
[{"type": "list"}]
[{"bytes": "6e6f"}]
"""
    assert source.sha256 == hashlib.sha256(hashed).hexdigest()


def test_columns_are_mapped_and_the_others_named_in_the_report(tmp_path, tokenizer):
    rows = [{"question": "Why?", "input": "Because.", "output": "So.", "category": "qa", "\ud800": 1}]
    source = read_records(
        write(tmp_path / "data.jsonl", jsonl(rows)),
        {"instruction": "question", "context": "input", "response": "output"},
    )
    checked = check_records(source, tokenizer, 2048)
    assert checked.records == [Record("Why?", "Because.", "So.", 1)]
    assert source.unused == ("category", "\\ud800")
    assert "columns not used: category, \\ud800" in str(checked.report)


@pytest.mark.parametrize(
    ("header", "columns", "message"),
    [
        (
            "instructions,response",
            None,
            "no column 'instruction'. Did you mean columns: {instruction: instructions}? "
            "Found: 'instructions', 'response'. Name them with columns: {our name: theirs}",
        ),
        (
            "question,input,output",
            None,
            "no column 'instruction', 'response'. Did you mean columns: {instruction: question, response: output}? "
            "Found: 'question', 'input', 'output'.",
        ),
        ("foo,bar", None, "no column 'instruction', 'response'. Found: 'foo', 'bar'."),
        (
            "instruction,response",
            {"context": "passage"},
            "no column 'passage'. Found: 'instruction', 'response'.",
        ),
        ("instruction;response", None, "Found: 'instruction;response'."),
        ("a,b", {"instrction": "a"}, "unknown field in columns 'instrction'. Did you mean 'instruction'?"),
        ("a,b", {"instruction": 1, "response": None}, "columns: instruction is 1, it must be text; columns: response"),
        ("a,b", {"instruction": "a", "response": "a"}, "columns: 'a' is taken for more than one of instruction,"),
    ],
)
def test_a_wrong_mapping_is_refused_with_what_was_found(tmp_path, header, columns, message):
    with pytest.raises(SettingError) as caught:
        read_records(write(tmp_path / "data.csv", f"{header}\nx,y\n"), columns)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_field_of_ours_has_its_own_place_when_columns_swap(tmp_path, tokenizer):
    swap = {"instruction": "response", "response": "instruction"}
    source = read_records(write(tmp_path / "data.jsonl", jsonl([GOOD])), swap)
    assert check_records(source, tokenizer, 2048).records == [Record("Water.", "", "What is dew?", 1)]


def test_a_column_called_context_may_be_another_field(tmp_path, tokenizer):
    source = read_records(write(tmp_path / "data.csv", "context,response\nWhy?,So.\n"), {"instruction": "context"})
    assert check_records(source, tokenizer, 2048).records == [Record("Why?", "", "So.", 2)]
    assert source.unused == ()
    assert source.sha256 == read_records(write(tmp_path / "b.csv", "instruction,response\nWhy?,So.\n")).sha256


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("data.txt", "", SettingError, "it must be a .jsonl, .json or .csv file, a hub's data set ms:OWNER/NAME"),
        ("data", "", SettingError, "it must be a .jsonl, .json or .csv file"),
        ("data.jsonl", None, SettingError, "cannot be read: No such file or directory; it must be"),
        ("data.jsonl", "", DollyError, "holds no records"),
        ("data.jsonl", "\n \n", DollyError, "holds no records"),
        ("data.json", "[]", DollyError, "holds no records"),
        ("data.csv", "instruction,response\n", DollyError, "holds no records"),
        ("data.csv", "", DollyError, "holds no records"),
        ("data.jsonl", "\ufeff{}".encode("utf-16-le"), DollyError, "is UTF-16, it must be UTF-8"),
        ("data.json", b'["\xe9"]', DollyError, "must be UTF-8, found byte 0xe9 at offset 2 of the file"),
        ("data.json", BOM + b'["\xe9"]', DollyError, "must be UTF-8, found byte 0xe9 at offset 5 of the file"),
        ("data.json", '[{"a": 1},\n x]', DollyError, "not JSON: line 2, Expecting value at column 2"),
        ("data.json", "{}\n{}", DollyError, "Extra data at column 1; if each line holds one record, name the file .js"),
        ("data.json", "[" * 100_000, DollyError, "not JSON: maximum recursion depth"),
        (
            "data.json",
            '{"rows": []}',
            DollyError,
            "must hold a list of records or {\"data\": [...]}, found {'rows': []}",
        ),
        ("data.csv", "response,response\na,b\n", DollyError, "header has column 'response' more than once"),
        (
            "data.csv",
            'instruction,response\n"a\nb",c\nd,"e\nf\n',
            DollyError,
            "begins in line 4 is not CSV: unexpected",
        ),
        ("data.csv", 'instruction,response\n"a" b,c\n', DollyError, "begins in line 2 is not CSV: ',' expected after"),
    ],
)
def test_a_file_that_is_damaged_as_a_whole_is_one_clear_error(tmp_path, name, content, error, message):
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(error) as caught:
        read_records(path)
    assert type(caught.value) is error
    assert message in str(caught.value)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_id_without_its_hub_is_told_how_to_be_written():
    with pytest.raises(SettingError, match="For a hub's data set write ms:me/data or hf:me/data"):
        read_records("me/data")


def test_csv_fields_may_be_long_and_the_process_keeps_its_limit(tmp_path):
    before = csv.field_size_limit()
    assert before == 131_072
    long = {**GOOD, "response": "x" * (before + 1)}
    assert values(read_records(write(tmp_path / "data.csv", as_csv([long])))) == [long]
    assert csv.field_size_limit() == before
    with pytest.raises(DollyError):
        read_records(write(tmp_path / "data.csv", '"a'))
    assert csv.field_size_limit() == before


# Hubs: their libraries read local folders the way they read what they downloaded


def hub_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", jsonl([GOOD, {**GOOD, "context": None, "response": 'A "drop"\n🙂'}]))
    return folder


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """Both libraries as they are, but for where they cache."""
    import datasets
    from modelscope import MsDataset

    cache = str(tmp_path / "cache")
    monkeypatch.setattr(MsDataset, "load", staticmethod(functools.partial(MsDataset.load, cache_dir=cache)))
    monkeypatch.setattr(datasets, "load_dataset", functools.partial(datasets.load_dataset, cache_dir=cache))


@pytest.mark.parametrize("hub", ["ms", "hf"])
def test_a_folder_is_read_by_the_real_library(tmp_path, tokenizer, private_cache, hub):
    folder = hub_folder(tmp_path)
    source = read_records(f"{hub}:{folder}")
    assert (len(source.rows), source.unit) == (2, "record")
    checked = check_records(source, tokenizer, 2048)
    assert checked.records == [
        Record("What is dew?", "", "Water.", 1),
        Record("What is dew?", "", 'A "drop"\n🙂', 2),
    ]
    assert source.sha256 == read_records(str(folder / "train.jsonl")).sha256


@pytest.mark.parametrize("hub", ["ms", "hf"])
def test_a_folder_called_like_a_reader_of_the_library_is_that_folder(tmp_path, monkeypatch, private_cache, hub):
    hub_folder(tmp_path).rename(tmp_path / "json")
    write(tmp_path / "train.jsonl", jsonl([GOOD] * 3))  # what that reader would find
    monkeypatch.chdir(tmp_path)
    assert len(read_records(f"{hub}:json").rows) == 2


@pytest.mark.parametrize(("hub", "place"), [("ms", "ModelScope"), ("hf", "Hugging Face")])
@pytest.mark.parametrize("damage", ["another type", "another split"])
def test_what_the_library_cannot_read_is_one_line(tmp_path, private_cache, hub, place, damage):
    folder = hub_folder(tmp_path)
    if damage == "another type":
        write(folder / "train-2.jsonl", '{"instruction": [1]}\n')
    else:
        (folder / "train.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(SettingError) as caught:
        read_records(f"{hub}:{folder}")
    assert f"cannot be loaded through {place}'s library (" in str(caught.value)
    assert "Check the name, the revision" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("ms:me/data", {"dataset_name": "me/data", "version": "master"}),
        ("ms:me/data@v1.2", {"dataset_name": "me/data", "version": "v1.2"}),
        ("hf:me/data.x", {"path": "me/data.x", "revision": None}),
        ("hf:me/data@refs/pr/1", {"path": "me/data", "revision": "refs/pr/1"}),
    ],
)
def test_a_hub_id_reaches_the_library_with_its_revision(monkeypatch, dataset, expected):
    """There is no network: the libraries' functions are replaced, by ones that refuse what the real ones refuse."""
    import datasets
    from modelscope import MsDataset

    calls = []

    def recorder(signature):
        def load(*args, **keywords):
            bound = signature.bind(*args, **keywords)
            bound.apply_defaults()
            calls.append(bound.arguments)
            return iter([GOOD])

        return load

    monkeypatch.setattr(MsDataset, "load", recorder(inspect.signature(MsDataset.load)))
    monkeypatch.setattr(datasets, "load_dataset", recorder(inspect.signature(datasets.load_dataset)))
    assert values(read_records(dataset)) == [GOOD]
    assert len(calls) == 1
    assert {key: calls[0][key] for key in expected} == expected
    assert calls[0]["split"] == "train"
    assert not calls[0].get("trust_remote_code")


def test_a_local_folder_never_stands_in_for_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "me" / "data").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match="me/data is also here and would be read in place of the hub's; write ms:"):
        read_records("ms:me/data@v1")


@pytest.mark.parametrize("dataset", ["ms:data", "hf:/no/such/folder", "ms:", "hf:me/data@", "ms:a/b/c"])
def test_neither_hub_id_nor_folder(dataset):
    with pytest.raises(SettingError, match="no hub id and no folder here; it must be"):
        read_records(dataset)


def test_reading_a_file_imports_no_hub_library(tmp_path):
    write(tmp_path / "data.jsonl", jsonl([GOOD]))
    script = (
        "import sys; from train.records import read_records; read_records(sys.argv[1]);"
        "print(sorted({'modelscope', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "data.jsonl")]
    result = subprocess.run(command, cwd=Path(module.__file__).parents[1], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


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
    assert checked.records == [Record("Why?", "", "So.", 4)]
    assert [(problem.line, problem.kind) for problem in checked.report.problems] == [
        (2, "wrong_type"),
        (5, "missing"),
        (6, "empty_instruction"),
    ]
    assert checked.report.problems[0].detail.startswith("4 fields where the header has 3: put quotes around")


def test_the_limit_is_that_of_the_public_recipe(check, tokenizer):
    ids, prompt = tokenizer.encode_example(**GOOD)
    kept = check(GOOD, max_length=len(ids) + 1)
    assert (kept.ids, kept.lengths, kept.prompt_lengths) == ([ids], [len(ids)], [prompt])
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
    assert checked.report.noted == {"contains_key": 1, "duplicate": 0}
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
        "name", "sha256", "unit", "unused", "rows", "kept", "tokens_kept", "label_tokens_kept", "tokens_dropped",
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
    problem = Problem(1, "missing", "no response", "'a'")
    Report("data", "", "line", (), 2, 1, 5, 2, 0, (problem,))
    with pytest.raises(AssertionError, match="vanished"):
        Report("data", "", "line", (), 3, 1, 5, 2, 0, (problem,))


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
    source = read_records(str(Path(module.__file__).parent / "recipes" / "nano.jsonl"))
    checked = check_records(source, tokenizer, 2048, strict=True)
    assert [record.instruction for record in checked.records] == [record["instruction"] for record in records]
    assert (checked.report.rows, checked.report.problems) == (128, ())
    expected = [tokenizer.encode_example(*(record[field] for field in FIELDS)) for record in records]
    assert list(zip(checked.ids, checked.prompt_lengths, strict=True)) == expected


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
        sum(checked.lengths),
        sum(map(len, checked.ids)) - sum(checked.prompt_lengths),
    )
    assert report.tokens_kept + report.tokens_dropped == 3_071_684
    assert report.dropped == dict.fromkeys(DROPPED, 0) | {"too_long": 38}
    assert report.noted == {"contains_key": 0, "duplicate": 15}
    assert report.unused == ("category",)
    train, test = split(report.kept, 200, 42)
    assert (len(train), len(test)) == (14_777, 200)
