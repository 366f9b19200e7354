"""Settings of one answer and their defaults, those of the public dolly pipeline (training/generate.py). No torch here:
the command line prints the defaults in its help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Names and meanings are those of transformers' GenerationConfig, or OpenAI's.

    Attributes:
        do_sample: False takes the likeliest token (greedy): temperature, top_k, top_p and min_p have no effect then.
        temperature: logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        repetition_penalty: logits of tokens seen before, prompt included, are divided (positive) or multiplied
            (negative) by it (Keskar et al. 2019).
        seed: of this answer's own random numbers.
        min_p: drop tokens that are less likely than this share of the likeliest one (Nguyen et al. 2024,
            arXiv:2407.01082).
        presence_penalty: subtracted from the logits of tokens that the answer has so far (OpenAI).
        frequency_penalty: the same, times the number of their occurrences (OpenAI).
        logit_bias: added to the logits of these token ids (OpenAI).
        bad_words: token ids of words that must not come; of several ids, the last one is ruled out behind the others.
        min_new_tokens: ids that end the answer are ruled out for so many tokens.
        logprobs: give the log-probability of each token, and of so many likeliest in its place; None: neither.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.92
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_new_tokens: int = 0
    logprobs: int | None = None
