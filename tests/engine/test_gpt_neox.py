"""The forward pass against transformers' GPTNeoXForCausalLM with the same random weights."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.engine.gpt_neox import GPTNeoX, parameter_shapes
from modelscope_dolly.engine.kv_cache import KVCache
from modelscope_dolly.engine.rotary import Rotary
from modelscope_dolly.engine.step_input import Span, StepInput
from modelscope_dolly.errors import CheckpointError
from tests.support.models import our_network, random_model, tiny_config

VARIANTS = {
    "dolly": {},
    "sequential residual": {"use_parallel_residual": False},
    "no attention bias": {"attention_bias": False},
    "rotary half": {"rotary_pct": 0.5},
    "rotary all": {"rotary_pct": 1.0},
    "rotary base": {"rotary_emb_base": 500.0},
    "new rope spelling": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5}
    },
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "tied embeddings": {"tie_word_embeddings": True},
    "other epsilon": {"layer_norm_eps": 0.1},
    "one head": {"num_attention_heads": 1},
}


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 1024, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def our_logits(net: GPTNeoX, sequences: list[torch.Tensor], prompts: list[int], slots: int) -> list[torch.Tensor]:
    """Logits from each prompt's last token on: all prompts in one prefill, then a token of each per decode step."""
    cache = KVCache(slots, 64)
    tokens = torch.cat([ids[:size] for ids, size in zip(sequences, prompts, strict=True)])
    rows = [net(tokens, StepInput.prefill(prompts), cache)]
    for made in range(len(sequences[0]) - prompts[0]):
        tokens = torch.stack([ids[size + made] for ids, size in zip(sequences, prompts, strict=True)])
        rows.append(net(tokens, StepInput.decode([size + made for size in prompts]), cache))
    return list(torch.stack(rows, dim=1))


@torch.inference_mode()
def their_logits(model: GPTNeoXForCausalLM, sequences: list[torch.Tensor], prompts: list[int]) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0, size - 1 :] for ids, size in zip(sequences, prompts, strict=True)]


def assert_same_logits(model: GPTNeoXForCausalLM, net: GPTNeoX, prompts: list[int], steps: int, slots: int) -> None:
    sequences = [random_ids(size + steps, seed) for seed, size in enumerate(prompts)]
    found = our_logits(net, sequences, prompts, slots)
    for mine, wanted in zip(found, their_logits(model, sequences, prompts), strict=True):
        assert mine.shape == wanted.shape == (steps + 1, 1024)
        assert wanted.std() > 0.1  # logits that say something
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_prefill_and_every_decode_step_give_the_logits_of_transformers(changes):
    model = random_model(**changes)
    with torch.no_grad():  # fresh biases and norms are 0 and 1, which would hide a missing one
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    assert_same_logits(model, our_network(model), prompts=[17, 1, 40], steps=12, slots=3)


def test_slots_beyond_those_in_use_change_nothing(oracle):
    assert_same_logits(oracle, our_network(oracle), prompts=[9, 2], steps=5, slots=6)


def test_a_slot_keeps_its_sequence_when_it_is_moved(oracle):
    net, ids = our_network(oracle), random_ids(21)
    cache = KVCache(3, 64)
    with torch.inference_mode():
        others = random_ids(60, seed=1)  # the target slot holds something longer before
        spans = (Span(0, 0, 60), Span(2, 60, 80))
        tokens = torch.cat((others, ids[:20]))
        positions = torch.cat((torch.arange(60), torch.arange(20)))
        net(tokens, StepInput(positions, spans=spans), cache)
    cache.move(2, 0)
    with torch.inference_mode():
        found = net(ids[20:], StepInput.decode([20]), cache)
    torch.testing.assert_close(found, their_logits(oracle, [ids], [21])[0], atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def test_several_new_tokens_of_some_slots_give_the_logits_of_transformers(oracle):
    """Spans of unequal size, slots left out, one after the other, also over entries of an earlier, longer draft."""
    net, cache = our_network(oracle), KVCache(4, 64)
    sequences = [random_ids(40, seed) for seed in range(4)]
    starts = [9, 1, 14, 5]
    tokens = torch.cat([ids[:size] for ids, size in zip(sequences, starts, strict=True)])
    net(tokens, StepInput.prefill(starts), cache)
    wrong = StepInput.verify([(slot, start, 20) for slot, start in enumerate(starts)])
    net(random_ids(80, seed=9), wrong, cache)
    expected = [oracle(ids[None]).logits[0] for ids in sequences]
    for counts in ([1, 4, 2, 1], [3, 3, 3, 3], [1, 1, 1, 1], [0, 5, 0, 2], [2, 0, 0, 0], [0, 0, 0, 1]):
        blocks = [(slot, starts[slot], count) for slot, count in enumerate(counts) if count]
        tokens = torch.cat([sequences[slot][start : start + count] for slot, start, count in blocks])
        wanted = [expected[slot][start : start + count] for slot, start, count in blocks]
        found = net(tokens, StepInput.verify(blocks), cache)
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-5)
        last = net(tokens, StepInput.verify(blocks, last_only=True), cache)
        torch.testing.assert_close(last, torch.stack([rows[-1] for rows in wanted]), atol=1e-4, rtol=1e-5)
        for slot, count in enumerate(counts):
            starts[slot] += count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_that_of_transformers(dtype):
    ids, exact_model = [random_ids(48)], random_model()
    exact = their_logits(exact_model, ids, [30])[0]
    theirs = their_logits(random_model().to(dtype), ids, [30])[0].float()
    mine = our_logits(our_network(exact_model).to(dtype), ids, [30], slots=1)[0]
    assert mine.dtype == dtype
    their_error, my_error = ((found - exact).square().mean().sqrt() for found in (theirs, mine.float()))
    assert 0 < my_error < 1.5 * their_error < 0.2 * exact.std()


@pytest.mark.parametrize("changes", [{"vocab_size": 100}, {"attention_bias": False}, {"tie_word_embeddings": True}])
def test_parameter_shapes_are_those_of_a_checkpoint_that_transformers_writes(tmp_path, changes):
    model = random_model(**changes)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert parameter_shapes(model.config) == saved


def test_parameter_shapes_allocate_nothing_and_match_a_real_size():
    config = tiny_config(
        vocab_size=50280, hidden_size=5120, num_hidden_layers=36, num_attention_heads=40, intermediate_size=20480
    )
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(config)
    names = {name.replace("lm_head", "embed_out"): tuple(t.shape) for name, t in model.named_parameters()}
    assert parameter_shapes(config) == names


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    ],
)
def test_other_rope_types_are_refused(changes):
    config = tiny_config(**changes)
    for build in (Rotary, GPTNeoX, parameter_shapes):
        with pytest.raises(CheckpointError, match=r"rope type '(linear|dynamic|yarn)' is not supported"):
            build(config)
