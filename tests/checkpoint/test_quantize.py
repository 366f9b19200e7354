"""`quantize=` while loading, and directories that hold quantised weights."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modelscope_dolly import files
from modelscope_dolly import load as loading
from modelscope_dolly.checkpoint import manifest, weights
from modelscope_dolly.checkpoint import quantize as convert
from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.checkpoint.quantize import quantize_checkpoint
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli.main import main
from modelscope_dolly.errors import CheckpointError, HardwareError, SettingError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels import quantized_linear
from modelscope_dolly.kernels.quantized_linear import BF16Linear, Int4Linear, Int8Linear
from modelscope_dolly.load import load, load_network
from tests.support.layouts import edit_json
from tests.support.models import random_model

CLASSES = {"int8": Int8Linear, "int4": Int4Linear}
GREEDY = GenerationSettings().updated({"do_sample": False, "max_new_tokens": 12})

needs_library = pytest.mark.skipif(
    not kernels.level(), reason="no compiler built the library, or it knows nothing of this processor"
)


@pytest.fixture(scope="module", params=["int8", "int4"])
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantised_dir(method, checkpoint_dir, tmp_path_factory):
    """A quantised copy of the exported directory. Do not write into it: copy it."""
    return quantize_checkpoint(checkpoint_dir, tmp_path_factory.mktemp("quantised") / method, method)


def state(model: loading.Dolly) -> dict[str, torch.Tensor]:
    return model.net.state_dict()


def answer(model: loading.Dolly) -> str:
    return model.text_generator.generate([Prompt("Name a colour.")], GREEDY, slots=1)[0][0].text


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_quantised_while_loading(checkpoint_dir, method):
    model = load(checkpoint_dir, device="cpu", dtype="fp32", quantize=method)
    kinds = {type(module).__name__ for module in model.net.modules()}
    assert CLASSES[method].__name__ in kinds and "Linear" not in kinds
    assert {parameter.dtype for parameter in model.net.parameters()} == {torch.float32}
    assert answer(model)


def test_what_was_stored_is_what_loading_makes(checkpoint_dir, quantised_dir, method):
    there = load(quantised_dir, device="cpu", dtype="fp32")
    made = load(checkpoint_dir, device="cpu", dtype="fp32", quantize=method)
    assert_same(state(there), state(made))
    assert answer(there) == answer(made)
    assert_same(state(load(quantised_dir, device="cpu", dtype="fp32", quantize=method)), state(there))


def test_a_directory_is_the_same_with_and_without_the_library(checkpoint_dir, quantised_dir, tmp_path, monkeypatch):
    method = json.loads((quantised_dir / "config.json").read_text())["quantization_config"]["quant_method"][-4:]
    monkeypatch.setattr(kernels, "_library", lambda: None)
    other = quantize_checkpoint(checkpoint_dir, tmp_path / "other", method)
    assert manifest.read(other) == manifest.read(quantised_dir)
    assert answer(load(other, device="cpu", dtype="fp32"))


def test_a_sound_directory_is_found_sound_and_is_smaller(checkpoint_dir, quantised_dir):
    assert {finding.status for finding in check_directory(quantised_dir)} == {"ok"}
    sizes = [sum(p.stat().st_size for p in d.glob("*.safetensors")) for d in (quantised_dir, checkpoint_dir)]
    assert sizes[0] < 0.6 * sizes[1]  # a third of the tiny network is its embedding


def test_other_readers_refuse_it(quantised_dir):
    with pytest.raises(ValueError, match="gpt_neox_dolly_quantized"):
        AutoModelForCausalLM.from_pretrained(quantised_dir)


def test_several_files_with_an_index(checkpoint_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 60_000)
    target = quantize_checkpoint(checkpoint_dir, tmp_path / "x", "int8")
    assert len(list(target.glob("model-*.safetensors"))) > 2 and (target / "model.safetensors.index.json").exists()
    assert {finding.status for finding in check_directory(target)} == {"ok"}
    one = quantize_checkpoint(checkpoint_dir, tmp_path / "one", "int8")
    assert_same(state(load(target, device="cpu", dtype="fp32")), state(load(one, device="cpu", dtype="fp32")))


def test_tied_embeddings_have_a_quantised_head(tokenizer, tmp_path):
    size = len(tokenizer.tokenizer)
    source = export_checkpoint(random_model(vocab_size=size, tie_word_embeddings=True), tokenizer, tmp_path / "tied")
    target = quantize_checkpoint(source, tmp_path / "x", "int8")
    there, made = load(target, device="cpu", dtype="fp32"), load(source, device="cpu", dtype="fp32", quantize="int8")
    assert isinstance(there.net.embed_out, Int8Linear)
    assert_same(state(there), state(made))


def _lowest(packed: torch.Tensor) -> None:
    packed.view(torch.uint8)[0, 0, 0] = 0  # with its offset of 128


def _not_finite(tensor: torch.Tensor) -> None:
    tensor[0] = float("nan")


INT8_NAME = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight_packed"
SCALE_NAME = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight_scale"


@pytest.fixture
def damaged(checkpoint_dir, tmp_path):
    """Apply a change to the tensors of an int8 directory, and take its manifest away."""

    def damage(change) -> str:
        target = quantize_checkpoint(checkpoint_dir, tmp_path / "damaged", "int8")
        file = target / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        (target / "manifest.json").unlink()
        return target

    return damage


DAMAGES = {
    "missing scale": (lambda t: t.pop(SCALE_NAME), "weight_scale .* is in no weight file"),
    "missing numbers": (lambda t: t.pop(INT8_NAME), "weight_packed .* is in no weight file"),
    "short": (lambda t: t.update({INT8_NAME: t[INT8_NAME][:-1].clone()}), "has shape .* config.json says"),
    "float numbers": (lambda t: t.update({INT8_NAME: t[INT8_NAME].half()}), "has type F16, expected I32"),
    "whole scale": (lambda t: t.update({SCALE_NAME: t[SCALE_NAME].int()}), "has type I32, expected F32 or F16"),
    "lowest number": (lambda t: _lowest(t[INT8_NAME]), "-128"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_one_line_in_load_and_in_check(damaged, damage):
    change, says = DAMAGES[damage]
    target = damaged(change)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(target, device="cpu", dtype="fp32")
    assert "\n" not in str(caught.value)
    assert any(finding.status == "problem" for finding in check_directory(target))


@pytest.mark.parametrize("outputs", [32, 40])
@pytest.mark.parametrize("inputs", [128, 130, 200])
def test_what_is_packed_is_unpacked(method, outputs, inputs):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    [packed, scales] = quantized_linear.stored_tensors("w", weight, method).values()
    [rows, same] = quantized_linear.stored_tensors("w", weight, method, quantized_linear.ROWS).values()
    assert torch.equal(scales, same) and quantized_linear.packed_problem(packed, method) is None
    shape = quantized_linear.stored_shapes({"w": (outputs, inputs)}, method)["w_packed"]
    assert packed.shape == shape and packed.is_contiguous()
    from_words, from_rows = (CLASSES[method](inputs, outputs) for _ in range(2))
    from_words.take("weight_packed", packed), from_rows.take(f"weight_{method}", rows)
    assert torch.equal(from_words.weight, from_rows.weight)


def test_the_layout_of_rows_is_still_read(checkpoint_dir, quantised_dir, method, tmp_path):
    """Version 1, as it was written before weights were stored packed: the same network, bit for bit."""
    target = shutil.copytree(quantised_dir, tmp_path / "x", ignore=shutil.ignore_patterns("manifest.json"))
    tensors = {}
    for name, tensor in load_file(checkpoint_dir / "model.safetensors").items():
        linear = quantized_linear.is_linear(name, tensor.shape)
        tensors |= (
            quantized_linear.stored_tensors(name, tensor, method, quantized_linear.ROWS) if linear else {name: tensor}
        )
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    edit_json(target / "config.json", quantization_config={"quant_method": f"dolly-{method}", "version": 1})
    old, new = (load(directory, device="cpu", dtype="fp32") for directory in (target, quantised_dir))
    assert_same(state(old), state(new))
    assert {finding.status for finding in check_directory(target)} == {"ok"}


@needs_library
def test_packed_weights_stay_in_the_file_and_outlive_its_name(quantised_dir, tmp_path):
    target = shutil.copytree(quantised_dir, tmp_path / "x")
    mapped, copied = (load(target, device="cpu", dtype="fp32", verify=how) for how in (True, "always"))
    places = [_mapped_file(model.net.embed_out.weight) for model in (mapped, copied)]
    assert [str(target / "model.safetensors") == place for place in places] == [True, False]
    expected = answer(mapped)
    replacement = tmp_path / "other"
    replacement.write_bytes(bytes((target / "model.safetensors").stat().st_size))
    replacement.rename(target / "model.safetensors")  # as every writer of ours replaces a file
    assert answer(mapped) == answer(copied) == expected


def _mapped_file(tensor: torch.Tensor) -> str:
    """The file at the address of a tensor, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line[73:].strip()
    raise AssertionError("no mapping holds it")


