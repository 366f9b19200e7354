"""What guessing from the prompt gains on real text, at the cost of the measured model's real passes.

How often a guess is right depends on the text, and random weights write none. So the network computes every pass in
full and then says what a person answered: the records' own responses are its script. Time is thus that of the real
shape, and the guesses that are right are those that the responses copy from their contexts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modelscope_dolly.benchmark import peers
from modelscope_dolly.errors import SettingError
from modelscope_dolly.files import read_json_lines

if TYPE_CHECKING:
    from modelscope_dolly.benchmark.process import Bench
    from modelscope_dolly.engine.cuda_graphs import Forward
    from modelscope_dolly.engine.engine import Engine
    from modelscope_dolly.engine.gpt_neox import KVCache, NeoX, Step
    from modelscope_dolly.prompt import DollyTokenizer

#: Kinds of text: with a context to copy from, and without one.
KINDS = ("context", "free")
#: Longer prompts are left out: their reading would take most of the time of the measurement.
_LONGEST_PROMPT = 512
_LEAST_ANSWER = 16
_RECORDS = 8


class Scripted:
    """A network that computes as ever and answers from a script; where that has ended it says token 1.

    The script lies at one place on the device, so that recorded steps follow it too (see decode.py).

    Args:
        net: computes.
        device: of the network.
        window: most tokens of a script.
    """

    def __init__(self, net: NeoX, device: torch.device, window: int):
        self.net = net
        self._script = torch.ones(window + 1, dtype=torch.int64, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.net, name)

    def follow(self, script: list[int]) -> None:
        """Say these ids of a prompt and its answer."""
        self._script.fill_(1)
        self._script[: len(script)] = torch.tensor(script, device=self._script.device)

    def __call__(self, tokens: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """Logits as NeoX gives them, of one slot: the token that the script has behind each wanted place wins."""
        logits = self.net(tokens, step, cache)
        wanted = step.wanted()
        positions = step.positions if wanted is None else step.positions[wanted]
        return self._say(logits, positions.to(logits.device))

    def recorded(self, forward: Forward) -> Forward:
        """The same for a forward of decode.py."""
        return lambda tokens, positions, cache: self._say(forward(tokens, positions, cache), positions)

    def _say(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        said = self._script[positions + 1]
        return logits.clamp_(-1.0, 1.0).scatter_(1, said[:, None], 9.0)


def read_texts(file: str) -> list[dict]:
    """Records with instruction, response and perhaps context. Raises SettingError with the line."""

    def wrong(record: dict) -> str | None:
        texts = all(isinstance(record.get(name), str) for name in ("instruction", "response"))
        return None if texts else "needs the texts instruction and response"

    texts = read_json_lines(Path(file), wrong)
    if not texts:
        raise SettingError(f"{file}: holds no records")
    return texts


def encoded(
    tokenizer: DollyTokenizer, texts: list[dict], seed: int | None, longest: int
) -> Iterator[tuple[dict, list[int], int]]:
    """(record, ids, length of the prompt) of those whose prompt has at most `longest` tokens, drawn by `seed`."""
    texts = list(texts)
    if seed is not None:
        random.Random(seed).shuffle(texts)
    for record in texts:
        ids, begin = tokenizer.encode_example(record["instruction"], record.get("context"), record["response"])
        if begin <= longest:
            yield record, ids, begin


def choose(
    tokenizer: DollyTokenizer, texts: list[dict], count: int, longest: int, seed: int
) -> dict[str, list[tuple[list[int], int]]]:
    """For each kind at most `count` examples (ids, length of the prompt), answers cut to `longest` tokens."""
    chosen: dict[str, list[tuple[list[int], int]]] = {kind: [] for kind in KINDS}
    for record, ids, begin in encoded(tokenizer, texts, seed, _LONGEST_PROMPT):
        examples = chosen["context" if record.get("context") else "free"]
        if len(examples) < count and len(ids) - begin >= _LEAST_ANSWER:
            examples.append((ids[: begin + longest], begin))
    return chosen


def measure(run: Bench) -> None:
    """`lookup`: a row for each format and kind of text, seconds behind the first token without and with guessing."""
    from modelscope_dolly.checkpoint.tokenizer import read_tokenizer

    settings = run.settings
    if settings.model is None and settings.tokenizer is None:
        raise SettingError(
            "--lookup with random weights needs --tokenizer DIR, that of a dolly-v2: they know bytes only"
        )
    tokenizer = read_tokenizer(Path(settings.tokenizer or run.model), add_keys=True)
    chosen = choose(
        tokenizer, read_texts(settings.data), settings.records or _RECORDS, settings.new_tokens, settings.seed
    )
    run.expect(f"{name}, {kind} text" for name, _ in run.formats() for kind in KINDS if chosen[kind])
    rows: list[dict] = []
    run.found["lookup"] = {"rows": rows}
    for number_format, dtype in run.formats():
        before = list(rows)

        def keep(result: dict, before: list[dict] = before, number_format: str = number_format) -> None:
            rows[:] = [*before, *(_row(number_format, kind, one, result) for kind, one in result["kinds"].items())]
            run.has(f"{number_format}, {kind} text" for kind in result["kinds"])

        keep(run.child(run.job("dolly", number_format, dtype=dtype, lookup=chosen), partial=keep))


def _row(number_format: str, kind: str, one: dict, result: dict) -> dict:
    from modelscope_dolly.benchmark.limits import disturbances, spread

    plain, guessing = spread(one["plain_s"]), spread(one["guessing_s"])
    return {
        "format": number_format, "kind": kind, **one, "plain_s": plain, "guessing_s": guessing,
        "times_plain": plain["median"] / guessing["median"],
        "disturbed": disturbances({"plain": plain, "guessing": guessing}, result),
    }  # fmt: skip


def run_lookup(engine: Engine, job: dict) -> dict:
    """In the child: every example without and with guessing in turn, one at a time."""
    net = Scripted(engine.net, engine.device, engine.window)
    engine.net = net
    if engine.decoder is not None:
        engine.decoder.net = net
        engine.decoder.forwards = [(name, net.recorded(forward)) for name, forward in engine.decoder.forwards]
    kinds: dict[str, dict] = {}
    for kind, examples in job["lookup"].items():
        if not examples:
            continue
        for guessing in (False, True):
            _answer(engine, net, examples[0], guessing)  # warm-up; the engine also learns what passes cost
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(job["repeats"]):
            peers.say(f"{kind} text: {number + 1} of {job['repeats']}")
            stats = {guessing: [_answer(engine, net, one, guessing) for one in examples] for guessing in times}
            for guessing, found in stats.items():
                times[guessing].append(sum(seconds for seconds, _ in found))
        guessed = sum(one.guessed for _, one in stats[True])
        accepted = sum(one.accepted for _, one in stats[True])
        tokens = sum(one.decode_tokens for _, one in stats[True])
        kinds[kind] = {
            "answers": len(examples), "tokens": tokens, "plain_s": times[False], "guessing_s": times[True],
            "guessed": guessed, "accepted": accepted, "accepted_share": accepted / guessed if guessed else None,
            "passes_per_token": sum(one.decode_steps for _, one in stats[True]) / max(1, tokens),
        }  # fmt: skip
        peers.tell({"kinds": kinds})
    return {"kinds": kinds}


def _answer(engine: Engine, net: Scripted, example: tuple[list[int], int], guessing: bool) -> tuple[float, Any]:
    """Seconds from the first token of the scripted answer to its last, and what the run did."""
    from modelscope_dolly.engine.engine import Request, RunStats
    from modelscope_dolly.engine.sampling import Sampling
    from modelscope_dolly.engine.speculative.prompt_lookup import PromptLookup

    ids, begin = example
    net.follow(ids)
    stats, moments, made = RunStats(), [], []
    request = Request(
        ids[:begin], len(ids) - begin, Sampling(do_sample=False), guesser=PromptLookup if guessing else None
    )
    for token in engine.run([request], 1, stats):
        moments.append(time.perf_counter())
        made.append(token.id)
    assert made == ids[begin:], "the script was not followed"
    return moments[-1] - moments[0], stats
