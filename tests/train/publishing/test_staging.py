"""From a checkpoint to what is published: the right files, no second copy, nothing from outside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.adapter import write_base
from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.errors import CheckpointError, SettingError
from modelscope_dolly.evaluation import store
from modelscope_dolly.evaluation.store import RunIdentity
from tests.support.layouts import copy_2023_layout, plain_hf, shard
from train.publishing import staging
from train.publishing.adapter_staging import is_adapter, stage_adapter
from train.publishing.publish_settings import PublishSettings
from train.publishing.staging import list_files, stage

TO = PublishSettings("me/tiny", "v1.0.0")
#: Contract of a published directory, beside weights and the card's pictures.
NAMES = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "configuration.json", "README.md", "manifest.json",
}  # fmt: skip


@pytest.fixture
def final(checkpoint_dir, tmp_path) -> Path:
    """A checkpoint one may write into."""
    return Path(shutil.copytree(checkpoint_dir, tmp_path / "run" / "final"))


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_only_the_files_of_a_revision_are_staged_and_the_rest_is_named(final):
    for left in ("optimizer.pt", "trainer_state.json", "ms_wrapper.py", "notes é.txt"):
        (final / left).write_text("x")
    (final / "global_step7").mkdir()
    staged = stage(final, TO)
    assert staged.directory == final.parent / "final.staged"
    assert names(staged.directory) == set(staged.files) == NAMES | {"model.safetensors"}
    assert staged.left_out == ["global_step7/", "ms_wrapper.py", "notes é.txt", "optimizer.pt", "trainer_state.json"]
    assert {finding.status for finding in check_directory(staged.directory)} == {"ok"}


def test_the_files_are_those_of_the_export_byte_for_byte(final):
    staged = stage(final, TO)
    exported, published = list_files(final), staged.files
    assert {name for name in exported if published.get(name) != exported[name]} == {"manifest.json"}
    assert sum(file.size for file in staged.files.values()) == sum(
        path.stat().st_size for path in staged.directory.iterdir()
    )


def test_weights_are_hard_links_and_nothing_that_is_written_reaches_the_checkpoint(final):
    before = {path.name: (path.read_bytes(), path.stat().st_mode) for path in final.iterdir()}
    staged = stage(final, TO)
    assert staged.weights_as == "hard links"
    assert os.path.samefile(final / "model.safetensors", staged.directory / "model.safetensors")
    assert not os.path.samefile(final / "configuration.json", staged.directory / "configuration.json")
    assert {path.name: (path.read_bytes(), path.stat().st_mode) for path in final.iterdir()} == before


def test_without_hard_links_blocks_are_shared_or_copied(final, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(staging.os, "link", refuse)
    staged = stage(final, TO)
    assert staged.weights_as in ("shared blocks", "copies")
    assert manifest.differences(staged.directory) == []


def test_staging_again_gives_the_same_bytes(final):
    first = stage(final, TO)
    assert stage(final, TO).files == first.files
    other = stage(final, PublishSettings("me/tiny", "v1.0.1")).files
    assert {name for name in other if other[name] != first.files[name]} == {"README.md", "manifest.json"}


@pytest.mark.parametrize("layout", ["plain", "sharded"])
def test_directories_that_no_run_made_are_completed(checkpoint_dir, tmp_path, layout):
    if layout == "plain":
        source = plain_hf(checkpoint_dir, tmp_path / "model")
        for name in ("chat_template.jinja", "generation_config.json", "special_tokens_map.json"):
            (source / name).unlink()
    else:
        source = shard(checkpoint_dir, tmp_path / "model", shards=3)
    staged = stage(source, TO)
    assert set(staged.files) >= NAMES
    assert len([name for name in staged.files if name.endswith(".safetensors")]) == (1 if layout == "plain" else 3)
    configuration = json.loads((staged.directory / "configuration.json").read_text())
    assert configuration["pipeline"] == {"type": "modelscope-dolly"} and "allow_remote" not in configuration


# Links


def test_a_link_inside_the_checkpoint_is_followed(final):
    (final / "blobs").mkdir()
    (final / "model.safetensors").rename(final / "blobs" / "abc")
    (final / "model.safetensors").symlink_to(Path("blobs") / "abc")
    staged = stage(final, TO)
    assert not (staged.directory / "model.safetensors").is_symlink()
    assert manifest.differences(staged.directory) == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "LICENSE"])
def test_a_link_that_leads_out_of_the_checkpoint_is_refused(final, tmp_path, name):
    outside = tmp_path / "secret"
    shutil.copyfile(final / name if (final / name).exists() else final / "config.json", outside)
    (final / name).unlink(missing_ok=True)
    (final / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leads out of the checkpoint") as caught:
        stage(final, TO)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (final.parent / "final.staged").exists()


def test_the_checkpoint_itself_may_be_a_link(final, tmp_path):
    (tmp_path / "latest").symlink_to(final)
    assert stage(tmp_path / "latest", TO).directory == final.parent / "final.staged"


# What is refused


def test_weights_that_are_not_those_of_the_manifest_are_refused(final):
    data = bytearray((final / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (final / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not the bytes that manifest\.json lists"):
        stage(final, TO)
    assert not (final.parent / "final.staged").exists()


def test_a_configuration_that_is_not_that_of_the_manifest_is_refused(final):
    text = (final / "config.json").read_text()
    (final / "config.json").write_text(text.replace('"use_parallel_residual": true', '"use_parallel_residual": false'))
    with pytest.raises(CheckpointError, match=r"config\.json: .*dolly check"):
        stage(final, TO)


def test_pickled_weights_are_refused(checkpoint_dir, tmp_path):
    source = copy_2023_layout(checkpoint_dir, tmp_path / "old")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights are not published"):
        stage(source, TO)


def test_names_that_not_every_reader_spells_alike_are_refused(checkpoint_dir, tmp_path):
    source = shard(checkpoint_dir, tmp_path / "model", shards=2)
    (source / "manifest.json").unlink()
    index = (source / "model.safetensors.index.json").read_text()
    old, new = "model-00001-of-00002.safetensors", "modèle-1.safetensors"
    (source / old).rename(source / new)
    (source / "model.safetensors.index.json").write_text(index.replace(old, new), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"modèle-1\.safetensors.*letters a to z"):
        stage(source, TO)


def test_a_directory_that_nobody_staged_is_never_replaced(final):
    mine = final.parent / "final.staged"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(SettingError, match="is in the way"):
        stage(final, TO)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_one_line(final, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"cannot be written.*choose another --staging"):
        stage(final, TO, parent=tmp_path / "file")


def test_only_an_evaluation_of_these_very_files_gets_into_the_card(final, tmp_path):
    settings = {"dtype": "float32", "softmax_dtype": "float32", "device": "cpu", "scorer": "shared", "batch_size": "8"}
    settings |= {"limit": None, "template": "none", "versions": {"lm_eval": "0.4.13"}}
    right = {"acc": 1500, "acc_norm": 1500}

    def results(sha256: str, name: str) -> None:
        run = RunIdentity(name, None, sha256, **settings)
        store.write(tmp_path / "eval", store.TaskResult("piqa", run, "d" * 64, "1.0", 1838, right, True), [])

    results("ab" * 32, "another")
    with pytest.raises(SettingError, match=r"holds results of another \(abababababab\), none of the files that are"):
        stage(final, TO, evaluation=tmp_path / "eval")
    results(manifest.model_digest(final, weight_files(final)), "final")
    card = (stage(final, TO, evaluation=tmp_path / "eval").directory / "README.md").read_text()
    assert "| me/tiny | n/a |" in card and "| another |" not in card and "| final |" not in card


# Adapters


@pytest.fixture
def adapter(checkpoint_dir, tmp_path) -> Path:
    """The adapter of a run, as training leaves it."""
    peft = pytest.importorskip("peft")
    network = GPTNeoXForCausalLM.from_pretrained(checkpoint_dir)
    model = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["dense"]))
    directory = tmp_path / "run" / "adapter"
    model.save_pretrained(directory)
    write_base(directory, "/home/me/base", manifest.weights_digest(checkpoint_dir, weight_files(checkpoint_dir)))
    manifest.write(directory)
    return directory


def test_an_adapter_is_a_revision_of_its_own_with_the_digest_of_its_base(adapter, checkpoint_dir):
    staged = stage_adapter(adapter, TO)
    assert is_adapter(adapter) and not is_adapter(checkpoint_dir)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "manifest.json"}
    assert names(staged.directory) == set(staged.files) == files
    card = (staged.directory / "README.md").read_text("utf-8")
    digest = manifest.weights_digest(checkpoint_dir, weight_files(checkpoint_dir))
    assert digest in card and 'adapter="me/tiny@v1.0.0"' in card and "library_name: peft" in card
    assert "/home/me" not in card  # a folder of this machine
    assert open_checkpoint(checkpoint_dir, adapter=staged.directory).adapter.base_digest == digest
    assert stage_adapter(adapter, TO).files == staged.files


def test_a_damaged_adapter_is_not_staged(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="1 bytes, expected"):
        stage_adapter(adapter, TO)
    assert not (adapter.parent / "adapter.staged").exists()
    (adapter / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        stage_adapter(adapter, TO)
    (adapter / "base.json").unlink()
    with pytest.raises(CheckpointError, match="an adapter is published with the digest of its base"):
        stage_adapter(adapter, TO)
