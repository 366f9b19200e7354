"""Reading data sets: what was written comes back, and what cannot be read is one clear line."""

from __future__ import annotations

import csv
import functools
import hashlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelscope_dolly.errors import DollyError, SettingError
from tests.support.paths import ROOT
from tests.support.record_files import BOM, GOOD, as_csv, examples, jsonl, row_lists, values, write
from train.data.layouts import FIELDS
from train.data.sources import read_records
from train.data.validate import TrainingRecord, check_records

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
    assert source.parts[0].unit == "record"


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
    assert checked.records == [TrainingRecord("Why?", "Because.", "So.", 1)]
    assert source.parts[0].unused == ("category", "\\ud800")
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
    assert check_records(source, tokenizer, 2048).records == [TrainingRecord("Water.", "", "What is dew?", 1)]


def test_a_column_called_context_may_be_another_field(tmp_path, tokenizer):
    source = read_records(write(tmp_path / "data.csv", "context,response\nWhy?,So.\n"), {"instruction": "context"})
    assert check_records(source, tokenizer, 2048).records == [TrainingRecord("Why?", "", "So.", 2)]
    assert source.parts[0].unused == ()
    assert source.sha256 == read_records(write(tmp_path / "b.csv", "instruction,response\nWhy?,So.\n")).sha256


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("data.txt", "", SettingError, "it must be a .jsonl, .json, .csv or .parquet file, a glob of them or a"),
        ("data", "", SettingError, "it must be a .jsonl, .json, .csv or .parquet file"),
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
    with pytest.raises(SettingError, match="For a data set on a hub write ms:me/data or hf:me/data"):
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


# Several files, parquet, and parts of them


def parquet(path: Path, rows: list[dict]) -> str:
    pyarrow = pytest.importorskip("pyarrow", reason="it comes with datasets")
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def test_parquet_gives_back_what_was_written(tmp_path):
    rows = [{**GOOD, "response": f"é {number}", "turns": [{"a": number}]} for number in range(2500)]
    source = read_records(parquet(tmp_path / "data.parquet", rows))
    assert values(source) == rows
    assert [row.line for row in source.rows] == list(range(1, 2501))
    plain = read_records(write(tmp_path / "data.jsonl", jsonl(rows)))
    assert source.sha256 == plain.sha256 and source.parts[0].unused == ("turns",)


def test_a_file_that_is_no_parquet_is_one_line(tmp_path):
    with pytest.raises(DollyError, match=r"data.parquet: not a parquet file that can be read: .*magic"):
        read_records(write(tmp_path / "data.parquet", b"instruction,response\n" * 9))


def test_a_folder_a_glob_and_a_list_are_all_their_files_in_order(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{**GOOD, "response": str(number)} for number in range(6)]
    write(folder / "b.jsonl", jsonl(rows[2:4]))
    write(folder / "a.csv", as_csv(rows[:2]))
    parquet(folder / "c.parquet", rows[4:])
    write(folder / "README.md", "not records")
    whole = read_records(write(tmp_path / "whole.jsonl", jsonl(rows)))
    for dataset in (
        str(folder),
        str(folder / "*.[cjp]*"),
        [str(folder / "a.csv"), {"path": f"{folder}/b*"}, str(folder / "c.parquet")],
    ):
        found = read_records(dataset)
        assert values(found) == [{**row} for row in rows]
        assert [Path(part.name).name for part in found.parts] == ["a.csv", "b.jsonl", "c.parquet"]
        assert found.sha256 == whole.sha256


