"""Tiny models and tokenizers that every test builds from nothing: no network, nothing downloaded."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# A test that wants a public hub must fail, not reach it: the discard port of this machine answers nobody.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nor does one write into the cache of whoever runs it.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="dolly-cache-")
os.environ["MODELSCOPE_ENDPOINT"] = os.environ["MODELSCOPE_DOMAIN"] = "http://127.0.0.1:9"

import pytest

from tests.support import triton_interpreter  # noqa: F401  before the kernels, which look at what it sets

# isort: split
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.prompt import DollyTokenizer
from tests.support.models import random_model
from train.nano import build_tokenizer, read_records

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


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
