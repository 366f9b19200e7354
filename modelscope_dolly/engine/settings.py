"""Settings of one answer and their defaults, those of the public dolly pipeline (training/generate.py). No torch here:
the command line prints the defaults in its help."""

from __future__ import annotations

from dataclasses import dataclass

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn. Names and meanings are those of transformers' GenerationConfig.

    Attributes:
        do_sample: False takes the likeliest token (greedy); then only repetition_penalty has an effect.
        temperature: logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        repetition_penalty: logits of tokens seen before, prompt included, are divided (positive) or multiplied
            (negative) by it (Keskar et al. 2019).
        seed: of this answer's own random numbers.
    """

    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.92
    repetition_penalty: float = 1.0
    seed: int = 0
