"""`dolly bench --lookup`: what draft tokens from the prompt gain on real text, at the cost of the model's real passes.

How many draft tokens are accepted depends on the text, and random weights write none. So the network computes every
pass in full and then predicts what a person answered: the records' own responses are its script. Time is thus that of
the real shape, and the accepted tokens are those that the responses copy from their contexts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.benchmark import peers
from modelscope_dolly.benchmark.examples import Example, encode, read_records, shuffled
from modelscope_dolly.benchmark.repeats import disturbances, spread
from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.errors import SettingError

if TYPE_CHECKING:
    from modelscope_dolly.benchmark.bench_run import BenchRun, Variant
    from modelscope_dolly.benchmark.own_engine import ScriptedNetwork, TimedAnswers
    from modelscope_dolly.engine.engine import Engine
    from modelscope_dolly.prompt import DollyTokenizer

#: Kinds of text: with a context to copy from, and without one.
KINDS = ("context", "free")
#: Longer prompts are left out: their prefill would take most of the time of the measurement.
_LONGEST_PROMPT = 512
_LEAST_ANSWER = 16
_RECORDS = 8


def measure(run: BenchRun) -> None:
    """`lookup`: a row for each format and kind of text, seconds behind the first token without and with lookup."""
    settings = run.settings
    if settings.model is None and settings.tokenizer is None:
        raise SettingError(
            "--lookup with random weights needs --tokenizer DIR, that of a dolly-v2: they know bytes only"
        )
    tokenizer = read_tokenizer(Path(settings.tokenizer or run.model), add_keys=True)
    records = shuffled(read_records(settings.data), settings.seed)
    examples = choose(tokenizer, records, settings.records or _RECORDS, settings.new_tokens)
    run.expect(_name(variant, kind) for variant in run.variants() for kind in KINDS if examples[kind])
    rows: list[dict] = []
    run.results["lookup"] = {"rows": rows}
    for variant in run.variants():

        def rows_of(result: dict, variant: Variant = variant) -> dict[str, dict]:
            return {_name(variant, kind): _row(variant, kind, part, result) for kind, part in result["kinds"].items()}

        run.child_rows(rows, variant, rows_of, lookup=examples)


def choose(tokenizer: DollyTokenizer, records: list[dict], count: int, longest: int) -> dict[str, list[Example]]:
    """For each kind at most `count` examples, answers cut to `longest` tokens."""
    chosen: dict[str, list[Example]] = {kind: [] for kind in KINDS}
    for example in encode(tokenizer, records, _LONGEST_PROMPT):
        examples = chosen["context" if example.has_context else "free"]
        if len(examples) < count and len(example.answer) >= _LEAST_ANSWER:
            examples.append(example._replace(ids=example.ids[: example.prompt_tokens + longest]))
    return chosen


def _name(variant: Variant, kind: str) -> str:
    return f"{variant.format}, {kind} text"


def _row(variant: Variant, kind: str, part: dict, result: dict) -> dict:
    plain, lookup = spread(part["plain_s"]), spread(part["guessing_s"])
    return {
        "format": variant.format, "kind": kind, **part, "plain_s": plain, "guessing_s": lookup,
        "times_plain": plain["median"] / lookup["median"],
        "disturbed": disturbances({"plain": plain, "lookup": lookup}, result),
    }  # fmt: skip


def run_lookup(job: dict) -> dict:
    """In the child: every example without and with prompt lookup in turn, one at a time."""
    from modelscope_dolly.benchmark.own_engine import ScriptedNetwork, load_engine

    engine = load_engine(job)
    network = ScriptedNetwork(engine)
    kinds: dict[str, dict] = {}
    for kind, examples in job["lookup"].items():
        examples = [Example(*example) for example in examples]
        if not examples:
            continue
        for lookup in (False, True):
            _answer(engine, network, examples[0], lookup)  # warm-up; the engine also learns the time of its steps
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(job["repeats"]):
            peers.say(f"{kind} text: {number + 1} of {job['repeats']}")
            for lookup, totals in seconds.items():
                runs = [_answer(engine, network, example, lookup) for example in examples]
                totals.append(sum(run.token_seconds[0][-1] - run.token_seconds[0][0] for run in runs))
        proposed, accepted = sum(run.proposed for run in runs), sum(run.accepted for run in runs)
        steps, tokens = sum(run.decode_steps for run in runs), sum(run.decode_tokens for run in runs)
        kinds[kind] = {
            "answers": len(examples), "tokens": tokens, "plain_s": seconds[False], "guessing_s": seconds[True],
            "guessed": proposed, "accepted": accepted, "accepted_share": accepted / proposed if proposed else None,
            "passes_per_token": steps / max(1, tokens),
        }  # fmt: skip
        peers.tell({"kinds": kinds})
    return {"kinds": kinds}


def _answer(engine: Engine, network: ScriptedNetwork, example: Example, lookup: bool) -> TimedAnswers:
    from modelscope_dolly.benchmark.own_engine import answer

    network.follow(example.ids)
    run = answer(engine, [(example.prompt, len(example.answer))], 1, prompt_lookup=lookup)
    assert run.answers == [example.answer], "the script was not followed"
    return run
