"""Strange values for every option of pipelines, models and calls: an answer or a DollyError, and nothing else."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

from modelscope_dolly.errors import DollyError
from modelscope_dolly.generation import GenerationSettings
from modelscope_dolly.model import DollyForTextGeneration
from modelscope_dolly.pipeline import DollyTextGenerationPipeline, dolly_pipeline
from tests.fuzz.cases import run_cases
from tests.fuzz.directories import tiny_checkpoint
from tests.fuzz.strange import a_value

LOADING = ("device", "dtype", "torch_dtype", "device_map", "verify", "quantize", "threads", "draft", "adapter", "slots")
SETTINGS = tuple(GenerationSettings.__dataclass_fields__)
#: One that is meant.
GOOD = {
    "device": ("cpu", "gpu", None), "dtype": ("fp32", "bf16", None), "torch_dtype": (None, "float32"),
    "device_map": (None,), "verify": (True, False), "quantize": (None, "int8", "int8-dynamic", "int4"),
    "threads": (1, None),
    "draft": (None,), "adapter": (None,), "slots": (None, 3), "max_new_tokens": (1, 3),
    "do_sample": (True, False), "temperature": (0.5, 2), "top_k": (0, 5),
    "top_p": (0.5, 1.0), "repetition_penalty": (1.0, 1.3), "num_return_sequences": (1, 2), "seed": (None, 7),
    "stop": ((), "a", ["b"]), "return_full_text": (True, False), "on_overflow": ("error", "truncate_context"),
    "prompt_lookup": (True, False, "auto"), "logprobs": (None, 0, 5), "min_p": (0.0, 0.1),
    "presence_penalty": (0, 1.5), "frequency_penalty": (0, -0.5), "logit_bias": ({}, {5: -100, 7: 2.5}),
    "bad_words": ((), ["red", "dark red"]), "min_new_tokens": (0, 1),
    "choices": ((), ["yes", "no"]), "regex": (None, "[a-z]+"), "json_schema": (None, {}, {"type": "integer"}),
}  # fmt: skip


def main(seconds: float, seed: int) -> int:
    """Fuzz for so long; returns the number of cases. Raises AssertionError for a case that fails."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = tiny_checkpoint(Path(temporary))
        pipe = dolly_pipeline(str(directory), device="cpu", threads=1)

        def case(rng: random.Random) -> None:
            rng.choice((_load, _call, _call, _call, _call, _ask, _name))(rng, directory, pipe)

        here = os.getcwd()
        os.chdir(temporary)  # a path that means something only here
        try:
            return run_cases(seconds, seed, case)
        finally:
            os.chdir(here)


def _load(rng: random.Random, directory: Path, _: Any) -> None:
    kind = rng.choice((DollyForTextGeneration, DollyTextGenerationPipeline, dolly_pipeline))
    names = rng.sample(LOADING if kind is DollyForTextGeneration else LOADING + SETTINGS, rng.randrange(1, 4))
    options = _options(rng, names)
    _allowed(lambda: kind(str(directory), **{"device": "cpu", "threads": 1, **options}), options)


def _name(rng: random.Random, *_: Any) -> None:
    kind, value = rng.choice((DollyForTextGeneration, DollyTextGenerationPipeline, dolly_pipeline)), a_value(rng)
    more = {"model_revision": a_value(rng)} if kind is dolly_pipeline and rng.random() < 0.3 else {}
    _allowed(lambda: kind(value, **more), {"model": value, **more})


def _call(rng: random.Random, _: Path, pipe: DollyTextGenerationPipeline) -> None:
    options = _options(rng, rng.sample(SETTINGS, rng.randrange(1, 4)))
    options.setdefault("max_new_tokens", 2)
    # Many answers of any length are no mistake, only long.
    if not isinstance(options.get("num_return_sequences", ""), str) and type(options["num_return_sequences"]) is int:
        options["num_return_sequences"] = min(options["num_return_sequences"], 3)
    kind = rng.randrange(3)
    if kind == 0:
        _allowed(lambda: pipe("Name a colour.", batch_size=rng.choice((1, 8, None, a_value(rng))), **options), options)
    elif kind == 1:
        _allowed(lambda: list(pipe.stream_generate("Name a colour.", **options)), options)
    else:
        _allowed(lambda: pipe.model.forward("Name a colour.", **options), options)


def _ask(rng: random.Random, _: Path, pipe: DollyTextGenerationPipeline) -> None:
    value = a_value(rng)
    if rng.random() < 0.5:
        value = {"instruction": rng.choice(("Name a colour.", a_value(rng))), rng.choice(("context", 5)): a_value(rng)}
    _allowed(lambda: pipe(value, max_new_tokens=2), {"input": value})


def _options(rng: random.Random, names: list[str]) -> dict[str, Any]:
    return {name: rng.choice(GOOD[name]) if rng.random() < 0.4 else a_value(rng) for name in names}


def _allowed(step, given: dict) -> None:
    try:
        step()
    except DollyError as error:
        assert "\n" not in str(error), f"several lines for {list(given)}"
        assert len(str(error)) < 4000, f"{len(str(error))} characters for {list(given)}"
    except Exception as error:
        kinds = {name: type(value).__name__ for name, value in given.items()}
        raise AssertionError(f"{kinds} gave {type(error).__name__}: {error}") from error
