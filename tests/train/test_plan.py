"""train.plan and train.prepare: what a run will do, in figures that can be checked."""

from __future__ import annotations

import json

import pytest
import yaml

from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.errors import SettingError
from modelscope_dolly.files import file_sha256
from train import plan
from train.bench import padded
from train.config import build
from train.nano import RECORDS, build_model, build_tokenizer, read_records
from train.prepare import prepare

KEYS = {
    "records", "records_kept", "tokens", "label_tokens", "padded_tokens", "processed_tokens", "steps", "plan_hash",
    "zero_stage", "reason",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tokenizer = build_tokenizer(read_records())
    return export_checkpoint(build_model(len(tokenizer.tokenizer)), tokenizer, tmp_path_factory.mktemp("base") / "nano")


@pytest.fixture
def settings(base, tmp_path) -> dict:
    return {"model": str(base), "dataset": str(RECORDS), "output_dir": str(tmp_path / "run"), "test_size": 8,
            "global_batch_size": 16}  # fmt: skip


def run(capsys, tmp_path, settings: dict, *flags: str) -> tuple[int, str, str]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    code = plan.main([str(recipe), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_figures_are_those_of_the_records_and_nothing_is_written(capsys, tmp_path, settings):
    code, out, _ = run(capsys, tmp_path, settings, "--json")
    found = json.loads(out)
    assert code == 0 and set(found) >= KEYS
    made = prepare(build(settings).config, 1)
    lengths = [len(ids) for ids in made.checked.ids]
    assert found["records"] == found["records_kept"] == 128 and found["records_held_out"] == 8
    assert found["tokens"] == sum(lengths) and found["steps"] == 2 * -(-120 // 16)
    assert found["label_tokens"] == sum(
        len(i) - p for i, p in zip(made.checked.ids, made.checked.prompt_lengths, strict=True)
    )
    assert found["processed_tokens"] == found["tokens_of_all_steps"] < found["padded_tokens"]
    assert found["plan_hash"] == made.plan.hash
    assert not (tmp_path / "run").exists()


def test_hardware_that_is_not_here_changes_the_plan_but_not_the_order(capsys, tmp_path, settings):
    here, there = (
        json.loads(run(capsys, tmp_path, settings, "--json", *flags)[1]) for flags in ((), ("--gpus", "8xA100-80G"))
    )
    assert there["world"] == 8 and there["dtype"] == "bf16" and there["plan_hash"] != here["plan_hash"]
    assert there["steps"] == here["steps"] and there["tokens"] == here["tokens"]


def test_report_names_records_steps_and_the_choice(capsys, tmp_path, settings):
    code, out, _ = run(capsys, tmp_path, settings, "--gpus", "4xA10-24G")
    assert code == 0
    for part in ("128 records, 128 kept", "steps of 16 records on 4 process(es)", "taken: z", "disk:", "(default)"):
        assert part in out


@pytest.mark.parametrize(
    ("changes", "flags", "says"),
    [
        ({"dataset": "missing.jsonl"}, (), "missing.jsonl"),
        ({"model": "no/such/place"}, (), "no/such/place"),
        ({}, ("--gpus", "8xABACUS"), "ABACUS"),
        ({"max_length": 5000, "tokens_per_batch": 5000}, (), "max_length is 5000"),
        ({"test_size": 128}, (), "128"),
        ({"global_batch_size": 2}, ("--gpus", "8xA100-80G"), "global_batch_size is 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, settings, changes, flags, says):
    code, out, err = run(capsys, tmp_path, {**settings, **changes}, *flags)
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.startswith("train.plan: ")]
    assert says in line
    assert not (tmp_path / "run").exists()


def test_a_base_model_without_keys_gets_them(base, tmp_path, settings):
    import shutil

    from tokenizers import Tokenizer

    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    for name in ("manifest.json", "special_tokens_map.json", "tokenizer_config.json"):
        (bare / name).unlink()
    content = json.loads((bare / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("###")]
    (bare / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_file(str(bare / "tokenizer.json")).token_to_id("### End") is None
    made = prepare(build({**settings, "model": str(bare)}).config, 1)
    assert made.network.vocab_size == len(made.tokenizer.tokenizer)
    assert [ids for ids, _ in made.examples] == [ids for ids, _ in prepare(build(settings).config, 1).examples]


def test_the_data_hash_depends_on_the_records_alone(settings, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(RECORDS.read_bytes())
    one, two = (prepare(build({**settings, "dataset": str(path)}).config, 1) for path in (RECORDS, copy))
    assert one.sha256 == two.sha256 and file_sha256(copy) == file_sha256(RECORDS)
    copy.write_bytes(RECORDS.read_bytes().replace(b"fission", b"fishing"))
    assert prepare(build({**settings, "dataset": str(copy)}).config, 1).sha256 != one.sha256


def test_max_steps_cuts_the_plan(settings):
    whole, cut = (prepare(build({**settings, "max_steps": steps}).config, 1).plan for steps in (0, 3))
    assert cut.steps == whole.steps[:3] and cut.tokens == sum(whole.step_tokens[:3])


def test_padded_needs_a_global_batch_that_divides(settings):
    with pytest.raises(SettingError, match="multiple of 1 ranks x padded batches of 6"):
        prepare(build(settings).config, 1, padded(6))


@pytest.mark.parametrize(
    ("publish", "says"),
    [
        ({"model_id": "me/x"}, "publish has no revision"),
        ({"model_id": "me", "revision": "v1.0.0"}, "model_id is 'me', it must be OWNER/NAME"),
        ({"model_id": "me/x", "revision": "master"}, "revision is 'master', it must be a tag"),
        ({"model_id": "me/x", "revision": 1.0}, "revision is 1.0, it must be a tag"),
        ({"model_id": "me/x", "revision": "v1", "visibilty": "public"}, "Did you mean 'visibility'"),
        ({"model_id": "me/x", "revision": "v1", "visibility": "open"}, "it must be private or public"),
        ({"model_id": "me/x", "revision": "v1", "token": "x"}, "set MODELSCOPE_API_TOKEN"),
    ],
)
def test_a_bad_destination_is_named_before_anything_is_read(settings, publish, says):
    with pytest.raises(SettingError) as caught:
        prepare(build({**settings, "publish": publish, "dataset": "missing.jsonl"}).config, 1)
    assert str(caught.value).startswith("publish: ") and says in str(caught.value) and "\n" not in str(caught.value)


def test_the_disk_is_reported_against_what_is_free(capsys, tmp_path, settings):
    for disk, verdict in (
        (",disk=9T", "disk: up to 0."),
        ("", "free: not stated"),
        (",disk=0G", "disk: NOT enough: up"),
    ):
        code, out, _ = run(capsys, tmp_path, settings, "--gpus", f"4xA10-24G{disk}")
        assert code == 0 and verdict in out.splitlines()[-1] and "2 checkpoints kept" in out.splitlines()[-1]
