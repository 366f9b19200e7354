"""DollyForTextGeneration, as ModelScope builds it."""

from __future__ import annotations

import pytest
import torch
from modelscope.models import Model

from modelscope_dolly import DollyForTextGeneration
from modelscope_dolly.errors import CheckpointError, SettingError

GREEDY = {"do_sample": False, "max_new_tokens": 16}


def test_from_pretrained_returns_our_class_and_passes_options(checkpoint_dir):
    model = Model.from_pretrained(str(checkpoint_dir), device="cpu", torch_dtype="bf16")
    assert type(model) is DollyForTextGeneration
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.dtype}
    assert model.model_dir == str(checkpoint_dir)


def test_call_stream_and_generate_agree(checkpoint_dir):
    model = DollyForTextGeneration(str(checkpoint_dir), device="cpu", dtype="fp32", trust_remote_code=False)
    question = {"instruction": "Who wrote it?", "context": "Pepys wrote it."}
    answer = model(question, seed=3, max_new_tokens=16)
    from modelscope_dolly.generation import GenerationSettings

    settings = GenerationSettings().updated({"seed": 3, "max_new_tokens": 16})
    assert [*model.stream(question, settings)][-1].text == answer["text"]
    assert model.generate([question], settings)[0][0].text == answer["text"]


def test_bad_options_are_refused_by_name(checkpoint_dir):
    with pytest.raises(SettingError, match="Did you mean 'verify'"):
        DollyForTextGeneration(str(checkpoint_dir), device="cpu", verfy=False)
    model = DollyForTextGeneration(str(checkpoint_dir), device="cpu")
    with pytest.raises(SettingError, match="num_return_sequences must be 1"):
        model("Name a colour.", num_return_sequences=2)


def test_error_of_a_damaged_directory_survives_modelscope(tmp_path, checkpoint_dir):
    (tmp_path / "configuration.json").write_text((checkpoint_dir / "configuration.json").read_text())
    with pytest.raises(CheckpointError, match=r"DollyForTextGeneration: .*config\.json: missing"):
        Model.from_pretrained(str(tmp_path), device="cpu")
