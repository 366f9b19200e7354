"""`python -m tests.soak`: the nano model under load from several threads, and what the process holds meanwhile.

Prompts of 20 to 1,100 tokens and answers of 1 to 48, drawn by a seed, as a service sees them: never the same shape
twice. Ends with 1 where resident memory grows by a tenth or more after the first minute, or where one of the greedy
answers that are asked again and again is not what it was when it was asked alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests import conftest  # noqa: F401  no test reaches a public hub

#: Resident memory may grow by this share after WARM_UP seconds.
LARGEST_GROWTH = 0.10
WARM_UP = 60
#: --dtype -> dtype and quantize of load.
LOADED = {"bf16": ("bf16", None), "fp32": ("fp32", None), "int8": ("fp32", "int8")}
#: Questions whose greedy answers are compared with those given before the load begins.
REPEATED = ("Name three colours.", "Why is the sky blue?", "List the planets.")
_WORDS = ("the", "colour", "of", "a", "planet", "is", "what", "people", "say", "when", "they", "look", "at", "things")


#: Answers an instruction about a context: greedily, or with a seed; of at most so many tokens.
Ask = Callable[[str, str, int | None, int], str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=900, help="(default: 900)")
    parser.add_argument("--dtype", choices=tuple(LOADED), default="bf16", help="(default: bf16)")
    parser.add_argument("--threads", type=int, default=8, help="that ask (default: 8)")
    parser.add_argument("--server", action="store_true", help="ask a `dolly serve` of its own over HTTP")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths (default: 0)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = soak(Path(folder), options)
    print(json.dumps(figures))
    return 1 if figures["growth"] >= LARGEST_GROWTH or figures["changed_answers"] else 0


def write_nano(folder: Path, number_format: str) -> Path:
    """The untrained nano model, its weights stored in bfloat16 for "bf16"."""
    import torch

    from modelscope_dolly.checkpoint.writer import export_checkpoint
    from train.nano import build_model, build_tokenizer, read_records

    tokenizer = build_tokenizer(read_records())
    model = build_model(len(tokenizer.tokenizer)).to(torch.bfloat16 if number_format == "bf16" else torch.float32)
    return export_checkpoint(model, tokenizer, folder / "nano")


def load_nano(folder: Path, number_format: str):
    """The same, loaded to compute in this type."""
    from modelscope_dolly.load import load

    dtype, quantize = LOADED[number_format]
    return load(write_nano(folder, number_format), "cpu", dtype, quantize=quantize)


@contextlib.contextmanager
def in_this_process(folder: Path, number_format: str) -> Iterator[tuple[Ask, psutil.Process]]:
    """How to ask, and the process that answers."""
    from modelscope_dolly.generation import GenerationSettings, Prompt

    generator = load_nano(folder, number_format).text_generator

    def ask(instruction: str, context: str, seed: int | None, longest: int) -> str:
        settings = GenerationSettings(do_sample=seed is not None, max_new_tokens=longest, seed=seed)
        [[update]] = generator.generate([Prompt(instruction, context)], settings, 1)
        return update.text

    yield ask, psutil.Process()


@contextlib.contextmanager
def over_http(folder: Path, number_format: str) -> Iterator[tuple[Ask, psutil.Process]]:
    """The same of a `dolly serve`."""
    from tests.server.load_test import KEY, served

    dtype, quantize = LOADED[number_format]
    flags = ["--dtype", dtype, *(["--quantize", quantize] if quantize else [])]
    with served(write_nano(folder, number_format), folder / "log", *flags) as (port, process):

        def ask(instruction: str, context: str, seed: int | None, longest: int) -> str:
            messages = [{"role": "system", "content": context}] if context else []
            body = {"model": "dolly", "messages": [*messages, {"role": "user", "content": instruction}]}
            body |= {"max_tokens": longest, **({"temperature": 0} if seed is None else {"seed": seed})}
            headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), headers
            )
            with urllib.request.urlopen(request, timeout=300) as response:
                return json.load(response)["choices"][0]["message"]["content"]

        yield ask, process


def soak(folder: Path, options: argparse.Namespace) -> dict:
    """Ask from several threads for a while; resident megabytes of the first minute, at the end, at most."""
    with (over_http if options.server else in_this_process)(folder, options.dtype) as (ask, process):
        return load_test(ask, process, options)


def load_test(ask: Ask, process: psutil.Process, options: argparse.Namespace) -> dict:
    """As soak."""
    expected = {text: ask(text, "", None, 16) for text in REPEATED}
    end = threading.Event()
    counts = [0] * options.threads
    changed: list[str] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        draw = random.Random(f"{options.seed} {number}")
        try:
            while not end.is_set():
                if draw.random() < 0.1:
                    text = draw.choice(REPEATED)
                    if ask(text, "", None, 16) != expected[text]:
                        changed.append(text)
                else:
                    words = " ".join(draw.choices(_WORDS, k=int(2 ** draw.uniform(2, 9.5))))
                    ask("Go on.", words, draw.randrange(2**31), draw.randint(1, 48))
                counts[number] += 1
        except BaseException as error:
            errors.append(error)
            end.set()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(options.threads)]
    samples: list[tuple[float, float]] = []
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        while (now := time.monotonic() - begun) < options.seconds and not end.wait(1):
            samples.append((now, process.memory_info().rss / 1e6))
            if len(samples) % 30 == 0:
                print(f"{now:5.0f} s {samples[-1][1]:6.0f} MB {sum(counts)} answers", file=sys.stderr, flush=True)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return {
        "dtype": options.dtype, "server": options.server, "threads": options.threads,
        "seconds": round(samples[-1][0]), "answers": sum(counts), "changed_answers": len(changed), **growth(samples),
    }  # fmt: skip


def growth(samples: list[tuple[float, float]]) -> dict:
    """Of (seconds, megabytes): the largest of the first minute, the last, the largest of all, and how much it grew.

    Of the first minute the largest, since what a step takes and gives back belongs to the level it starts from.
    """
    warm = max(size for seconds, size in samples if seconds <= WARM_UP)
    most = max(size for _, size in samples)
    return {
        "first_minute_mb": round(warm), "last_mb": round(samples[-1][1]), "most_mb": round(most),
        "growth": round(most / warm - 1, 3),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
