"""GGUF files, read back with the format's own reader: every tensor, every key; and what is refused."""

from __future__ import annotations

import errno
import itertools
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from modelscope_dolly import files
from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.quantize import quantize_checkpoint
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli.main import main
from modelscope_dolly.errors import CheckpointError, HardwareError, SettingError
from modelscope_dolly.prompt import END_KEY, chat_template
from tests.support.layouts import copy_2023_layout, edit_json, plain_hf, read_state, replace_state, shard
from tests.support.models import random_model
from tests.support.texts import examples

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed; it is in the extra `gguf`")

from modelscope_dolly.checkpoint.gguf_export import LARGEST, export_gguf, split_qkv  # noqa: E402

QKV = "gpt_neox.layers.1.attention.query_key_value.weight"
CARD = "---\nlicense: mit\nbase_model:\n- EleutherAI/pythia-2.8b\n---\n# dolly\n"


def keys(file: gguf.GGUFReader) -> dict:
    return {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")}


def numbers(file: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """Name in GGUF -> the tensor in float32."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in file.tensors
    }


def interleaved(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `split_qkv`, row by row: all queries, keys, values -> head by head."""
    width = len(tensor) // heads // 3
    rows = [
        part * heads * width + head * width + row
        for head, part, row in itertools.product(range(heads), range(3), range(width))
    ]
    return tensor[rows]


NAMES = {
    "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
}  # fmt: skip


def transformers_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{NAMES[stem]}.{leaf}"
    _, layer, part = stem.split(".")
    return f"gpt_neox.layers.{layer}.{NAMES[part]}.{leaf}"


def transformers_network(path) -> GPTNeoXForCausalLM:
    """transformers' network made of nothing but the GGUF file."""
    file = gguf.GGUFReader(path)
    found = keys(file)
    network = {name.removeprefix("gptneox."): value for name, value in found.items() if name.startswith("gptneox.")}
    heads = network["attention.head_count"]
    config = GPTNeoXConfig(
        vocab_size=len(found["tokenizer.ggml.tokens"]),
        hidden_size=network["embedding_length"],
        num_hidden_layers=network["block_count"],
        num_attention_heads=heads,
        intermediate_size=network["feed_forward_length"],
        max_position_embeddings=network["context_length"],
        layer_norm_eps=network["attention.layer_norm_epsilon"],
        use_parallel_residual=network["use_parallel_residual"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": network["rope.freq_base"],
            "partial_rotary_factor": network["rope.dimension_count"] / (network["embedding_length"] // heads),
        },
    )
    model = GPTNeoXForCausalLM(config).eval()
    state = {
        transformers_name(name): interleaved(tensor, heads) if "attn_qkv" in name else tensor
        for name, tensor in numbers(file).items()
    }
    model.load_state_dict(state, strict=True)
    return model


def assert_same_logits(path, oracle: GPTNeoXForCausalLM, **tolerance) -> None:
    ids = torch.arange(1, 40)[None] * 7 % oracle.config.vocab_size
    with torch.inference_mode():
        torch.testing.assert_close(transformers_network(path)(ids).logits, oracle(ids).logits, **tolerance)


@pytest.fixture(scope="module")
def exact(checkpoint_dir, tmp_path_factory):
    """The session's checkpoint in float32. Do not write to it."""
    return export_gguf(checkpoint_dir, tmp_path_factory.mktemp("gguf") / "dolly.gguf", "f32")


VARIANTS = {
    "as dolly": {},
    "sequential residual": {"use_parallel_residual": False},
    "half rotated": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000, "partial_rotary_factor": 0.5}},
    "tied": {"tie_word_embeddings": True},
    "no attention bias": {"attention_bias": False},
    "other sizes": {"intermediate_size": 96, "num_attention_heads": 2, "layer_norm_eps": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers_computes_the_same_from_the_file_alone(tokenizer, tmp_path, variant):
    oracle = random_model(vocab_size=len(tokenizer.tokenizer), **VARIANTS[variant])
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():  # zero biases and unit scales would hide an exchange
            if parameter.dim() == 1:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 10
    source = export_checkpoint(oracle, tokenizer, tmp_path / "source")
    assert_same_logits(export_gguf(source, tmp_path / "x.gguf", "f32"), oracle, rtol=1e-5, atol=1e-5)


def test_every_key(checkpoint_dir, tokenizer, exact):
    found = keys(gguf.GGUFReader(exact))
    tokens, types, merges = (found.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    assert len(tokens) == len(types) == len(tokenizer.tokenizer) and " " in merges[0]
    assert found.pop("gptneox.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert found.pop("general.sampling.top_p") == pytest.approx(0.92)
    control = tokenizer.control
    assert tokens[control.end] == END_KEY and control.end != control.eos
    assert found == {
        "general.architecture": "gptneox",
        "general.type": "model",
        "general.name": checkpoint_dir.name,
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 0,
        "general.sampling.min_p": 0.0,
        "dolly.source_sha256": manifest.model_digest(checkpoint_dir, weight_files(checkpoint_dir)),
        "gptneox.context_length": 2048,
        "gptneox.vocab_size": len(tokens),
        "gptneox.embedding_length": 64,
        "gptneox.block_count": 3,
        "gptneox.feed_forward_length": 256,
        "gptneox.attention.head_count": 4,
        "gptneox.rope.dimension_count": 4,
        "gptneox.rope.freq_base": 10000.0,
        "gptneox.use_parallel_residual": True,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": control.eos,
        "tokenizer.ggml.eos_token_id": control.eos,
        "tokenizer.ggml.padding_token_id": control.eos,
        "tokenizer.ggml.eot_token_id": control.end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat_template(),
    }


@pytest.mark.parametrize("type_name", LARGEST)
def test_every_tensor_in_every_type(checkpoint_dir, exact, tmp_path, type_name):
    file = gguf.GGUFReader(export_gguf(checkpoint_dir, tmp_path / "x.gguf", type_name))
    state = {name.replace("embed_out", "lm_head"): tensor for name, tensor in read_state(checkpoint_dir).items()}
    assert {transformers_name(tensor.name) for tensor in file.tensors} == state.keys()
    found = numbers(file)
    for tensor in file.tensors:
        source = state[transformers_name(tensor.name)]
        expected = split_qkv(source, 4) if "attn_qkv" in tensor.name else source
        assert tuple(found[tensor.name].shape) == tuple(expected.shape)
        assert tensor.tensor_type.name == ("F32" if source.dim() == 1 else type_name.upper())
        if tensor.tensor_type.name == "Q8_0":
            steps = expected.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
            error = (found[tensor.name] - expected).unflatten(1, (-1, 32)).abs()
            assert bool((error <= 0.5 * steps + 127 * steps * 2**-11 + 1e-7).all())  # rounding, and that of the scale
        else:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.tensor_type.name]
            assert torch.equal(found[tensor.name], expected.to(dtype).float())
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[type_name]
    assert keys(file)["general.file_type"] == gguf.LlamaFileType[file_type]


@examples
@given(heads=st.integers(1, 5), width=st.integers(1, 6), columns=st.integers(0, 3))
def test_query_key_value_is_put_in_order_and_back(heads, width, columns):
    tensor = torch.arange(heads * 3 * width * max(columns, 1)).view(heads * 3 * width, *([columns] if columns else []))
    split = split_qkv(tensor, heads)
    assert split.shape == tensor.shape and torch.equal(interleaved(split, heads), tensor)
    if heads > 1:
        assert torch.equal(split[width : 2 * width], tensor[3 * width : 4 * width])  # the queries of the second head


def test_rows_beyond_the_tokenizer_are_unused_tokens(tokenizer, tmp_path):
    size = len(tokenizer.tokenizer)
    oracle = random_model(vocab_size=size + 8)
    source = export_checkpoint(oracle, tokenizer, tmp_path / "source")
    path = export_gguf(source, tmp_path / "x.gguf", "f32")
    found = keys(gguf.GGUFReader(path))
    assert found["tokenizer.ggml.token_type"][size:] == [gguf.TokenType.UNUSED] * 8
    assert_same_logits(path, oracle, rtol=1e-5, atol=1e-5)


def test_a_layout_of_2023_and_shards_give_the_same_numbers(checkpoint_dir, exact, tmp_path):
    expected, described = numbers(gguf.GGUFReader(exact)), keys(gguf.GGUFReader(exact))
    for source in (copy_2023_layout(checkpoint_dir, tmp_path / "2023"), shard(checkpoint_dir, tmp_path / "shards")):
        file = gguf.GGUFReader(export_gguf(source, tmp_path / f"{source.name}.gguf", "f32"))
        found = numbers(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert {name for name, value in keys(file).items() if value != described[name]} == {
            "general.name",
            "dolly.source_sha256",
        }


def test_twice_the_same_bytes(checkpoint_dir, exact, tmp_path):
    assert export_gguf(checkpoint_dir, tmp_path / "x.gguf", "f32").read_bytes() == exact.read_bytes()


def test_the_card_tells_licence_and_base(checkpoint_dir, tmp_path):
    source = plain_hf(checkpoint_dir, tmp_path / "models" / "me--dolly-v2-3b" / "snapshots" / "v1.0.3")
    (source / "README.md").write_text(CARD, encoding="utf-8")
    found = keys(gguf.GGUFReader(export_gguf(source, tmp_path / "x.gguf")))
    assert (found["general.name"], found["general.version"]) == ("me/dolly-v2-3b", "v1.0.3")
    assert found["general.license"] == "mit"
    assert (found["general.base_model.count"], found["general.base_model.0.name"]) == (1, "EleutherAI/pythia-2.8b")


@pytest.mark.parametrize("head", ["license: 3\nbase_model: {a: b}", "- a list", "", "license: []"])
def test_a_card_that_tells_nothing_of_it_is_fine(checkpoint_dir, tmp_path, head):
    source = plain_hf(checkpoint_dir, tmp_path / "source")
    (source / "README.md").write_text(f"---\n{head}\n---\n", encoding="utf-8")
    found = keys(gguf.GGUFReader(export_gguf(source, tmp_path / "x.gguf")))
    assert "general.license" not in found and "general.base_model.count" not in found


@pytest.mark.parametrize("card", [b"---\nlicense: [mit\n---\n", b"---\nlicense: \xff\n---\n"])
def test_a_damaged_card_is_refused(checkpoint_dir, tmp_path, card):
    source = plain_hf(checkpoint_dir, tmp_path / "source")
    (source / "README.md").write_bytes(card)
    refused(CheckpointError, "README.md: its YAML head cannot be read", source, tmp_path / "x.gguf")


def refused(kind: type, says: str, source, target, type_name: str = "f32") -> None:
    before = target.read_bytes() if target.is_file() else None
    with pytest.raises(kind) as caught:
        export_gguf(source, target, type_name)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert (target.read_bytes() if target.is_file() else None) == before
    assert not list(target.parent.glob(".*.incomplete"))


def test_a_quantised_directory_is_refused(checkpoint_dir, tmp_path):
    source = quantize_checkpoint(checkpoint_dir, tmp_path / "int8")
    refused(SettingError, "is quantised to int8, and GGUF has other formats", source, tmp_path / "x.gguf")


def test_a_changed_byte_is_found(checkpoint_dir, tmp_path):
    source = shutil.copytree(checkpoint_dir, tmp_path / "source")
    with open(source / "model.safetensors", "r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes([byte ^ 1]))
    refused(CheckpointError, "its content changed", source, tmp_path / "x.gguf")


def test_an_existing_target_is_refused(checkpoint_dir, tmp_path):
    (tmp_path / "x.gguf").write_text("mine")
    refused(CheckpointError, "exists already; give another name or remove it", checkpoint_dir, tmp_path / "x.gguf")
    (tmp_path / "directory.gguf").mkdir()
    refused(CheckpointError, "exists already", checkpoint_dir, tmp_path / "directory.gguf")


@pytest.mark.parametrize(
    ("changes", "type_name", "says"),
    [
        ({"hidden_act": "relu"}, "f32", "hidden_act is 'relu', llama.cpp computes gelu"),
        ({"intermediate_size": 80}, "q8_0", "intermediate_size is 80, q8_0 needs a multiple of 32"),
    ],
)
def test_a_network_that_llama_cpp_does_not_compute_is_refused(tokenizer, tmp_path, changes, type_name, says):
    network = random_model(vocab_size=len(tokenizer.tokenizer), **changes)
    source = export_checkpoint(network, tokenizer, tmp_path / "source")
    refused(CheckpointError, says, source, tmp_path / "x.gguf", type_name)


@pytest.mark.parametrize(
    ("value", "type_name", "says"),
    [
        (float("nan"), "bf16", f"{QKV} holds values that are not finite; run: dolly check"),
        (float("-inf"), "q8_0", "not finite"),
        (-70000.0, "f16", f"{QKV} holds values up to 70000, f16 ends at 65504; give another --type"),
        (3.4e38, "bf16", "bf16 ends at"),
        (1e7, "q8_0", "q8_0 ends at"),
    ],
)
def test_values_that_the_type_cannot_hold_are_refused(checkpoint_dir, tmp_path, value, type_name, says):
    source = plain_hf(checkpoint_dir, tmp_path / "source")
    state = load_file(source / "model.safetensors")
    state[QKV][5, 3] = value
    replace_state(source, state)
    refused(CheckpointError, says, source, tmp_path / "x.gguf", type_name)


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(checkpoint_dir, exact, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(files, "gigabytes", lambda count: needed.append(count) or "x GB")
    monkeypatch.setattr(files, "free_disk", lambda path: 1000)
    refused(HardwareError, "the GGUF file needs x GB of disk", checkpoint_dir, tmp_path / "x.gguf")
    assert abs(needed[0] - exact.stat().st_size) < 0.05 * exact.stat().st_size


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_file_that_is_not_finished_is_not_there(checkpoint_dir, tmp_path, monkeypatch, error):
    write = gguf.GGUFWriter.write_tensor_data
    written = itertools.count()

    def fail(writer, tensor):
        if next(written) == 7:
            raise error
        write(writer, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    kind, says = (HardwareError, "cannot be written: No space") if isinstance(error, OSError) else (type(error), "")
    refused(kind, says, checkpoint_dir, tmp_path / "x.gguf")
    assert list(tmp_path.iterdir()) == [] and next(written) == 8


def test_a_folder_that_cannot_be_made_is_one_line(checkpoint_dir, tmp_path):
    (tmp_path / "file").write_text("")
    refused(HardwareError, "x.gguf: cannot be written: ", checkpoint_dir, tmp_path / "file" / "x.gguf")


def test_the_command(checkpoint_dir, tmp_path, capsys, monkeypatch):
    target = tmp_path / "new" / "dolly.gguf"
    assert main(["export", str(checkpoint_dir), str(target), "--type", "q8_0"]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert keys(gguf.GGUFReader(target))["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert main(["export", str(checkpoint_dir), str(tmp_path / "x.gguf")]) == 0
    assert keys(gguf.GGUFReader(tmp_path / "x.gguf"))["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    capsys.readouterr()
    monkeypatch.setattr("modelscope_dolly.checkpoint.download.locate", lambda *_: pytest.fail("before a download"))
    for arguments, says in (
        ([str(target)], "exists already"),
        ([str(tmp_path / "y.bin")], "must end in .gguf, for instance y.bin.gguf"),
        ([str(tmp_path / "y.gguf"), "--type", "q4_0"], "unknown type 'q4_0'. Did you mean 'q8_0'? Allowed: bf16, f16,"),
    ):
        assert main(["export", "me/dolly", *arguments]) == 2
        told = capsys.readouterr().err
        assert told.startswith("dolly: ") and says in told and told.count("\n") == 1


def test_without_the_package_the_extra_is_named(checkpoint_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", str(checkpoint_dir), str(tmp_path / "x.gguf")]) == 2
    told = capsys.readouterr().err
    assert "pip install 'modelscope-dolly[gguf]'" in told and told.count("\n") == 1


def test_an_activation_of_another_name_is_no_hindrance(checkpoint_dir, tmp_path):
    source = plain_hf(checkpoint_dir, tmp_path / "source")
    edit_json(source / "config.json", hidden_act="gelu_new")
    assert export_gguf(source, tmp_path / "x.gguf").is_file()
