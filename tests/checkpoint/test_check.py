"""dolly check: all findings at once."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.check import Finding, check_directory, format_findings
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
