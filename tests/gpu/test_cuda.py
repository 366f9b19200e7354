"""What only a CUDA device can show. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from modelscope_dolly.errors import HardwareError
from modelscope_dolly.generation import GenerationSettings, Prompt
from modelscope_dolly.hardware import choose_device, choose_dtype, free_memory
from modelscope_dolly.load import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

PROMPTS = [Prompt("Name a colour."), Prompt("Who wrote it?", "Pepys wrote the diary. " * 40), Prompt("Why?")]


def texts(dolly, slots: int, **keywords) -> list[str]:
    settings = GenerationSettings().updated({"max_new_tokens": 40, **keywords})
    return [updates[0].text for updates in dolly.text_generator.generate(PROMPTS, settings, slots)]


def test_greedy_in_float32_is_what_transformers_generates_on_the_same_device(checkpoint_dir, tokenizer):
    dolly = load(checkpoint_dir, "cuda:0", "fp32")
    oracle = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32).to("cuda:0")
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt.instruction, prompt.context)
        given = torch.tensor([ids], device="cuda:0")
        made = oracle.generate(given, do_sample=False, max_new_tokens=40, eos_token_id=list(tokenizer.control.stop))
        answer = [i for i in made[0, len(ids) :].tolist() if i not in tokenizer.control.stop]
        expected.append(tokenizer.decode(answer).strip())
    assert texts(dolly, 1, do_sample=False) == expected
    assert texts(dolly, 3, do_sample=False) == expected


def test_batch_equals_one_by_one_under_a_seed(checkpoint_dir):
    dolly = load(checkpoint_dir, "cuda:0", "fp32")
    assert texts(dolly, 3, seed=3) == texts(dolly, 1, seed=3)


def test_default_type_is_computed_by_the_card_and_weights_lie_on_it(checkpoint_dir):
    device = choose_device("gpu").value
    dolly = load(checkpoint_dir)
    assert dolly.dtype == choose_dtype(device).value in (torch.bfloat16, torch.float16)
    assert {parameter.device for parameter in dolly.net.parameters()} == {device}
    assert all(texts(dolly, 2, do_sample=False))


def test_device_map_auto_answers_like_one_device(checkpoint_dir):
    spread = load(checkpoint_dir, dtype="fp32", device_map="auto")
    assert texts(spread, 2, do_sample=False) == texts(load(checkpoint_dir, "cuda:0", "fp32"), 2, do_sample=False)


def test_layers_on_the_host_answer_like_one_device(checkpoint_dir):
    placement = {"gpt_neox.embed_in": 0, "gpt_neox.layers.0": 0, "gpt_neox.layers.1": "cpu", "gpt_neox.layers.2": 0,
                 "gpt_neox.final_layer_norm": 0, "embed_out": 0}  # fmt: skip
    spread = load(checkpoint_dir, dtype="fp32", device_map=placement)
    assert texts(spread, 2, do_sample=False) == texts(load(checkpoint_dir, "cuda:0", "fp32"), 2, do_sample=False)


def test_device_that_is_not_there_is_refused():
    with pytest.raises(HardwareError, match="was asked for, but this machine shows"):
        choose_device(f"cuda:{torch.cuda.device_count()}")


def test_memory_comes_back_when_a_model_goes(checkpoint_dir):
    before = free_memory(torch.device("cuda", 0))
    for _ in range(3):
        dolly = load(checkpoint_dir, "cuda:0")
        texts(dolly, 3, do_sample=False)
        del dolly
        torch.cuda.empty_cache()
    assert before - free_memory(torch.device("cuda", 0)) < 200e6
