"""Opening a directory: both spellings of the configuration, every tokenizer layout, and messages that help."""

import collections
import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.config import read_config
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.errors import CheckpointError, DollyError
from modelscope_dolly.model import DollyForTextGeneration
from modelscope_dolly.prompt import CONTROL_KEYS, END_KEY, INSTRUCTION_KEY, RESPONSE_KEY
from tests.support import layouts
from tests.support.models import random_model

QUESTION = "Name three colours of the rainbow."


@pytest.fixture
def plain(checkpoint_dir, tmp_path) -> Path:
    """A directory without manifest, to be written into."""
    return layouts.plain_hf(checkpoint_dir, tmp_path / "plain")


def test_an_opened_checkpoint_tells_what_is_in_it(checkpoint_dir, oracle):
    checkpoint = open_checkpoint(str(checkpoint_dir))
    assert checkpoint.path == checkpoint_dir
    assert checkpoint.parameters == sum(parameter.numel() for parameter in oracle.parameters())
    assert len(checkpoint.tensors) == len(layouts.read_state(checkpoint_dir))
    assert {file.name for file, _ in checkpoint.tensors.values()} == {"model.safetensors"}


# Configuration

ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
SPELLINGS = {
    "old": {"rotary_pct": 0.5, "rotary_emb_base": 5000},
    "new": {"rope_parameters": ROPE},
    "both": {"rotary_pct": 0.5, "rotary_emb_base": 5000, "rope_parameters": ROPE},
    "new without the factor": {"rotary_pct": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "old beside null": {"rotary_pct": 0.5, "rotary_emb_base": 5000, "rope_parameters": None},
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_rope_gives_the_network_that_transformers_gives(tokenizer, tmp_path, spelling):
    oracle = random_model(seed=3, rope_parameters=ROPE)
    directory = layouts.plain_hf(export_checkpoint(oracle, tokenizer, tmp_path / "a"), tmp_path / "b")
    layouts.edit_json(directory / "config.json", drop=("rotary_pct", "rotary_emb_base", "rope_parameters"))
    layouts.edit_json(directory / "config.json", **spelling)
    prompt = tokenizer.encode(QUESTION)
    net = layouts.load(directory)
    layouts.assert_same_network(net, oracle, prompt)
    layouts.assert_same_network(net, GPTNeoXForCausalLM.from_pretrained(directory).eval(), prompt)


def test_a_configuration_without_rope_has_that_of_gpt_neox(plain):
    layouts.edit_json(plain / "config.json", drop=("rotary_pct", "rotary_emb_base", "rope_parameters"))
    rope = read_config(plain).rope_parameters
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (0.25, 10000)


OLD_ONLY = {"drop": ("rope_parameters",)}
CONFIGURATION_DAMAGES = {
    "another model": ({"model_type": "llama"}, ("model_type is 'llama'", "'gpt_neox'")),
    "no model type": ({"drop": ("model_type",)}, ("model_type is None", "'gpt_neox'")),
    "no size": ({"drop": ("hidden_size",)}, ("hidden_size is None", "expected a whole number")),
    "a size in quotes": ({"hidden_size": "64"}, ("hidden_size is '64'", "expected a whole number")),
    "a broken size": ({"hidden_size": 64.5}, ("hidden_size is 64.5", "expected a whole number")),
    "true layers": ({"num_hidden_layers": True}, ("num_hidden_layers is True",)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers is 0", "from 1 to 1024")),
    "too many layers": ({"num_hidden_layers": 10**9}, ("num_hidden_layers is 1000000000",)),
    "one layer more": ({"num_hidden_layers": 4}, ("gpt_neox.layers.3.", "in no weight file")),
    "one layer less": ({"num_hidden_layers": 2}, ("unexpected tensor gpt_neox.layers.2.",)),
    "other width": ({"intermediate_size": 128}, ("[256, 64]", "config.json says [128, 64]")),
    "heads that do not divide": ({"num_attention_heads": 5}, ("heads",)),
    "unknown activation": ({"hidden_act": "wobble"}, ("hidden_act 'wobble' is unknown",)),
    "activation in a list": ({"hidden_act": ["gelu"]}, ("hidden_act",)),
    "flag in quotes": ({"use_parallel_residual": "false"}, ("use_parallel_residual", "'false'")),
    "epsilon of nothing": ({"layer_norm_eps": None}, ("layer_norm_eps", "None")),
    "epsilon too large": ({"layer_norm_eps": 1.5}, ("layer_norm_eps 1.5 must be in (0, 1)",)),
    "half a position": ({"max_position_embeddings": 100.5}, ("max_position_embeddings", "100.5")),
    "no positions": ({"max_position_embeddings": 0}, ("max_position_embeddings 0 must be 1 to",)),
    "rope in a list": ({"rope_parameters": [1]}, ("rope_parameters", "[1]")),
    "another rope": ({"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}}, ("'linear'", "'default'")),
    "rotary share in quotes": ({**OLD_ONLY, "rotary_pct": "0.5"}, ("rotary_pct", "'0.5'", "a number")),
    "no rotary share": ({**OLD_ONLY, "rotary_pct": None}, ("rotary_pct", "None", "a number")),
    "rotary share of zero": ({**OLD_ONLY, "rotary_pct": 0}, ("rotary_pct", "0", "(0, 1]")),
    "odd rotary width": ({**OLD_ONLY, "rotary_pct": 0.2}, ("rotary width", "even")),
    "base in quotes": ({**OLD_ONLY, "rotary_emb_base": "10000"}, ("rotary_emb_base", "'10000'", "a number")),
    "base below zero": ({**OLD_ONLY, "rotary_emb_base": -1}, ("rotary_emb_base", "-1", "positive")),
    "base of infinity": ({**OLD_ONLY, "rotary_emb_base": float("inf")}, ("rotary_emb_base", "inf", "positive")),
    "vocabulary below the keys": (
        {"vocab_size": 1023},
        ("vocab_size is 1023", "tokenizer has 1024 tokens", "up to 1023"),
    ),
}


@pytest.mark.parametrize(("changes", "said"), CONFIGURATION_DAMAGES.values(), ids=CONFIGURATION_DAMAGES)
def test_a_configuration_that_is_not_one_of_dolly_is_refused(plain, changes, said):
    layouts.edit_json(plain / "config.json", **changes)
    layouts.refusal(plain, str(plain), "config.json", *said)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff{}", b"[" * 100_000], ids=range(5))
def test_broken_json_is_refused_by_the_name_of_its_file(plain, name, content):
    (plain / name).write_bytes(content)
    layouts.refusal(plain, str(plain / name))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(plain, name):
    (plain / name).unlink()
    layouts.refusal(plain, str(plain), name)


# Tokenizer


def _without_keys(directory):
    """What a base model has: neither tokenizer.json nor another file knows the keys."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in CONTROL_KEYS]
    path.write_text(json.dumps(content), encoding="utf-8")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        layouts.edit_json(directory / name, drop=("additional_special_tokens",))


def test_the_tokenizer_of_a_base_model_is_refused(plain):
    _without_keys(plain)
    layouts.refusal(plain, "tokenizer.json", repr(END_KEY), "must be a single token", "not the tokenizer of a dolly")


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("form", ["texts", "objects"])
def test_keys_that_only_a_side_file_names_get_the_ids_behind_the_vocabulary(plain, tokenizer, name, form):
    _without_keys(plain)
    keys = list(CONTROL_KEYS) if form == "texts" else [{"content": key, "special": True} for key in CONTROL_KEYS]
    layouts.edit_json(plain / name, additional_special_tokens=["<|other|>", 7, *keys])
    assert open_checkpoint(plain).tokenizer.control == tokenizer.control


def test_keys_without_room_in_the_network_are_refused(plain):
    _without_keys(plain)
    keys = [INSTRUCTION_KEY, RESPONSE_KEY, END_KEY]
    layouts.edit_json(plain / "special_tokens_map.json", additional_special_tokens=keys)
    layouts.edit_json(plain / "config.json", vocab_size=1021)
    layouts.refusal(plain, "config.json", "vocab_size is 1021", "1024 tokens")


def test_a_token_whose_id_the_network_lacks_is_refused(plain):
    path = plain / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    token = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][token] = 5000  # as many tokens as before, one of them out of reach
    path.write_text(json.dumps(content), encoding="utf-8")
    layouts.refusal(plain, "config.json", "vocab_size is 1024", "5000")


def test_a_key_typed_by_a_user_stays_text_in_every_layout(checkpoint_dir, tmp_path):
    visited = 0
    for keys in ("absent", "plain", "special"):
        tokenizer = open_checkpoint(layouts.copy_2023_layout(checkpoint_dir, tmp_path / keys, keys)).tokenizer
        for key in CONTROL_KEYS:
            assert not set(tokenizer.encode_text(f"a {key} b")) & tokenizer.special_ids
            visited += 1
    assert visited == 9


# What is wrong with it, and how to repair it


def test_a_file_instead_of_a_directory_is_refused(checkpoint_dir):
    file = checkpoint_dir / "config.json"
    with pytest.raises(CheckpointError, match=r"config\.json: is a file; give the directory"):
        locate(str(file))
    with pytest.raises(CheckpointError, match=r"config\.json: is a file; give the directory"):
        open_checkpoint(file)


def test_a_missing_directory_is_refused_with_the_command_that_fetches_it(tmp_path):
    missing = tmp_path / "models" / "owner--name" / "snapshots" / "v1.0"
    message = layouts.refusal(missing, f"{missing}: no such directory")
    assert message.endswith("modelscope download --model owner/name --revision v1.0")


def test_the_repair_command_names_model_and_revision_of_a_downloaded_snapshot(plain, tmp_path):
    snapshot = tmp_path / "hub cache" / "models" / "AI-ModelScope--dolly-v2-12b" / "snapshots" / "v1.0.2"
    shutil.copytree(plain, snapshot)
    (snapshot / "tokenizer.json").unlink()
    message = layouts.refusal(snapshot, str(snapshot / "tokenizer.json"))
    assert message.endswith("modelscope download --model AI-ModelScope/dolly-v2-12b --revision v1.0.2")


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [
        ("config.json", {"layer_norm_eps": 0.1}),
        ("tokenizer.json", {"normalizer": None}),
        ("special_tokens_map.json", {"additional_special_tokens": []}),
        ("tokenizer_config.json", {"additional_special_tokens": []}),
        ("*.index.json", {"metadata": {}}),
    ],
)
def test_a_change_that_is_still_valid_json_is_refused_by_the_manifest(checkpoint_dir, tmp_path, pattern, changes):
    directory = layouts.shard(checkpoint_dir, tmp_path / "shards")
    [file] = directory.glob(pattern)
    layouts.edit_json(file, **changes)
    layouts.refusal(directory, str(file), "bytes, expected")
    layouts.load(layouts.plain_hf(directory, tmp_path / "plain"))  # nothing but the manifest knew


def test_the_manifest_is_checked_unless_told_otherwise(checkpoint_dir, tmp_path):
    directory = shutil.copytree(checkpoint_dir, tmp_path / "copy")
    state = layouts.read_state(directory)
    (directory / manifest.NAME).rename(tmp_path / manifest.NAME)
    layouts.replace_state(directory, {name: tensor + 1 for name, tensor in state.items()})
    (tmp_path / manifest.NAME).rename(directory / manifest.NAME)
    layouts.refusal(directory, "model.safetensors", "sha256", "expected")
    assert open_checkpoint(directory, verify=False).parameters > 0


# Damage without a manifest


@pytest.mark.parametrize(("seed", "layout"), [(2025, "safetensors"), (2026, "2023")])
def test_100_damages_of_a_directory_without_manifest_give_a_dolly_error_or_an_answer(
    checkpoint_dir, tmp_path, seed, layout
):
    make = layouts.plain_hf if layout == "safetensors" else layouts.copy_2023_layout
    source = make(checkpoint_dir, tmp_path / "source")
    rng = random.Random(seed)
    outcomes = collections.Counter()
    for number in range(100):
        directory = shutil.copytree(source, tmp_path / str(number))
        harm = layouts.damage(directory, rng)
        try:
            model = DollyForTextGeneration(str(directory), device="cpu")
            answer = model.forward(QUESTION, do_sample=False, max_new_tokens=8)
        except DollyError as error:
            assert str(directory) in str(error), f"{harm}: {error}"
            outcomes["refused"] += 1
        else:
            assert set(answer) == {"text"}, harm
            outcomes["loaded"] += 1
        shutil.rmtree(directory)
    print(f"seed {seed}: {dict(outcomes)}")
    assert outcomes.total() == 100
    assert min(outcomes["refused"], outcomes["loaded"]) > 10


@pytest.mark.parametrize(("old", "value"), [("rotary_pct", 0.5), ("rotary_emb_base", 5000)])
def test_spellings_that_disagree_are_refused(plain, old, value):
    layouts.edit_json(plain / "config.json", **{old: value})
    layouts.refusal(plain, "config.json", f"{old} is {value}", "rope_parameters says")
