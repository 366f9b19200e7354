"""Options that several commands share, and what they mean: the model to load, the settings of an answer."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from modelscope_dolly.engine.settings import MAX_NEW_TOKENS, Sampling
from modelscope_dolly.errors import SettingError

if TYPE_CHECKING:
    from modelscope_dolly.generation import GenerationSettings
    from modelscope_dolly.load import Dolly

MODEL_VARIABLE = "DOLLY_MODEL"


def add_revision(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--revision", help="tag or branch of the hub id (default: master)")


def add_json(parser: argparse._ActionsContainer, note: str = "") -> None:
    parser.add_argument("--json", action="store_true", help=f"print one JSON object{note}")


def add_model_options(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """The options of load_dolly. `positional`: the model is an argument of the command and not --model."""
    group = parser.add_argument_group("model")
    described = f"directory or hub id (default: ${MODEL_VARIABLE})"
    group.add_argument("model" if positional else "--model", help=described, **({"nargs": "?"} if positional else {}))
    parser.set_defaults(model_argument="DIRECTORY_OR_HUB_ID" if positional else "--model DIRECTORY_OR_HUB_ID")
    add_revision(group)
    group.add_argument("--device", help="cpu, cuda:N or gpu (default: first GPU, else CPU)")
    group.add_argument("--dtype", help="bf16, fp16 or fp32 (default: what suits the device)")
    group.add_argument("--quantize", help="none, int8 or int4: smaller and faster on a CPU, less exact (default: none)")
    group.add_argument("--threads", type=int, help="of the CPU (default: physical cores)")
    group.add_argument("--draft", metavar="MODEL", help="a smaller model with the same vocabulary, for draft tokens")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--max-new-tokens", type=int, help=f"longest answer in tokens (default: {MAX_NEW_TOKENS})")
    add("--greedy", action="store_true", help="always take the likeliest token instead of sampling")
    add("--temperature", type=float, help=f"above 1 bolder, below 1 tamer (default: {Sampling.temperature:g})")
    add("--top-p", type=float, help=f"sample from the likeliest tokens of this total (default: {Sampling.top_p})")
    add("--top-k", type=int, help=f"sample from the k likeliest tokens (default: {Sampling.top_k}, all)")
    add("--repetition-penalty", type=float, help=f"above 1: repeat less (default: {Sampling.repetition_penalty:g})")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    add("--seed", type=int, help="makes sampling repeatable (default: a new one each time)")
    add("--on-overflow", help="error or truncate_context, for a context that is too long")
    add("--prompt-lookup", choices=("on", "off", "auto"), help="draft tokens from the prompt, where answers copy it")
    add_json(group, " instead of the bare text")


def model_name(options: argparse.Namespace) -> str | None:
    """The model that the command line or the environment names."""
    return options.model or os.environ.get(MODEL_VARIABLE)


def load_model(options: argparse.Namespace) -> tuple[Dolly, GenerationSettings]:
    """The model and the settings of its answers. Raises DollyError."""
    _named_model(options)
    from modelscope_dolly.generation import GenerationSettings

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed", "on_overflow")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.prompt_lookup is not None:
        given["prompt_lookup"] = {"on": True, "off": False}.get(options.prompt_lookup, options.prompt_lookup)
    settings = GenerationSettings().updated({**given, "do_sample": not options.greedy})
    return load_dolly(options), settings


def load_dolly(options: argparse.Namespace) -> Dolly:
    """The model that add_model_options describe. Raises DollyError."""
    model = _named_model(options)
    from modelscope_dolly.checkpoint.download import locate
    from modelscope_dolly.load import load

    keywords = {name: getattr(options, name) for name in ("device", "dtype", "quantize", "threads", "draft")}
    return load(locate(model, options.revision), **keywords)


def _named_model(options: argparse.Namespace) -> str:
    model = model_name(options)
    if not model:
        raise SettingError(f"no model named: pass {options.model_argument}, or set {MODEL_VARIABLE}")
    return model
