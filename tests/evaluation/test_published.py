"""The card's table: counts against the printed digits, and the arithmetic on them."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from modelscope_dolly.evaluation.published import (
    CORRECT,
    TASK_BY_NAME,
    TASK_NAMES,
    TASKS,
    gmean,
    gmean_error,
    published_name,
    standard_error,
)

#: As printed on the cards of 2023, in their order.
PRINTED = """
pythia-2.8b   0.348 0.585859 0.589582 0.591217 0.323379 0.73395  0.638226 0.523431
pythia-6.9b   0.368 0.604798 0.608524 0.631548 0.343857 0.761153 0.6263   0.543567
dolly-v2-3b   0.384 0.611532 0.589582 0.650767 0.370307 0.742655 0.575535 0.544886
pythia-12b    0.364 0.627104 0.636148 0.668094 0.346416 0.760065 0.673394 0.559676
gpt-j-6B      0.382 0.621633 0.651144 0.662617 0.363481 0.761153 0.655963 0.565936
dolly-v2-12b  0.408 0.63931  0.616417 0.707927 0.388225 0.757889 0.568196 0.56781
dolly-v2-7b   0.392 0.633838 0.607735 0.686517 0.406997 0.750816 0.644037 0.573487
dolly-v1-6b   0.41  0.62963  0.643252 0.676758 0.384812 0.773667 0.687768 0.583431
gpt-neox-20b  0.402 0.683923 0.656669 0.7142   0.408703 0.784004 0.695413 0.602236
"""
LINES = [line.split() for line in PRINTED.strip().splitlines()]


def scores(name: str) -> list[float]:
    return [right / task.size for right, task in zip(CORRECT[name], TASKS, strict=True)]


def test_rows_are_the_cards_in_its_order():
    assert list(CORRECT) == [line[0] for line in LINES]
    assert sorted(CORRECT, key=lambda name: gmean(scores(name))) == list(CORRECT)


@pytest.mark.parametrize("line", LINES, ids=[line[0] for line in LINES])
def test_counts_give_every_printed_digit(line):
    name, *printed, mean = line
    assert [f"{score:.6g}" for score in scores(name)] == printed
    assert f"{gmean(scores(name)):.6g}" == mean


def test_metrics_and_sizes_are_those_of_the_card():
    assert [task.name for task in TASKS if task.metric == "acc"] == ["winogrande", "boolq"]
    assert {task.metric for task in TASKS} == {"acc", "acc_norm"}
    assert [TASK_BY_NAME[name].size for name in TASK_NAMES] == [500, 2376, 1267, 10042, 1172, 1838, 3270]


def test_gmean_needs_all_seven_and_no_zero():
    assert gmean([0.5] * 7) == pytest.approx(0.5)
    assert gmean([0.5] * 6) is None
    assert gmean([0.5] * 6 + [0.0]) is None
    assert gmean_error([0.5] * 6, [0.01] * 6) is None
    assert gmean_error([0.5] * 7, [0.01] * 6 + [None]) is None


def test_standard_errors_are_those_of_repeated_draws():
    import random

    draw, size, share = random.Random(0), 400, 0.6
    means = [sum(draw.random() < share for _ in range(size)) / size for _ in range(600)]
    average = sum(means) / len(means)
    spread = math.sqrt(sum((mean - average) ** 2 for mean in means) / (len(means) - 1))
    assert standard_error(share, size) == pytest.approx(spread, rel=0.1)
    assert standard_error(1.0, 1) is None
    assert gmean_error(scores("dolly-v2-3b"), errors("dolly-v2-3b")) == pytest.approx(0.0060, abs=2e-4)


def errors(name: str) -> list[float]:
    return [standard_error(score, task.size) for score, task in zip(scores(name), TASKS, strict=True)]


def test_a_model_finds_its_row_by_the_last_part_of_its_name():
    assert published_name("databricks/dolly-v2-3b") == "dolly-v2-3b"
    assert published_name("EleutherAI/gpt-j-6b") == "gpt-j-6B"
    assert published_name("/models/pythia-12b/") == "pythia-12b"
    assert published_name("EleutherAI/pythia-12b-deduped") is None


def test_the_published_table_needs_neither_a_model_nor_torch():
    command = [sys.executable, "-X", "importtime", "-m", "modelscope_dolly.cli", "eval", "--published"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " torch" not in done.stderr and " lm_eval" not in done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0] == ["model", *TASK_NAMES, "gmean"]
    assert [[line[0], *line[2:]] for line in table[1:]] == LINES
