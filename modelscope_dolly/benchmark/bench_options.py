"""Options of `dolly bench`. Nothing heavy is imported here: the command line reads it to print its help."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from dataclasses import dataclass, field

from modelscope_dolly.errors import SettingError, shown, unknown_name

PEERS = ("hf", "hf-compile", "ctranslate2", "llamacpp", "vllm")
FORMATS = ("none", "int8", "int8-dynamic", "int4")
#: Flags that choose another measurement than speed; one at a time.
MODES = ("mixed", "quality", "cold", "lookup", "draft", "callers", "serve")
#: How much larger the large channels are; those of real networks are 20 to 60 times the others.
_OUTLIERS = 30.0
#: Of anything that is counted on the command line.
_MOST = 1_000_000
#: peer=interpreter pairs, separated by commas, as with --peer-python.
PEER_VARIABLE = "DOLLY_PEER_PYTHON"


@dataclass(frozen=True)
class BenchSettings:
    """What to measure; the fields are those of the command's flags."""

    model: str | None = None
    revision: str | None = None
    shape: str | None = None
    device: str | None = None
    dtypes: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ("none",)
    batches: tuple[int, ...] = (1, 8)
    peers: tuple[str, ...] | None = None
    peer_python: dict[str, str] = field(default_factory=dict)
    gguf: str | None = None
    threads: int | None = None
    repeats: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 64
    mixed: int | None = None
    slots: int = 8
    quality: bool = False
    outliers: float | None = None
    cold: bool = False
    lookup: bool = False
    draft: str | None = None
    callers: tuple[int, ...] | None = None
    serve: tuple[int, ...] | None = None
    data: str | None = None
    tokenizer: str | None = None
    records: int | None = None
    keep: str | None = None
    seed: int = 0

    @property
    def mode(self) -> str:
        """One of MODES, or "speed"."""
        return next((name for name in MODES if getattr(self, name)), "speed")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="directory or hub id; without it, random weights of --shape")
    parser.add_argument("--revision", help="tag or branch of the hub id (default: master)")
    parser.add_argument("--shape", help="3b, 7b, 12b or HIDDENxLAYERSxHEADS (default: 3b)")
    what = parser.add_argument_group("what is measured (default: load, first token, prefill, decode)")
    what.add_argument("--mixed", type=int, metavar="N", help="N requests with answers of very different length")
    what.add_argument("--quality", action="store_true", help="what quantisation does to the model's predictions")
    what.add_argument(
        "--outliers", type=float, nargs="?", const=_OUTLIERS, metavar="F",
        help="with --quality: also for a copy with channels F times the others, as large networks have "
        f"(default: {_OUTLIERS:g})",
    )  # fmt: skip
    what.add_argument("--cold", action="store_true", help="from the start of a process to its first token, by phase")
    what.add_argument("--lookup", action="store_true", help="draft tokens from the prompt, on the records of --data")
    what.add_argument("--draft", metavar="SHAPE_OR_DIR", help="acceptance rate from which this draft model pays")
    what.add_argument(
        "--callers", nargs="?", const="1,8,16,32", metavar="N,N",
        help="threads with one question each, beside one list of as many; a stream's longest pause (1,8,16,32)",
    )  # fmt: skip
    what.add_argument(
        "--serve", nargs="?", const="1,8,32", metavar="N,N",
        help="dolly serve with N clients beside the engine itself, vLLM and llama-server (1,8,32)",
    )  # fmt: skip
    how = parser.add_argument_group("how")
    how.add_argument("--device", help="cpu or cuda:N (default: first GPU, else CPU)")
    how.add_argument(
        "--dtype", dest="dtypes", metavar="DTYPE",
        help="bf16, fp16, fp32, or several with commas (default: what suits the device)",
    )  # fmt: skip
    how.add_argument("--quantize", default="none", help="none, int8, int8-dynamic, int4, or several (default: none)")
    how.add_argument("--batch", dest="batches", metavar="BATCH", default="1,8", help="batch sizes (default: 1,8)")
    how.add_argument("--threads", type=int, help="CPU threads (default: the physical cores)")
    how.add_argument("--repeats", type=int, default=3, help="of each measurement, after a warm-up (default: 3)")
    how.add_argument("--prompt-tokens", type=int, default=128, help="length of each prompt (default: 128)")
    how.add_argument(
        "--new-tokens", type=int, help="length of each answer (default: 64); the longest, with --mixed (256)"
    )
    how.add_argument("--slots", type=int, default=8, help="sequences decoded at once, with --mixed (default: 8)")
    how.add_argument("--seed", type=int, default=0, help="of random weights, prompts and lengths (default: 0)")
    beside = parser.add_argument_group("beside what")
    beside.add_argument("--peers", help=f"{', '.join(PEERS)} or none (default: hf, and the others if installed)")
    beside.add_argument(
        "--peer-python", action="append", default=[], metavar="PEER=PYTHON",
        help=f"interpreter in which a peer is installed; for llamacpp, its llama-batched-bench (or ${PEER_VARIABLE})",
    )  # fmt: skip
    beside.add_argument("--gguf", metavar="FILE", help="the same weights for llamacpp, by its convert_hf_to_gguf.py")
    files = parser.add_argument_group("files")
    files.add_argument("--data", metavar="FILE", help="jsonl with instruction, context, response (--quality, --lookup)")
    files.add_argument("--records", type=int, help="how many of them, drawn by --seed (default: 32; 8 with --lookup)")
    files.add_argument("--tokenizer", metavar="DIR", help="tokenizer of a real dolly-v2 for random weights (--lookup)")
    files.add_argument("--keep", metavar="DIR", help="keep random weights and converted ones here, and reuse them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def settings_of(options: argparse.Namespace) -> BenchSettings:
    """Check the flags. Raises SettingError."""
    values = {name: getattr(options, name) for name in BenchSettings.__dataclass_fields__}
    if options.model and options.shape:
        raise SettingError(
            f"--shape {options.shape} and the model {options.model} exclude each other; give one of them"
        )
    modes = [name for name in MODES if values[name] not in (None, False)]
    if len(modes) > 1:
        raise SettingError(f"--{modes[0]} and --{modes[1]} are measurements of their own; give one of them")
    if options.quality and not options.model:
        raise SettingError("--quality needs a model: random weights have no quality to lose")
    if options.outliers is not None and not options.quality:
        raise SettingError("--outliers belongs to --quality, which measures what they do")
    if options.outliers is not None and not 1 < options.outliers <= 1000:
        raise SettingError(f"--outliers is {shown(options.outliers)}, it must be above 1, and at most 1000")
    if options.lookup and not options.data:
        raise SettingError("--lookup needs --data FILE: how many draft tokens are accepted depends on the text")
    values["quantize"] = _names("quantize", options.quantize, FORMATS)
    if options.quality and values["quantize"] == ("none",):
        values["quantize"] = ("int8",)
    if options.peers is not None:
        values["peers"] = tuple(name for name in _names("peer", options.peers, (*PEERS, "none")) if name != "none")
    for name in ("threads", "repeats", "prompt_tokens", "mixed", "slots", "records"):
        if values[name] is not None and not 1 <= values[name] <= _MOST:
            found = f"--{name.replace('_', '-')} is {shown(values[name])}"
            raise SettingError(f"{found}, it must be at least 1, and at most {_MOST:,}")
    if not 0 <= options.seed < 2**32:
        raise SettingError(f"--seed is {shown(options.seed)}, it must be from 0 to {2**32 - 1}")
    if options.new_tokens is None:
        values["new_tokens"] = 256 if options.mixed else 64
    if values["new_tokens"] < 2:
        raise SettingError(
            f"--new-tokens is {values['new_tokens']}, it must be at least 2: the first one is the prompt's"
        )
    if (longest := options.prompt_tokens + values["new_tokens"]) > 2048:
        raise SettingError(f"--prompt-tokens and --new-tokens together are {shown(longest)}, over 2048")
    for name in ("gguf", "data", "tokenizer"):
        if values[name] is not None and not os.path.exists(values[name]):
            raise SettingError(f"--{name} {values[name]}: no such file")
    if options.keep is not None and os.path.lexists(options.keep) and not os.path.isdir(options.keep):
        raise SettingError(f"--keep {options.keep}: not a directory")
    values |= {"shape": None if options.model else options.shape or "3b", "batches": _sizes("batch", options.batches)}
    for name in ("callers", "serve"):
        values[name] = _sizes(name, values[name]) if values[name] is not None else None
    values |= {"dtypes": tuple(options.dtypes.split(",")) if options.dtypes else ()}
    return BenchSettings(**{**values, "peer_python": _interpreters(options.peer_python)})


def _names(kind: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in allowed:
            raise SettingError(unknown_name(kind, name, allowed))
    return names


def _sizes(name: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not re.fullmatch("[0-9]{1,4}", part) or not 1 <= int(part) <= 1024]
    if wrong:
        raise SettingError(f"--{name} {text!r}: {wrong[0]!r} is not a whole number from 1 to 1024")
    return tuple(dict.fromkeys(map(int, parts)))


def _interpreters(pairs: list[str]) -> dict[str, str]:
    """Peer -> interpreter; flags win over the environment."""
    programs = {peer: sys.executable for peer in PEERS if peer != "llamacpp"}
    for pair in [*filter(None, os.environ.get(PEER_VARIABLE, "").split(",")), *pairs]:
        peer, sign, program = pair.partition("=")
        if not sign:
            raise SettingError(
                f"--peer-python {pair!r}: expected PEER=PYTHON, for example ctranslate2=/venv/bin/python"
            )
        if peer not in PEERS:
            raise SettingError(unknown_name("peer", peer, PEERS))
        if (path := shutil.which(program)) is None:
            raise SettingError(f"--peer-python {pair}: {program} is not a program that can be run")
        programs[peer] = path
    return programs
