"""Random recipes, command lines of train.*, and damaged run directories: a result, or one line and exit code 2.

    python -m tests.fuzz.fuzz_recipes 600 7        for 600 seconds, from seed 7

Every round has a seed of its own, which is printed; a failure is printed smallest first, with the seed that finds it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck
from hypothesis import strategies as st

from modelscope_dolly.errors import DollyError
from tests.support.training_runs import material, write_recipe
from train import bench, finetune, plan, publish
from train.config import TrainConfig, build, flag
from train.recipe_file import read_recipe
from train.training.checkpoints import Origin, mark_complete
from train.training.report import METRICS, cut_metrics, read_metrics, read_starts, summary
from train.training.resume_choice import choose_resume
from train.training.run_lock import NAME, locked

#: Seconds that one recipe or command may take; what takes longer is a mistake that costs time.
LIMIT = 20.0

NAMES = [key.name for key in fields(TrainConfig)]
#: Words that have been mistakes somewhere: of YAML, of numbers, of paths, of Unicode.
WORDS = [
    "2026-11-21", "2026-13-45", "0x_", "0b_", "0o9", "1:30:99", "!!int foo", "!!bool foo", "!!timestamp foo",
    "&a [*a]", "*a", "9" * 5000, "-" + "9" * 30, "18446744073709551616", "4294967296", "1e999", "-1e-999", ".inf",
    ".nan", "1_000", "+5", ".5", "[" * 3000, "{a: " * 500, "? ", "<<: {}", "|", ">", "%YAML 9.9", "---", "...", "\t",
    "\n", "\r", "\0", "\x85", "\u2028", "\ud800", "\udcff", "\ufeff", "\U0001f600", "é", "null", "~", "true", "no",
    "''", '"', "'", "#", ": ", "- ", ", ", "]", "}", "/dev/null", "/dev/full", "/proc/self/mem", "..", "/", "~nobody",
    "a" * 5000, "{r: 16}", "{r: 8, bits: 4}", "best",
    "{r: 8, bits: 3, targets: [dense, 5]}", "{r: 8, targets: {}}", "{r: 1e9, alpha: " + "9" * 400 + "}",
    "{instruction: 5}", "{model_id: me/x, revision: 1.0}", "[a.jsonl, {path: b.csv, share: 2}]",
    "{path: ., repeat: 1e9}", "[{context: a}]", "{path: none.csv, share: .5, columns: {messages: 5}}", "[[]]", "/**",
    "*.[", "last", "ms:x/y@", "hf:./none", "auto", "none", "0", "1", "2", "3", "-1",
]  # fmt: skip
HARDWARE = [
    "cpu", "cpu,host=1T", "8xA100-80G", "99999xT4-16G", "9999999xA10-24G", "0xA10-24G", "٣xA100-80G",
    "A-9G,host=9" + "9" * 5000,
]  # fmt: skip

words = st.sampled_from(WORDS) | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)
values = st.recursive(
    words,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | st.dictionaries(
            st.sampled_from(
                [
                    "r",
                    "alpha",
                    "dropout",
                    "instruction",
                    "model_id",
                    "revision",
                    "token",
                    "targets",
                    "bits",
                    "path",
                    "share",
                    "repeat",
                    "columns",
                    "context",
                ]
            )
            | words,
            inner,
            max_size=3,
        ).map(lambda parts: "{" + ", ".join(f"{key}: {value}" for key, value in parts.items()) + "}")
    ),
    max_leaves=5,
)
lines = st.tuples(st.sampled_from(NAMES) | words, values).map(lambda pair: f"{pair[0]}: {pair[1]}")
recipes = st.lists(lines, max_size=6).map("\n".join) | st.lists(words, max_size=6).map("".join)
flags = st.tuples(st.sampled_from(NAMES), values).map(lambda pair: [flag(pair[0]), pair[1]])
commands = st.lists(flags | words.map(lambda word: [word]), max_size=4).map(
    lambda parts: [word for part in parts for word in part]
)


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fuzz_recipes."))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def one_line(text: str) -> None:
    assert text and len(text.splitlines()) == 1 and len(text) < 20_000, text


def a_recipe(data: st.DataObject) -> None:
    """A recipe file is a configuration, or one line."""
    path = folder() / "recipe.yaml"
    path.write_bytes(data.draw(recipes).encode("utf-8", "surrogatepass"))
    configured_or_one_line(path)


def configured_or_one_line(path: Path) -> None:
    try:
        json.dumps(
            vars(build({"model": "m", "dataset": "d", "output_dir": "o"} | read_recipe(path)).config), allow_nan=False
        )
    except DollyError as error:
        one_line(str(error))


def every_word() -> None:
    """Each of WORDS as the value of a setting of each type, and as a whole recipe."""
    path = folder() / "recipe.yaml"
    for word in WORDS:
        for text in (
            word,
            *(
                f"{name}: {word}"
                for name in (
                    "epochs",
                    "seed",
                    "strict",
                    "learning_rate",
                    "lora",
                    "model",
                    "dataset",
                    "samples",
                    "multi_turn",
                    "patience",
                    "max_hours",
                    "final_from",
                )
            ),
        ):
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            configured_or_one_line(path)


class Planned(DollyError):
    """All that comes before the training went well."""


def refuse_to_train(setup, lock=None, begun=None):
    raise Planned("planned")


def refuse_to_publish(*arguments, **keywords):
    raise Planned("published")


def a_command(data: st.DataObject) -> None:
    """A command line is planned, or one line and exit code 2; nothing is trained, nothing is sent."""
    given, base = data.draw(st.just([]) | commands), str(material() / "base")
    recipe = str(write_recipe(folder() / "command"))
    main, start = data.draw(
        st.sampled_from(
            [
                (finetune.main, [recipe]),
                (plan.main, [recipe]),
                (plan.main, [recipe, "--gpus", data.draw(st.sampled_from(HARDWARE))]),
                (bench.main, [recipe, "--steps", data.draw(words)]),
                (bench.main, [recipe, "--processes", data.draw(words)]),
                (publish.main, [base, "--model-id", "me/x", "--revision", data.draw(words)]),
                (publish.main, [base, "--model-id", "me/x", "--revision", "v1", "--workers", data.draw(words)]),
                (publish.main, [base, "--model-id", "me/x", "--revision", "v1", *given]),
            ]
        )
    )
    arguments = start if main is publish.main else [*start, *given]
    out, err = io.StringIO(), io.StringIO()
    replaced = [
        (finetune, "train", refuse_to_train),
        (bench, "run_mode", refuse_to_publish),
        (finetune, "before_training", refuse_to_publish),
        (publish, "publish", refuse_to_publish),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        try:
            code = main(arguments)
        except SystemExit as end:  # --help
            code = end.code
    told = [line for line in err.getvalue().splitlines() if line.startswith("train.")]
    assert code in (0, 2), (code, arguments)
    assert "Traceback" not in err.getvalue()
    if code == 2:
        assert len(told) == 1 and len(told[0]) < 20_000, (arguments, err.getvalue())
        out.getvalue().encode("utf-8"), told[0].encode("utf-8", "backslashreplace")


def a_damaged_run(data: st.DataObject) -> None:
    """A run directory with damage: the newest sound checkpoint, or none; its records, or one line."""
    run, origin = folder() / "run", Origin("plan", "order", "data", {"lora": None, "dataset": "d", "dtype": "fp32"})
    shutil.rmtree(run, ignore_errors=True)
    for step in (1, 2):
        path = run / f"checkpoint-{step}"
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(bytes(range(64)))
        (path / "optimizer.pt").write_bytes(b"x" * 64)
        mark_complete(path, 1, origin)
    (run / "run.json").write_text(json.dumps({"starts": [{"settings": {}}]}))
    (run / METRICS).write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2)))
    whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for file in data.draw(st.lists(st.sampled_from(sorted(whole)), max_size=3, unique=True)):
        file.write_bytes(data.draw(st.sampled_from([damaged_bytes, cut_bytes, any_bytes]))(data, whole[file]))
    (run / NAME).write_bytes(data.draw(st.binary(max_size=520)))

    with locked(run):
        damaged = {path.parent.name for path, content in whole.items() if not same(path.read_bytes(), content)}
        expected = next((step for step in (2, 1) if f"checkpoint-{step}" not in damaged), None)
        choice = choose_resume(run, "auto", origin)
        assert (choice.checkpoint.step if choice.checkpoint else None) == expected
        for line in choice.lines:
            one_line(line)
        for read in (
            lambda: read_starts(run / "run.json"),
            lambda: cut_metrics(run / METRICS, 1),
            lambda: read_metrics(run),
            lambda: summary(run),
        ):
            try:
                read()
            except DollyError as error:
                one_line(str(error))
    assert not (run / NAME).exists()


def same(found: bytes, written: bytes) -> bool:
    """Whether a file says what it said: another space in its JSON is no damage."""
    try:
        return found == written or json.loads(found) == json.loads(written)
    except (ValueError, RecursionError):
        return False


def damaged_bytes(data: st.DataObject, content: bytes) -> bytes:
    position = data.draw(st.integers(0, len(content) - 1))
    return content[:position] + bytes([content[position] ^ data.draw(st.integers(1, 255))]) + content[position + 1 :]


def cut_bytes(data: st.DataObject, content: bytes) -> bytes:
    return content[: data.draw(st.integers(0, len(content) - 1))]


def any_bytes(data: st.DataObject, content: bytes) -> bytes:
    return data.draw(st.binary(max_size=40)) + data.draw(
        st.sampled_from([b"", b"\n", b"{}", b"5\n", b"[[[[", b'{"starts": 5}'])
    )


TARGETS: tuple[Callable[[st.DataObject], None], ...] = (a_recipe, a_command, a_damaged_run)


def examples(target: Callable[[st.DataObject], None], count: int, seed: int) -> None:
    """Try `count` random examples of one target. Raises what went wrong, with the smallest example."""

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @hypothesis.given(st.data())
    def run(data):
        start = time.monotonic()
        target(data)
        assert time.monotonic() - start < LIMIT, f"took {time.monotonic() - start:.0f} s"

    run()


#: Cases of a target before the next one.
ROUND = 50


def main(seconds: float, seed: int) -> int:
    """Fuzz for about so many seconds; returns the number of cases. The first failure ends it."""
    end, cases = time.monotonic() + seconds, 0
    for number, target in zip(itertools.count(seed), itertools.cycle(TARGETS)):
        if time.monotonic() >= end:
            break
        print(f"{target.__name__}, seed {number}", flush=True)
        examples(target, ROUND, number)
        cases += ROUND
    return cases


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