def test_a_file_with_the_name_of_a_glob_is_that_file(tmp_path):
    assert len(read_records(write(tmp_path / "a[1].jsonl", jsonl([GOOD] * 3))).rows) == 3


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("{at}", "is a folder without .jsonl, .json, .csv, .parquet files"),
        ("{at}/*.jsonl", "matches no file"),
        ("{at}/*.md", "it must be a .jsonl"),
        ([], "dataset has 0 entries, it must have 1 to 1,000"),
        (["a.jsonl", 5, {}], "entry 2 of dataset is 5, it must be text, or a map with path"),
        ({"share": 0.5}, "dataset: path is None, it must be text"),
        ({"path": "a.csv", "shares": 1}, "unknown key in dataset 'shares'. Did you mean 'share'?"),
        ({"path": "a.csv", "share": 1.5}, "dataset: share is 1.5, it must be above 0 and at most 1; to show records"),
        ({"path": "a.csv", "share": True}, "dataset: share is True"),
        ({"path": "a.csv", "repeat": 0.5}, "dataset: repeat is 0.5, it must be a whole number from 1 to 1,000"),
        ([{"path": "a.csv", "columns": "q"}], "entry 1 of dataset: columns is 'q', it must be {our name: theirs}"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, dataset, says):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(SettingError) as caught:
        read_records(dataset.format(at=tmp_path) if isinstance(dataset, str) else dataset)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_share_is_drawn_by_the_seed_and_keeps_its_order(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{**GOOD, "response": str(number)} for number in range(100)]))

    def drawn(seed: int, share: float, *before: str) -> list[int]:
        part = read_records([*before, {"path": path, "share": share}], seed=seed).parts[-1]
        assert part.total == 100
        return [int(row.value["response"]) for row in part.rows]

    half = drawn(1, 0.5)
    assert len(half) == 50 and half == sorted(half) == drawn(1, 0.5) != drawn(2, 0.5)
    assert half != drawn(1, 0.5, path)  # two entries draw differently
    assert set(drawn(1, 0.25)) < set(half) and drawn(1, 1.0) == list(range(100))
    assert half[:5] == [1, 2, 3, 7, 10]  # the same on every machine


def test_so_many_rows_of_a_hub_are_drawn_and_more_than_there_are_refused(monkeypatch):
    import datasets

    rows = [{**GOOD, "response": str(number)} for number in range(10)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **keywords: iter(rows))
    source = read_records("hf:me/data#4").parts[0]
    assert (len(source.rows), source.total) == (4, 10)
    with pytest.raises(SettingError, match="'hf:me/data#11' asks for 11 rows, and has 10"):
        read_records("hf:me/data#11")


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
    assert (len(source.rows), source.parts[0].unit) == (2, "record")
    checked = check_records(source, tokenizer, 2048)
    assert checked.records == [
        TrainingRecord("What is dew?", "", "Water.", 1),
        TrainingRecord("What is dew?", "", 'A "drop"\n🙂', 2),
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
    assert "Check the name, the subset, the revision" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("ms:me/data", {"dataset_name": "me/data", "version": "master", "subset_name": None}),
        ("ms:me/data/zh@v1#1", {"dataset_name": "me/data", "version": "v1", "subset_name": "zh"}),
        ("ms:me/data@v1.2", {"dataset_name": "me/data", "version": "v1.2"}),
        ("hf:me/data.x", {"path": "me/data.x", "revision": None, "name": None}),
        ("hf:me/data/zh.1#1", {"path": "me/data", "revision": None, "name": "zh.1"}),
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
    with pytest.raises(
        SettingError, match="me/data also exists here and would be read in place of the hub's; write ms:"
    ):
        read_records("ms:me/data@v1")


@pytest.mark.parametrize(
    "dataset", ["ms:data", "hf:/no/such/folder", "ms:", "hf:me/data@", "ms:a/b/c/d", "ms:a/b#0", "hf:a/b#x"]
)
def test_neither_hub_id_nor_folder(dataset):
    with pytest.raises(SettingError, match="no hub id and no folder here; it must be"):
        read_records(dataset)


def test_reading_a_file_imports_no_hub_library(tmp_path):
    write(tmp_path / "data.jsonl", jsonl([GOOD]))
    script = (
        "import sys; from train.data.sources import read_records; read_records(sys.argv[1]);"
        "print(sorted({'modelscope', 'datasets'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "data.jsonl")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
