"""`dolly score`: how likely a model finds given answers, without generating any."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from modelscope_dolly.cli.options import add_model_options, load_keywords, required_model_name
from modelscope_dolly.errors import PromptError, SettingError
from modelscope_dolly.files import new_file, read_json_lines

SUMMARY = "perplexity of given answers, one record a line"
#: Answers that are scored together.
_SLOTS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", metavar="IN.jsonl", help="records with instruction, response, perhaps context")
    parser.add_argument("scores", metavar="OUT.jsonl", nargs="?", help="a new file (default: standard output)")
    parser.add_argument(
        "--end", action="store_true", help="score the end of each answer, too: the loss of the training is their mean"
    )
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    model, records = required_model_name(options), Path(options.records)
    target = Path(options.scores) if options.scores is not None else None
    if target is not None and target.exists():
        raise SettingError(f"{target}: exists already; give another name")
    rows = read_json_lines(records, _problem)
    if not rows:
        raise SettingError(f"{records}: no record to score")
    from modelscope_dolly.checkpoint.download import locate
    from modelscope_dolly.load import load

    generator = load(locate(model, options.revision), **load_keywords(options)).text_generator
    from modelscope_dolly.generation import parse_input, perplexity

    texts = []
    for number, row in enumerate(rows, start=1):
        prompt = parse_input(row, ignore_unknown=True)
        texts.append(generator.encode_answer(prompt, row["response"], options.end))
        if len(texts[-1][0]) > generator.engine.window:
            raise PromptError(
                f"{records}: record {number} has {len(texts[-1][0])} tokens, the window {generator.engine.window}"
            )
    total = tokens = 0

    def scored() -> Iterator[str]:
        nonlocal total, tokens
        waiting = iter(texts)
        number = 0
        while some := list(islice(waiting, 4 * _SLOTS)):
            for score in generator.scores(some, slots=_SLOTS):
                number, logprob = number + 1, sum(one.logprob for one in score)
                total, tokens = total + logprob, tokens + len(score)
                row = {"record": number, "tokens": len(score), "logprob": logprob}
                yield json.dumps({**row, "perplexity": perplexity(logprob, len(score))}) + "\n"

    if target is None:
        for line in scored():
            print(line, end="", flush=True)
    else:
        with new_file(target) as path, open(path, "w", encoding="utf-8") as file:
            file.writelines(scored())
    print(f"{len(texts)} answers, {tokens} tokens, perplexity {perplexity(total, tokens):.4f}", file=sys.stderr)
    return 0


def _problem(row: dict) -> str | None:
    """What is wrong with a record."""
    from modelscope_dolly.generation import parse_input

    if not isinstance(row.get("response"), str) or not row["response"]:
        return "response must be a text that is not empty"
    try:
        parse_input(row, ignore_unknown=True)
        row["response"].encode("utf-8")
    except (PromptError, UnicodeEncodeError) as error:
        return str(error)
    return None
