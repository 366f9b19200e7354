"""Weights: every layout gives transformers' network, and every damage gives a clear refusal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.checkpoint.writer import export_checkpoint
from tests.support import layouts
from tests.support.models import random_model

QUESTION = "Name three colours of the rainbow."


@pytest.fixture
def plain(checkpoint_dir, tmp_path) -> Path:
    """A directory without manifest, to be written into."""
    return layouts.plain_hf(checkpoint_dir, tmp_path / "plain")


def _lm_head_alias(source, target):
    state = layouts.read_state(source)
    state["lm_head.weight"] = state.pop("embed_out.weight")
    return layouts.replace_state(layouts.plain_hf(source, target), state)


def _sharded_pickle(source, target):
    layouts.copy_2023_layout(source, target)
    state = torch.load(target / "pytorch_model.bin", weights_only=True)
    (target / "pytorch_model.bin").unlink()
    parts = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {name: parts[number % 2] for number, name in enumerate(state)}
    for part in parts:
        torch.save({name: tensor for name, tensor in state.items() if weight_map[name] == part}, target / part)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return target


LAYOUTS = {
    "single safetensors file": shutil.copytree,
    "shards with an index": layouts.shard,
    "as transformers writes it": layouts.plain_hf,
    "2023, keys only in special_tokens_map.json": layouts.copy_2023_layout,
    "2023, keys not marked as special": lambda *where: layouts.copy_2023_layout(*where, keys="plain"),
    "2023, keys marked as special": lambda *where: layouts.copy_2023_layout(*where, keys="special"),
    "2023, sharded": _sharded_pickle,
    "head called lm_head": _lm_head_alias,
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_network_and_the_prompt_of_the_original(
    checkpoint_dir, oracle, tokenizer, tmp_path, make
):
    directory = make(checkpoint_dir, tmp_path / "layout")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.tokenizer.control == tokenizer.control
    prompt = checkpoint.tokenizer.encode(QUESTION, "A context.\n### End")
    assert prompt == tokenizer.encode(QUESTION, "A context.\n### End")
    layouts.assert_same_network(layouts.load(directory), oracle, prompt)


SHAPES = {
    "padded vocabulary": {"vocab_size": 1088},
    "tied embeddings": {"tie_word_embeddings": True},
    "sequential residual": {"use_parallel_residual": False},
    "other rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
    "no attention bias": {"attention_bias": False},
}


@pytest.mark.parametrize(
    ("layout", "shape"),
    # A configuration of 2023 had no attention_bias.
    [("safetensors", shape) for shape in SHAPES]
    + [("2023", shape) for shape in SHAPES if shape != "no attention bias"],
)
def test_other_shapes_of_the_network_load_from_both_layouts(tokenizer, tmp_path, layout, shape):
    oracle = random_model(seed=1, **SHAPES[shape])
    directory = export_checkpoint(oracle, tokenizer, tmp_path / "exported")
    if layout == "2023":
        directory = layouts.copy_2023_layout(directory, tmp_path / "old")
    layouts.assert_same_network(layouts.load(directory), oracle, tokenizer.encode(QUESTION))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["safetensors", "2023"])
def test_weights_stored_in_half_precision_load_as_float32_without_further_loss(tokenizer, tmp_path, stored, layout):
    model = random_model(seed=2).to(stored)
    directory = export_checkpoint(model, tokenizer, tmp_path / "exported")
    if layout == "2023":
        directory = layouts.copy_2023_layout(directory, tmp_path / "old")
    oracle = random_model(seed=2)
    # Only the weights: .to() has rounded the oracle's rotary buffers as well, which no reader of a file does.
    oracle.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    net = layouts.load(directory)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    layouts.assert_same_network(net, oracle, tokenizer.encode(QUESTION))


def test_transformers_reads_the_same_network_from_the_2023_layout(checkpoint_dir, tokenizer, tmp_path):
    directory = layouts.copy_2023_layout(checkpoint_dir, tmp_path / "old")
    theirs = GPTNeoXForCausalLM.from_pretrained(directory).eval()
    layouts.assert_same_network(layouts.load(directory), theirs, tokenizer.encode(QUESTION))


def test_safetensors_are_preferred_to_a_pickle_beside_them(checkpoint_dir, plain):
    (plain / "pytorch_model.bin").write_bytes(b"never opened")
    assert [file.name for file in weight_files(plain)] == ["model.safetensors"]
    layouts.load(plain)


# What can be wrong: a change of the directory, and what the message must name, have found and have expected.


def _change_state(change):
    def apply(directory):
        state = layouts.read_state(directory)
        change(state)
        layouts.replace_state(directory, state)

    return apply


def _cut(name, keep):
    def apply(directory):
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * keep)])

    return apply


NORM = "gpt_neox.final_layer_norm.weight"
STATE_DAMAGES = {
    "wrong shape": (lambda s: s.update({NORM: torch.zeros(63)}), (NORM, "[63]", "config.json says [64]")),
    "transposed": (
        lambda s: s.update({"embed_out.weight": s["embed_out.weight"].T}),
        ("embed_out.weight", "[64, 1024]", "config.json says [1024, 64]"),
    ),
    "placeholder of a sharded run": (
        lambda s: s.update({NORM: torch.zeros(0)}),
        (NORM, "[0]", "expected [64]", "stage3_gather_16bit_weights_on_model_save"),
    ),
    "unexpected tensor": (lambda s: s.update(extra=torch.zeros(2)), ("unexpected tensor extra [2]",)),
    "missing tensor": (lambda s: s.pop(NORM), (f"tensor {NORM} [64]", "expected by config.json, is in no weight file")),
    "integers": (lambda s: s.update({NORM: s[NORM].to(torch.int8)}), (NORM, "I8", "expected bf16")),
    "complex numbers": (lambda s: s.update({NORM: s[NORM].to(torch.complex64)}), (NORM, "expected bf16")),
    "the head twice": (
        lambda s: s.update({"lm_head.weight": s["embed_out.weight"].clone()}),
        ("embed_out.weight is also in model.safetensors",),
    ),
}


@pytest.mark.parametrize(("change", "said"), STATE_DAMAGES.values(), ids=STATE_DAMAGES)
def test_tensors_that_do_not_fit_the_configuration_are_refused(plain, change, said):
    _change_state(change)(plain)
    layouts.refusal(plain, str(plain), *said)
    with pytest.raises(layouts.CheckpointError):
        open_checkpoint(plain)  # the headers tell: nobody waits for gigabytes to be read


def test_many_wrong_tensors_are_counted_not_listed(plain):
    _change_state(lambda state: state.clear())(plain)
    assert len(layouts.refusal(plain, "more)")) < 1000


FILE_DAMAGES = {
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ("no weights", "expected model.safetensors")),
    "a directory of that name": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()),
        ("no weights",),
    ),
    "empty": (_cut("model.safetensors", 0), ("model.safetensors", "not a readable weights file")),
    "cut in its header": (_cut("model.safetensors", 0.0001), ("model.safetensors", "not a readable weights file")),
    "cut in a tensor": (_cut("model.safetensors", 0.5), ("model.safetensors", "not a readable weights file")),
}


@pytest.mark.parametrize(("harm", "said"), FILE_DAMAGES.values(), ids=FILE_DAMAGES)
def test_a_damaged_safetensors_file_is_refused(plain, harm, said):
    harm(plain)
    layouts.refusal(plain, str(plain), *said)


INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
INDEX_DAMAGES = {
    "shard not on disk": (lambda d: (d / SHARD).unlink(), (SHARD, "missing", "lists 3 files")),
    "shard cut": (_cut(SHARD, 0.9), (SHARD, "not a readable weights file")),
    "index broken": (_cut(INDEX, 0.9), (INDEX, "not JSON")),
    "index without map": (lambda d: layouts.edit_json(d / INDEX, drop=("weight_map",)), (INDEX, "weight_map")),
    "index with an empty map": (lambda d: layouts.edit_json(d / INDEX, weight_map={}), (INDEX, "weight_map")),
    "index with a list": (lambda d: layouts.edit_json(d / INDEX, weight_map=[SHARD]), (INDEX, "weight_map")),
    "index with numbers": (lambda d: layouts.edit_json(d / INDEX, weight_map={"a": 1}), (INDEX, "weight_map")),
    "index naming nothing": (lambda d: layouts.edit_json(d / INDEX, weight_map={"a": ""}), (INDEX,)),
    "index naming NUL": (lambda d: layouts.edit_json(d / INDEX, weight_map={"a": "\0"}), ("no file can be called so",)),
    "index naming a file above": (
        lambda d: layouts.edit_json(d / INDEX, weight_map={"a": "../secret.safetensors"}),
        (INDEX, "outside the directory"),
    ),
    "index naming the directory above": (
        lambda d: layouts.edit_json(d / INDEX, weight_map={"a": ".."}),
        (INDEX, "outside the directory"),
    ),
    "index with an absolute path": (
        lambda d: layouts.edit_json(d / INDEX, weight_map={"a": "/etc/secret.safetensors"}),
        (INDEX, "outside the directory"),
    ),
    "a tensor in two shards": (
        lambda d: shutil.copyfile(d / SHARD, d / SHARD.replace("00002-", "00001-")),
        (SHARD, "is also in model-00001-of-00003.safetensors"),
    ),
}


@pytest.mark.parametrize(("harm", "said"), INDEX_DAMAGES.values(), ids=INDEX_DAMAGES)
def test_damaged_shards_and_indexes_are_refused(plain, tmp_path, harm, said):
    directory = layouts.shard(plain, tmp_path / "shards")
    harm(directory)
    layouts.refusal(directory, str(directory), *said)
