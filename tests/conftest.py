"""Tiny models and tokenizers that every test builds from nothing: no network, nothing downloaded."""

from __future__ import annotations

import os
from pathlib import Path

# A test that wants a public hub must fail, not reach it: the discard port of this machine answers nobody.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MODELSCOPE_ENDPOINT"] = os.environ["MODELSCOPE_DOMAIN"] = "http://127.0.0.1:9"

import pytest
import torch
import triton_interpreter  # noqa: F401  before the kernels, which look at what it sets
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from modelscope_dolly.engine import Engine
from modelscope_dolly.export import export_checkpoint
from modelscope_dolly.neox import NeoX
from modelscope_dolly.prompt import DollyTokenizer
from modelscope_dolly.quantize import PackedLinear, replace_linears
from train.nano import build_tokenizer, read_records

#: Material for tests and measurements that lies beside a developer's checkout, and on nobody else's machine.
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason=f"databricks-dolly-15k and the GPT-NeoX tokenizer are not in {SHARED_DATA}"
)


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


def our_network(model: GPTNeoXForCausalLM) -> NeoX:
    """The engine's network with the same weights."""
    with torch.device("meta"):
        net = NeoX(model.config)
    state = {name.replace("lm_head", "embed_out"): tensor for name, tensor in model.state_dict().items()}
    net.load_state_dict(state, assign=True, strict=True)
    return net.eval()


def quantised(net: NeoX, method: str) -> NeoX:
    """A quantised copy of a network."""
    with torch.device("meta"):
        copy = NeoX(net.config)
    replace_linears(copy, method)
    for name, tensor in net.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = copy.get_submodule(owner)
        if isinstance(module, PackedLinear):
            module.take(leaf, tensor)
        else:
            module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return copy.eval()


def our_engine(model: GPTNeoXForCausalLM) -> Engine:
    return Engine(our_network(model), torch.device("cpu"), model.config.max_position_embeddings)


@pytest.fixture(scope="session")
def records() -> list[dict]:
    """The 128 records of the nano recipe."""
    return read_records()


@pytest.fixture(scope="session")
def tokenizer(records) -> DollyTokenizer:
    """A byte-level BPE tokenizer of 1024 tokens with the three keys."""
    return build_tokenizer(records, vocabulary=1024)


@pytest.fixture(scope="session")
def oracle() -> GPTNeoXForCausalLM:
    return random_model()


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory, tokenizer) -> Path:
    """A complete exported directory with random weights and a manifest. Do not write into it: copy it."""
    target = tmp_path_factory.mktemp("checkpoint") / "dolly-tiny"
    return export_checkpoint(random_model(vocab_size=len(tokenizer.tokenizer)), tokenizer, target)


def pytest_terminal_summary(terminalreporter) -> None:
    """Tests that try many cases in one go say how many: `record_property("cases", (kind, count))`."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "when")]
    called = [report for report in reports if report.when == "call"]
    cases = [value for report in called for name, value in report.user_properties if name == "cases"]
    if cases:
        kinds = sorted({kind for kind, _ in cases})
        each = ", ".join(f"{kind} {sum(count for other, count in cases if other == kind)}" for kind in kinds)
        terminalreporter.write_line(f"injected faults: {sum(count for _, count in cases)} cases ({each})")
