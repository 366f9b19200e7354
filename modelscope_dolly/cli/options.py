"""Options that several commands share, and what they mean: the model to load, the settings of an answer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelscope_dolly.engine.settings import MAX_NEW_TOKENS, Sampling
from modelscope_dolly.errors import SettingError

if TYPE_CHECKING:
    from modelscope_dolly.generation import GenerationSettings
    from modelscope_dolly.load import Dolly

MODEL_VARIABLE = "DOLLY_MODEL"
#: --verify -> load(verify=).
VERIFY = {"changed": True, "always": "always", "never": False}
#: Options that are keywords of GenerationSettings.
_SETTINGS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "min_p", "presence_penalty",
    "frequency_penalty", "bad_words", "min_new_tokens", "logprobs", "regex", "stop", "seed", "on_overflow",
)  # fmt: skip


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
    group.add_argument("--quantize", help="none, int8, int8-dynamic or int4: smaller, faster, less exact")
    group.add_argument("--threads", type=int, help="of the CPU (default: physical cores)")
    group.add_argument(
        "--verify", choices=tuple(VERIFY), default="changed",
        help="which files are compared with their recorded checksums: changed (since they were last compared; the "
        "default), always (all), never",
    )  # fmt: skip
    group.add_argument("--draft", metavar="MODEL", help="a smaller model with the same vocabulary, for draft tokens")
    group.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of this model, merged while it is loaded")


def add_slots(parser: argparse._ActionsContainer, default: str) -> None:
    parser.add_argument(
        "--slots", type=int, metavar="N", help=f"answers worked on at the same time (default: {default})"
    )


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--max-new-tokens", type=int, help=f"longest answer in tokens (default: {MAX_NEW_TOKENS})")
    add("--greedy", action="store_true", help="always take the likeliest token instead of sampling")
    add("--temperature", type=float, help=f"above 1 bolder, below 1 tamer (default: {Sampling.temperature:g})")
    add("--top-p", type=float, help=f"sample from the likeliest tokens of this total (default: {Sampling.top_p})")
    add("--top-k", type=int, help=f"sample from the k likeliest tokens (default: {Sampling.top_k}, all)")
    add("--repetition-penalty", type=float, help=f"above 1: repeat less (default: {Sampling.repetition_penalty:g})")
    add("--min-p", type=float, help="drop tokens less likely than this share of the likeliest one (default: 0)")
    add("--presence-penalty", type=float, help="above 0: fewer tokens that the answer has already (-2 to 2)")
    add("--frequency-penalty", type=float, help="the same, for each time that it has them (-2 to 2)")
    add("--bad-word", action="append", dest="bad_words", metavar="TEXT", help="never write this; repeatable")
    add("--min-new-tokens", type=int, help="shortest answer in tokens (default: 0)")
    add("--logprobs", type=int, metavar="N", help="with --json: how likely each token was, and the N likeliest")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    add("--choices", action="append", metavar="A,B,...", help="answer one of these, the likelier; repeatable: one each")
    add("--regex", metavar="PATTERN", help="the answer matches this regular expression")
    add("--json-schema", metavar="FILE", help="the answer is JSON that this schema allows")
    add("--seed", type=int, help="makes sampling repeatable (default: a new one each time)")
    add("--on-overflow", help="error or truncate_context, for a context that is too long")
    add("--prompt-lookup", choices=("on", "off", "auto"), help="draft tokens from the prompt, where answers copy it")
    add_json(group, " instead of the bare text")


def model_name(options: argparse.Namespace) -> str | None:
    """The model that the command line or the environment names."""
    return options.model or os.environ.get(MODEL_VARIABLE)


def required_model_name(options: argparse.Namespace) -> str:
    """As model_name. Raises SettingError where none is named."""
    if not (model := model_name(options)):
        raise SettingError(f"no model named: pass {options.model_argument}, or set {MODEL_VARIABLE}")
    return model


def load_keywords(options: argparse.Namespace) -> dict[str, Any]:
    """What the options of a command say to load.load."""
    names = ("device", "dtype", "quantize", "threads", "draft", "adapter", "slots")
    keywords = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return {**keywords, "verify": VERIFY[options.verify]}


def load_model(options: argparse.Namespace) -> tuple[Dolly, GenerationSettings]:
    """The model and the settings of its answers. Raises DollyError."""
    required_model_name(options)
    from modelscope_dolly.files import read_json
    from modelscope_dolly.generation import GenerationSettings

    if options.logprobs is not None and not options.json:
        raise SettingError("--logprobs are part of the JSON output; give --json, too")
    given = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    if options.prompt_lookup is not None:
        given["prompt_lookup"] = {"on": True, "off": False}.get(options.prompt_lookup, options.prompt_lookup)
    if options.choices is not None:
        several = len(options.choices) > 1  # one each, so that a choice may hold a comma
        given["choices"] = options.choices if several else options.choices[0].split(",")
    if options.json_schema is not None:
        given["json_schema"] = read_json(Path(options.json_schema))
    settings = GenerationSettings().updated({**given, "do_sample": not options.greedy})
    return load_dolly(options), settings


def load_dolly(options: argparse.Namespace) -> Dolly:
    """The model that add_model_options describe. Raises DollyError."""
    model = required_model_name(options)
    from modelscope_dolly.checkpoint.download import locate
    from modelscope_dolly.load import load

    return load(locate(model, options.revision), **load_keywords(options))
