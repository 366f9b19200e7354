"""dolly check: all findings at once."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.check import Finding, check_directory, format_findings
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.cli import main
from modelscope_dolly.errors import CheckpointError
from tests.support.layouts import copy_2023_layout, plain_hf


def problems(findings: list[Finding]) -> dict[str, str]:
    return {finding.subject: finding.detail for finding in findings if finding.status == "problem"}


@pytest.fixture
def copy(checkpoint_dir, tmp_path):
    target = tmp_path / "copy"
    shutil.copytree(checkpoint_dir, target)
    return target


def test_sound_directory_has_only_ok_findings(checkpoint_dir):
    findings = check_directory(checkpoint_dir)
    assert {finding.status for finding in findings} == {"ok"}
    assert len(findings) == 6
    assert all(finding.subject in format_findings(findings) for finding in findings)


def test_all_that_is_wrong_is_reported_together(copy):
    (copy / "tokenizer.json").unlink()
    (copy / "model.safetensors").unlink()
    found = problems(check_directory(copy))
    assert set(found) == {"manifest", "tokenizer", "weight names"}
    assert "tokenizer.json: missing" in found["manifest"] and "model.safetensors: missing" in found["manifest"]


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "not finite"), (float("inf"), "not finite")])
def test_values_that_are_no_weights_are_found_without_a_manifest(copy, value, says):
    (copy / manifest.NAME).unlink()
    tensors = load_file(copy / "model.safetensors")
    tensors["embed_out.weight"][3, 4] = value
    save_file(tensors, copy / "model.safetensors")
    found = problems(check_directory(copy))
    assert set(found) == {"weight values"} and says in found["weight values"]


def test_matrix_of_zeros_is_found(copy):
    (copy / manifest.NAME).unlink()
    tensors = load_file(copy / "model.safetensors")
    tensors["embed_out.weight"] = torch.zeros_like(tensors["embed_out.weight"])
    save_file(tensors, copy / "model.safetensors")
    assert "all zeros" in problems(check_directory(copy))["weight values"]


def test_changed_file_is_found_by_the_manifest_and_the_repair_is_named(copy):
    with open(copy / "chat_template.jinja", "a") as file:
        file.write(" ")
    findings = check_directory(copy)
    assert "chat_template.jinja" in problems(findings)["manifest"]
    assert any("modelscope download" in finding.detail for finding in findings)


@pytest.mark.parametrize(("layout", "code"), [(copy_2023_layout, True), (plain_hf, False)])
def test_directories_that_only_dolly_pipeline_loads_are_sound_with_a_note(checkpoint_dir, tmp_path, layout, code):
    target = tmp_path / "model"
    layout(checkpoint_dir, target)
    findings = check_directory(target)
    assert problems(findings) == {}
    notes = {finding.subject: finding.detail for finding in findings if finding.status == "note"}
    assert "dolly_pipeline" in notes["configuration.json"]
    assert ("code" in notes) is code


def test_missing_directory_is_a_problem(tmp_path):
    assert "directory" in problems(check_directory(tmp_path / "nothing"))


def test_a_manifest_is_written_for_a_sound_directory_that_has_none(copy, capsys):
    (copy / manifest.NAME).unlink()
    (copy / ".notes").write_text("of a download client, written again each time")
    assert main(["check", str(copy), "--write-manifest"]) == 0
    assert "write manifest  written for" in capsys.readouterr().out
    assert ".notes" not in manifest.read(copy) and manifest.differences(copy) == []
    before = (copy / manifest.NAME).read_bytes()
    assert main(["check", str(copy), "--write-manifest"]) == 0
    assert "nothing to do" in capsys.readouterr().out and (copy / manifest.NAME).read_bytes() == before
    (copy / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 2 bytes, expected"):
        open_checkpoint(copy)


@pytest.mark.parametrize("sealed", [True, False])
def test_no_manifest_is_written_for_a_directory_with_a_problem(copy, sealed):
    if not sealed:
        (copy / manifest.NAME).unlink()
    (copy / "config.json").write_text("{}")
    before = manifest.read(copy)
    assert main(["check", str(copy), "--write-manifest"]) == 1
    assert manifest.read(copy) == before


NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", manifest.NAME,
         "configuration.json", "model.safetensors", "model.safetensors.index.json", "LICENSE")  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "/dev/full", "/dev/zero", "loop"])
@pytest.mark.parametrize("name", NAMES)
def test_a_device_pipe_or_loop_in_place_of_any_file_is_a_finding_and_is_not_read(copy, name, kind):
    (copy / name).unlink(missing_ok=True)
    if name == "LICENSE":  # that only the manifest lists, as a file without bytes: what a device says of itself
        entries = manifest.read(copy) | {name: {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}}
        (copy / manifest.NAME).write_text(json.dumps({"version": 1, "files": entries}))
    if kind == "pipe":
        os.mkfifo(copy / name)
    else:
        (copy / name).symlink_to(name if kind == "loop" else kind)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    findings = check_directory(copy)
    assert problems(findings), format_findings(findings)
    if name not in ("configuration.json", "LICENSE"):
        with pytest.raises(CheckpointError):
            open_checkpoint(copy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB


@pytest.mark.parametrize("value", ["x" * 300, "x" * 5000, "a\0b", "\ud800", "\x1b[2J", "a\nb"])
def test_a_shard_that_no_file_can_be_called_is_a_finding_on_one_printable_line(copy, value):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": value}}))
    findings = check_directory(copy)
    assert "weight names" in problems(findings)
    assert all(line.isprintable() for line in format_findings(findings).split("\n"))


def test_a_compressed_pickle_is_refused_before_it_is_unpacked(copy, tmp_path):
    source = copy_2023_layout(copy, tmp_path / "2023")
    with (
        zipfile.ZipFile(source / "pytorch_model.bin") as whole,
        zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    (tmp_path / "bomb").replace(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"compressed, as torch\.save never does"):
        open_checkpoint(source)
