"""What guessing from the prompt gains on real text, at the cost of the measured model's real passes.

How often a guess is right depends on the text, and random weights write none. So the network computes every pass in
full and then says what a person answered: the records' own responses are its script. Time is thus that of the real
shape, and the guesses that are right are those that the responses copy from their contexts.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from . import peers

if TYPE_CHECKING:
    import torch

    from ..engine import Engine
    from ..neox import KVCache, NeoX, Step
    from ..prompt import DollyTokenizer
    from .process import Bench

#: Kinds of text: with a context to copy from, and without one.
KINDS = ("context", "free")
#: Longer prompts are left out: their reading would take most of the time of the measurement.
_LONGEST_PROMPT = 512
_LEAST_ANSWER = 16
_RECORDS = 8


class Scripted:
    """A network that computes as ever and answers from a script.

    Args:
        net: computes.
        script: ids of prompt and answer; behind them it says token 1.
    """

    def __init__(self, net: NeoX, script: list[int]):
        self.net, self.config, self.script = net, net.config, script

    def __call__(self, tokens: torch.Tensor, step: Step, cache: KVCache) -> torch.Tensor:
        """Logits as NeoX gives them, of one slot: the token that the script has behind each wanted place wins."""
        logits = self.net(tokens, step, cache)
        wanted = step.wanted()
        positions = step.positions.tolist()
        positions = positions if wanted is None else [positions[place] for place in wanted]
        logits.clamp_(-1.0, 1.0)
        for row, position in enumerate(positions):
            logits[row, self.script[position + 1] if position + 1 < len(self.script) else 1] = 9.0
        return logits


def read_texts(file: str) -> list[dict]:
    """Records with instruction, response and perhaps context. Raises SettingError with the line."""
    texts = []
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")  # a text may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"--data {file}: cannot be read ({type(error).__name__})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise SettingError(f"--data {file}, line {number}: not JSON") from None
        names = ("instruction", "response")
        if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in names):
            raise SettingError(f"--data {file}, line {number}: needs the texts instruction and response")
        texts.append(record)
    if not texts:
        raise SettingError(f"--data {file}: holds no records")
    return texts


def choose(
    tokenizer: DollyTokenizer, texts: list[dict], count: int, longest: int, seed: int
) -> dict[str, list[tuple[list[int], int]]]:
    """For each kind at most `count` examples (ids, length of the prompt), answers cut to `longest` tokens."""
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)
    chosen: dict[str, list[tuple[list[int], int]]] = {kind: [] for kind in KINDS}
    for record in shuffled:
        examples = chosen["context" if record.get("context") else "free"]
        if len(examples) < count:
            ids, begin = tokenizer.encode_example(record["instruction"], record.get("context"), record["response"])
            if begin <= _LONGEST_PROMPT and len(ids) - begin >= _LEAST_ANSWER:
                examples.append((ids[: begin + longest], begin))
    return chosen


def measure(run: Bench) -> dict:
    """A row for each format and kind of text: seconds behind the first token, without and with guessing."""
    from ..checkpoint import read_tokenizer
    from .limits import disturbances, spread

    settings = run.settings
    if settings.model is None and settings.tokenizer is None:
        raise SettingError(
            "--lookup with random weights needs --tokenizer DIR, that of a dolly-v2: they know bytes only"
        )
    tokenizer = read_tokenizer(Path(settings.tokenizer or run.model), add_keys=True)
    chosen = choose(
        tokenizer, read_texts(settings.data), settings.records or _RECORDS, settings.new_tokens, settings.seed
    )
    rows = []
    for number_format, dtype in run.formats():
        found = run.child(run.job("dolly", number_format, dtype=dtype, lookup=chosen))
        for kind, one in found["kinds"].items():
            plain, guessing = spread(one["plain_s"]), spread(one["guessing_s"])
            rows.append({
                "format": number_format, "kind": kind, **one, "plain_s": plain, "guessing_s": guessing,
                "times_plain": plain["median"] / guessing["median"],
                "disturbed": disturbances({"plain": plain, "guessing": guessing}, found),
            })  # fmt: skip
    return {"rows": rows}


def run_lookup(engine: Engine, job: dict) -> dict:
    """In the child: every example without and with guessing in turn, one at a time."""
    net = engine.net
    kinds = {}
    for kind, examples in job["lookup"].items():
        if not examples:
            continue
        _answer(engine, net, examples[0], True)  # warm-up; the engine also learns what passes cost
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
    return {"kinds": kinds}


def _answer(engine: Engine, net: NeoX, example: tuple[list[int], int], guessing: bool) -> tuple[float, Any]:
    """Seconds from the first token of the scripted answer to its last, and what the run did."""
    from ..engine import Request, RunStats
    from ..guess import PromptLookup
    from ..sampling import Sampling

    ids, begin = example
    engine.net = Scripted(net, ids)
    stats, moments, made = RunStats(), [], []
    request = Request(
        ids[:begin], len(ids) - begin, Sampling(do_sample=False), guesser=PromptLookup if guessing else None
    )
    for token in engine.run([request], 1, stats):
        moments.append(time.perf_counter())
        made.append(token.id)
    assert made == ids[begin:], "the script was not followed"
    return moments[-1] - moments[0], stats