def test_scales_that_are_not_finite_are_found(damaged):
    findings = check_directory(damaged(lambda t: _not_finite(t[SCALE_NAME])))
    assert any(finding.status == "problem" and "not finite" in finding.detail for finding in findings)


def test_a_changed_byte_is_found_with_the_manifest(quantised_dir, tmp_path):
    target = shutil.copytree(quantised_dir, tmp_path / "x")
    with open(target / "model.safetensors", "r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match="its content changed"):
        load(target, device="cpu")


@pytest.mark.parametrize("entry", ["gptq", {"quant_method": "gptq", "bits": 4}, {"quant_method": "dolly-int8"}])
def test_other_ways_to_quantise_are_refused(quantised_dir, tmp_path, entry):
    target = shutil.copytree(quantised_dir, tmp_path / "x", ignore=shutil.ignore_patterns("manifest.json"))
    edit_json(target / "config.json", quantization_config=entry)
    with pytest.raises(CheckpointError, match=r"quantization_config is .* which this version cannot read"):
        open_checkpoint(target)


def test_without_its_entry_it_is_no_checkpoint(quantised_dir, tmp_path):
    target = shutil.copytree(quantised_dir, tmp_path / "x", ignore=shutil.ignore_patterns("manifest.json"))
    edit_json(target / "config.json", drop=("quantization_config",))
    with pytest.raises(CheckpointError, match="model_type is 'gpt_neox_dolly_quantized'"):
        open_checkpoint(target)


def test_another_method_than_the_stored_one_is_refused(quantised_dir, method):
    other = {"int8": "int4", "int4": "int8"}[method]
    with pytest.raises(SettingError, match=f"is quantised to {method}; leave out quantize='{other}'"):
        load(quantised_dir, device="cpu", quantize=other)
    with pytest.raises(SettingError, match=f"is quantised to {method} already"):
        quantize_checkpoint(quantised_dir, quantised_dir / "again", other)


def test_unknown_names_are_refused_before_anything_is_read(tmp_path):
    for call in (
        lambda: load(tmp_path, quantize="int2"),
        lambda: quantize_checkpoint(tmp_path, tmp_path / "x", "int2"),
    ):
        with pytest.raises(SettingError, match="unknown quantize 'int2'"):
            call()


@pytest.mark.parametrize("placement", [{"": "cuda:0", "embed_out": "cuda:1"}, {"": "cpu", "embed_out": "cuda:0"}])
def test_not_over_several_devices(checkpoint_dir, placement):
    checkpoint = open_checkpoint(checkpoint_dir)
    with pytest.raises(HardwareError, match="'int8' is for the CPU or one CUDA device, not for "):
        load_network(checkpoint, torch.bfloat16, placement, "int8")


def test_float16_is_refused(checkpoint_dir):
    with pytest.raises(SettingError, match="quantize='int8' computes in fp32 or bf16"):
        load(checkpoint_dir, device="cpu", dtype="fp16", quantize="int8")


def test_memory_is_compared_with_the_quantised_size(checkpoint_dir, monkeypatch):
    monkeypatch.setattr("modelscope_dolly.placement.free_memory", lambda device=None: 600_000)
    checkpoint = open_checkpoint(checkpoint_dir)
    assert load_network(checkpoint, torch.float32, {"": torch.device("cpu")}, "int8")
    with pytest.raises(HardwareError, match=r"the weights need .* in float32"):
        load_network(checkpoint, torch.float32, {"": torch.device("cpu")})


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(checkpoint_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_disk", lambda path: 1000)
    with pytest.raises(HardwareError, match=r"the quantised copy needs 0\.00 GB of disk, 0\.00 GB are free"):
        quantize_checkpoint(checkpoint_dir, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_copy_leaves_nothing(checkpoint_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "write_side_files", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(checkpoint_dir, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_command(checkpoint_dir, tmp_path, capsys):
    target = tmp_path / "small"
    assert main(["quantize", str(checkpoint_dir), str(target), "--to", "int4"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    asked = ["ask", "Name a colour.", "--device", "cpu", "--greedy", "--max-new-tokens", "4", "--json"]
    assert main([*asked, "--model", str(target), "--threads", "1"]) == 0
    stored = json.loads(capsys.readouterr().out)["text"]
    assert main([*asked, "--model", str(checkpoint_dir), "--quantize", "int4"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == stored
    assert main(["quantize", str(checkpoint_dir), str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["quantize", str(checkpoint_dir), str(tmp_path / "y"), "--to", "none"]) == 2


@needs_library
def test_float32_multiplies_bfloat16_weights_as_they_are_stored(tokenizer, checkpoint_dir, tmp_path, monkeypatch):
    network = random_model(vocab_size=len(tokenizer.tokenizer)).bfloat16()
    source = export_checkpoint(network, tokenizer, tmp_path / "bf16")
    packed = load(source, device="cpu", dtype="fp32")
    assert isinstance(packed.net.embed_out, BF16Linear)
    assert isinstance(load(checkpoint_dir, device="cpu", dtype="fp32").net.embed_out, torch.nn.Linear)
    found = answer(packed)
    monkeypatch.setattr(kernels, "_library", lambda: None)
    widened = load(source, device="cpu", dtype="fp32")
    assert isinstance(widened.net.embed_out, torch.nn.Linear) and answer(widened) == found


@needs_library
def test_bfloat16_is_packed_only_where_the_processor_lacks_it(checkpoint_dir, monkeypatch):
    for lacks, kind in ((True, BF16Linear), (False, torch.nn.Linear)):
        monkeypatch.setattr(loading, "cpu_computes_bf16", lambda lacks=lacks: not lacks)
        assert isinstance(load(checkpoint_dir, device="cpu", dtype="bf16").net.embed_out, kind)


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(checkpoint_dir, tmp_path):
    """By the limit on the size of a file, which ends a write as a full disk does."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "modelscope_dolly.cli", "quantize", str(checkpoint_dir), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    [line] = done.stderr.splitlines()
    assert line.startswith("dolly: ") and "cannot be written (" in line


def test_a_place_that_cannot_be_written_is_an_error_of_ours(checkpoint_dir):
    with pytest.raises(CheckpointError, match=r"/dev/null/x: cannot be written"):
        quantize_checkpoint(checkpoint_dir, "/dev/null/x")
