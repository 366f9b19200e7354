"""An adapter is merged while a checkpoint is loaded, into its own base only; damaged and hostile ones are one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint import download, manifest
from modelscope_dolly.checkpoint.adapter import BASE, CONFIG, WEIGHTS, check_alone
from modelscope_dolly.checkpoint.download import locate_adapter
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli.main import main
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.load import Dolly, load
from tests.support.models import random_model
from train.nano import build_tokenizer

peft = pytest.importorskip("peft")

GREEDY = GenerationSettings().updated({"do_sample": False, "max_new_tokens": 12})


def answers(model: Dolly) -> list[str]:
    prompts = [Prompt("Name a colour."), Prompt("Why is the sky blue?")]
    return [update.text for [update] in model.text_generator.generate(prompts, GREEDY, slots=2)]


def peft_adapter(base: Path, target: Path, rows: bool = True, **changes):
    """An adapter with random numbers, made and saved by peft itself; returns the network that has it."""
    network = GPTNeoXForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense", "dense_4h_to_h"], **changes}
    if rows:
        settings["trainable_token_indices"] = {"embed_in": [5, 1023], "lm_head": [7]}
    model = peft.get_peft_model(network, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(target, save_embedding_layers=False)
    return model


def record_base(adapter: Path, base: Path) -> None:
    digest = manifest.weights_digest(base, [base / "model.safetensors"])
    (adapter / BASE).write_text(json.dumps({"version": 1, "name": "the/base", "weights_sha256": digest}))


@pytest.fixture(scope="module")
def made(checkpoint_dir, tmp_path_factory) -> tuple[Path, Path]:
    """(an adapter of checkpoint_dir, the same merged by peft and exported). Nobody writes into them."""
    folder = tmp_path_factory.mktemp("adapter")
    merged = peft_adapter(checkpoint_dir, folder / "adapter").merge_and_unload()
    record_base(folder / "adapter", checkpoint_dir)
    export_checkpoint(merged, open_checkpoint(checkpoint_dir).tokenizer, folder / "merged")
    return folder / "adapter", folder / "merged"


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(made[0], tmp_path / "adapter"))


def refused(base: Path, adapter: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(base, adapter=adapter, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_weights_are_those_that_peft_merges(checkpoint_dir, made):
    adapter, merged = made
    expected = load_file(merged / "model.safetensors")
    found = {name: tensor.clone() for name, tensor in open_checkpoint(checkpoint_dir, adapter=adapter).read_tensors()}
    assert found.keys() == expected.keys()
    base = load_file(checkpoint_dir / "model.safetensors")
    assert not torch.equal(found["embed_out.weight"], base["embed_out.weight"])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "bf16"}], ids=str)
def test_answers_are_those_of_the_merged_model(checkpoint_dir, made, options):
    adapter, merged = made
    ours = answers(load(checkpoint_dir, "cpu", adapter=adapter, **options))
    assert ours == answers(load(merged, "cpu", **options)) != answers(load(checkpoint_dir, "cpu", **options))


def test_bfloat16_weights_are_not_rounded_again(tmp_path, tokenizer):
    base = export_checkpoint(random_model(vocab_size=1024).bfloat16(), tokenizer, tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter")
    linear = load(base, "cpu", adapter=tmp_path / "adapter").net.gpt_neox.layers[0].mlp.dense_4h_to_h
    assert linear.weight.dtype == torch.float32


def test_the_command_line_and_the_pipeline_take_it(checkpoint_dir, made, capsys):
    from modelscope_dolly import dolly_pipeline

    adapter, merged = made
    pipe = dolly_pipeline(str(checkpoint_dir), device="cpu", adapter=str(adapter))
    expected = pipe("Name a colour.", do_sample=False, max_new_tokens=8)["text"]
    ask = ["ask", "Name a colour.", "--greedy", "--max-new-tokens", "8", "--device", "cpu"]
    assert main([*ask, "--model", str(checkpoint_dir), "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out.strip() == expected.strip()
    assert main([*ask, "--model", str(checkpoint_dir), "--adapter", str(merged)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dolly")]
    assert "adapter_config.json: missing" in line


def test_a_base_without_the_keys_gets_them_and_the_rows_of_the_adapter(tmp_path, records):
    """As a published base model is: its tokenizer knows no key, and its embedding has other rows."""
    tokenizer = build_tokenizer(records, vocabulary=1024)
    ids = [tokenizer.control.end, tokenizer.control.instruction, tokenizer.control.response]
    bases = {}
    for rows in (1021, 1024, 1056):
        base = export_checkpoint(random_model(vocab_size=rows), tokenizer, tmp_path / f"base{rows}")
        content = json.loads((base / "tokenizer.json").read_text())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in ids]
        (base / "tokenizer.json").write_text(json.dumps(content))
        for name in ("special_tokens_map.json", "tokenizer_config.json", "manifest.json"):
            (base / name).unlink()
        bases[rows] = base
    rows_of_keys = {"embed_in": ids, "lm_head": ids}
    peft_adapter(bases[1056], tmp_path / "adapter", rows=False, trainable_token_indices=rows_of_keys)
    for base in bases.values():
        checkpoint = open_checkpoint(base, adapter=tmp_path / "adapter")
        shapes = {name: tensor.shape for name, tensor in checkpoint.read_tensors()}
        assert checkpoint.config.vocab_size == 1024
        assert shapes["embed_out.weight"] == shapes["gpt_neox.embed_in.weight"] == (1024, 64)
    peft_adapter(bases[1056], tmp_path / "without", rows=False)
    assert "neither it nor" in refused(bases[1021], tmp_path / "without")


def test_another_base_is_refused_and_a_copy_of_the_base_is_not(checkpoint_dir, adapter, tmp_path, caplog):
    copy = Path(shutil.copytree(checkpoint_dir, tmp_path / "copy"))
    (copy / "manifest.json").unlink()
    open_checkpoint(copy, adapter=adapter)  # its weight files are read
    state = load_file(copy / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, copy / "model.safetensors")
    assert "was trained on the/base with weights" in refused(copy, adapter)
    caplog.clear()
    open_checkpoint(copy, verify=False, adapter=adapter)
    assert "verify is off: not compared with the base" in caplog.text
    manifest.write(copy)
    assert "give the base model it was trained on" in refused(copy, adapter, verify=False)
    (adapter / BASE).unlink()
    open_checkpoint(copy, adapter=adapter)
    assert "has no base.json" in caplog.text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only LORA can be merged here"),
        ({"use_dora": True}, "use_dora is True, which this version cannot merge"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"dense": 8}}, "rank_pattern is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"r": 10**9}, "r is 1000000000, expected a whole number from 1 to 16,384"),
        ({"r": True}, "r is True"),
        ({"r": 5}, "this network needs [5, "),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
        ({"lora_alpha": 1e9}, "lora_alpha is 1000000000.0"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"trainable_token_indices": None}, "trainable_token_indices has no list of different token ids below 1024"),
        ({"trainable_token_indices": {"embed_in": [5, 5], "lm_head": [7]}}, "no list of different token ids"),
        ({"trainable_token_indices": {"embed_in": [5, 1024], "lm_head": [7]}}, "no list of different token ids"),
        ({"trainable_token_indices": {"embed_in": [-1, 5], "lm_head": [7]}}, "no list of different token ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_merged_are_refused(checkpoint_dir, adapter, change, says):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | change))
    assert says in refused(checkpoint_dir, adapter)


def _tensors(adapter: Path, change) -> None:
    state = load_file(adapter / WEIGHTS)
    change(state)
    save_file(state, adapter / WEIGHTS)


A = "base_model.model.gpt_neox.layers.0.attention.dense.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / WEIGHTS).unlink(), "missing, or not a regular file; pickled adapters are not read"),
        (lambda path: (path / WEIGHTS).write_bytes(b"\x80\x04pickle"), "not a readable weights file"),
        (lambda path: (path / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little")), "not a readable weights file"),
        (lambda path: (path / CONFIG).write_text("[" * 9000), "not JSON"),
        (lambda path: (path / CONFIG).write_bytes(b" " * (1 << 25)), "larger than"),
        (lambda path: (path / BASE).write_text('{"version": 1, "weights_sha256": "../x"}'), "base.json: damaged"),
        (lambda path: _tensors(path, lambda state: state.pop(A)), "half of gpt_neox.layers.0.attention.dense.weight"),
        (lambda path: _tensors(path, lambda state: state.clear()), "has no tensors"),
        (lambda path: _tensors(path, lambda state: state.update(x=torch.zeros(1))), "unexpected tensor 'x'"),
        (lambda path: _tensors(path, lambda state: state.update({A: torch.zeros(9, 9)})), "has shape [9, 9]"),
        (lambda path: _tensors(path, lambda state: state.update({A: state[A].char()})), "has type I8"),
        (lambda path: _tensors(path, lambda s: s.update({A.replace(".0.", ".9.", 1): s[A].clone()})), "unexpected"),
    ],
)  # fmt: skip
def test_damaged_adapters_are_refused(checkpoint_dir, adapter, damage, says):
    damage(adapter)
    assert says in refused(checkpoint_dir, adapter)


def test_pipes_and_absent_directories_are_refused_at_once(checkpoint_dir, adapter, tmp_path):
    assert "no such directory; an adapter is one with" in refused(checkpoint_dir, tmp_path / "none")
    for name in (CONFIG, WEIGHTS):
        kept = (adapter / name).read_bytes()
        (adapter / name).unlink()
        os.mkfifo(adapter / name)
        assert "not a regular file" in refused(checkpoint_dir, adapter)
        (adapter / name).unlink()
        (adapter / name).write_bytes(kept)


def test_numbers_that_are_not_finite_are_found_while_merging(checkpoint_dir, adapter):
    _tensors(adapter, lambda state: state[A].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"lora_A\.weight holds numbers that are not finite"):
        load(checkpoint_dir, "cpu", adapter=adapter)


def test_files_that_are_not_those_of_the_manifest_are_refused(checkpoint_dir, adapter):
    manifest.write(adapter)
    open_checkpoint(checkpoint_dir, adapter=adapter)
    _tensors(adapter, lambda state: state[A].add_(1))
    assert "adapter_model.safetensors: 37" in refused(checkpoint_dir, adapter)
    open_checkpoint(checkpoint_dir, verify=False, adapter=adapter)


def test_a_quantised_base_is_refused(checkpoint_dir, adapter, tmp_path):
    from modelscope_dolly.checkpoint.quantize import quantize_checkpoint

    quantize_checkpoint(checkpoint_dir, tmp_path / "int8")
    assert "with quantize='int8'" in refused(tmp_path / "int8", adapter)


def test_rank_stabilised_adapters_are_scaled_as_peft_does(checkpoint_dir, tmp_path):
    merged = peft_adapter(checkpoint_dir, tmp_path / "adapter", rows=False, use_rslora=True).merge_and_unload()
    tensors = dict(open_checkpoint(checkpoint_dir, adapter=tmp_path / "adapter").read_tensors())
    name = "gpt_neox.layers.1.attention.dense.weight"
    torch.testing.assert_close(tensors[name], merged.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_of_a_hub_is_named_with_its_tag(adapter, monkeypatch):
    asked = []
    monkeypatch.setattr(download, "_download", lambda *wanted: asked.append(wanted) or adapter)
    assert locate_adapter("me/adapter@v1.0.0") == locate_adapter("me/adapter") == adapter
    assert [(model, revision) for model, revision, _ in asked] == [("me/adapter", "v1.0.0"), ("me/adapter", "master")]
    assert all(".bin" not in pattern for _, _, patterns in asked for pattern in patterns)
    assert locate_adapter(str(adapter)) == adapter and len(asked) == 2


def test_an_adapter_alone_says_what_it_is(adapter):
    facts = check_alone(adapter)
    assert facts[:3] == (4, 8.0, "the/base") and len(facts.base_digest) == 64
    (adapter / BASE).unlink()
    with pytest.raises(CheckpointError, match="an adapter is published with the digest of its base"):
        check_alone(adapter)
