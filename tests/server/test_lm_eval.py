"""lm_eval's client of completions gets the log-likelihoods that `dolly eval` computes."""

from __future__ import annotations

import pytest
from transformers import GPTNeoXForCausalLM

from modelscope_dolly.evaluation.shared_prefix import Scorer

DOCUMENTS = [
    ("The capital of France is", [" Paris", " London", " a city in Europe"]),
    ("Question: what is the colour of the sky?\nAnswer:", [" blue", " green, or red"]),
    ("Name", [" three colours", "less"]),
]


def test_log_likelihoods_are_those_of_our_scorer(server, checkpoint_dir):
    pytest.importorskip("tenacity", reason="needs lm_eval[api]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    client = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="dolly", tokenizer=str(checkpoint_dir), batch_size=2,
        tokenizer_backend="huggingface", max_length=2048,
    )  # fmt: skip
    pairs = [(context, choice) for context, choices in DOCUMENTS for choice in choices]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = client.loglikelihood(asked, disable_tqdm=True)
    model = GPTNeoXForCausalLM.from_pretrained(checkpoint_dir).eval()
    encoded = [client._encode_pair(*pair) for pair in pairs]
    [expected] = Scorer(model, 2048).score([encoded])
    for (value, greedy), (wanted, best) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4) and greedy == best
