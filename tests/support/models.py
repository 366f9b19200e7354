"""Tiny random networks: transformers' own as the oracle, and ours with the same weights."""

from __future__ import annotations

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from modelscope_dolly.engine.engine import Engine
from modelscope_dolly.engine.gpt_neox import GPTNeoX
from modelscope_dolly.engine.speculative.decoding import SpeculativeDecoding
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.kernels.quantized_linear import PackedLinear, replace_linears
from modelscope_dolly.load import cache_dtype

#: A shape for `dolly bench`.
TINY = "64x2x4"


def tiny_config(**changes) -> GPTNeoXConfig:
    """3 layers of width 64; initial weights large enough that logits differ clearly between tokens."""
    values = dict(
        vocab_size=1024,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXConfig(**{**values, **changes})


def random_model(seed: int = 0, **changes) -> GPTNeoXForCausalLM:
    """transformers' own network with random weights, in float32: the oracle."""
    torch.manual_seed(seed)
    return GPTNeoXForCausalLM(tiny_config(**changes)).eval()


def our_network(model: GPTNeoXForCausalLM) -> GPTNeoX:
    """The engine's network with the same weights."""
    with torch.device("meta"):
        net = GPTNeoX(model.config)
    state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in model.state_dict().items()}
    net.load_state_dict(state, assign=True, strict=True)
    return net.eval()


def quantised(net: GPTNeoX, method: str) -> GPTNeoX:
    """A quantised copy of a network."""
    with torch.device("meta"):
        copy = GPTNeoX(net.config)
    replace_linears(copy, method)
    copy.cache_dtype = cache_dtype(copy, method)
    for name, tensor in net.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = copy.get_submodule(owner)
        if isinstance(module, PackedLinear):
            module.take(leaf, tensor)
        else:
            module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return copy.eval()


def our_engine(model: GPTNeoXForCausalLM) -> Engine:
    window = model.config.max_position_embeddings
    return Engine(our_network(model), torch.device("cpu"), window, SpeculativeDecoding)


def logits(net: GPTNeoX, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Logits of the last token of each prompt, all in one pass."""
    step = StepInput.prefill([len(ids) for ids in prompts])
    return net(torch.cat(prompts), step, net.new_cache(len(prompts), 64))


def prompts(count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 1024, (5 + 9 * i,), generator=generator) for i in range(count)]
