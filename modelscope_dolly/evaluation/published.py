"""The table of the dolly-v2 model cards as counts of correct answers, and the arithmetic on it.

Source: the benchmark table in the cards of databricks/dolly-v2-3b, -7b and -12b (2023). Each of its scores, printed
with six digits, is a whole number of correct answers over the size of the full set; the counts are kept here, and the
geometric means that follow from them equal the printed ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CardTask:
    """One column of the card."""

    name: str  # as the card and lm-eval spell it
    size: int  # documents of the full set
    metric: str  # which of lm-eval's metrics the card prints; `acc_norm` divides by the length of the choice
    requests_sha256: str  # of all (context, continuation) requests of lm-eval 0.3.0, from its tests/testdata
    gold_sha256: str  # of the JSON list of correct choices, in the order of the set


#: In the card's order of columns. ARC and OpenBookQA are test sets, the others validation sets.
# fmt: off
TASKS = (
    CardTask("openbookqa", 500, "acc_norm",
             "78a49a0ca1a47373adb33463b1d092e6bc0d8f4b01bcb380ada48065037849d7",
             "9157817d34aa70d5d54fe4234a250e3c75f370997140888507ca503fbb4ca22c"),
    CardTask("arc_easy", 2376, "acc_norm",
             "ffa6e39a35a16299dcb015f17f986aaa598ad8b4840c4cebe0339a7042232741",
             "77a65d97110a140921701d841670c65daf626f2d885ac5bb6a789219225bd8ad"),
    CardTask("winogrande", 1267, "acc",
             "90a3eff49de9173964d46f5ed57bcf9a78a72dd1bfe0e5323b25cebb40b49ea9",
             "4b03d28fbfd34471ccf24179da663f01b739aa4ae3e720e791ccba2e11125a98"),
    CardTask("hellaswag", 10042, "acc_norm",
             "abb808c97d6529eda6c11067837a132c62d25cba0394d720f80cca6df9f7196e",
             "db4c5fb38a362b0eb3601e6f68a78f859524b8191975975de9ebc2b69d72f86e"),
    CardTask("arc_challenge", 1172, "acc_norm",
             "41c34c96cca8ace661911d0033d630c554b283f5a3953bcdc50720ae6b00a9c1",
             "158678eab989c7ce35c0e06ea8640329ffcde7405250416d0977d694b24d143f"),
    CardTask("piqa", 1838, "acc_norm",
             "6048a3a2bb3ad1e6a3d98139618e06b4d7de766edd685bd38837596199c3f69f",
             "61cc395cb4baf17a165668eae19a1d823962c210e7ae471eaf2aa896a51831a1"),
    CardTask("boolq", 3270, "acc",
             "6577e0d88572772ef08e64f624c0e3df0953286ae1f118ccef15623b59ffeabf",
             "e7da4102397cbcf591f28bc6fbb35efd99a9a39a5c762beecd4964235dd2ef9b"),
)
# fmt: on
TASK_BY_NAME = {task.name: task for task in TASKS}
TASK_NAMES = tuple(TASK_BY_NAME)

#: Model -> correct answers per task, in the order of TASKS. Sorted as the card: by geometric mean, smallest first.
CORRECT = {
    "pythia-2.8b": (174, 1392, 747, 5937, 379, 1349, 2087),
    "pythia-6.9b": (184, 1437, 771, 6342, 403, 1399, 2048),
    "dolly-v2-3b": (192, 1453, 747, 6535, 434, 1365, 1882),
    "pythia-12b": (182, 1490, 806, 6709, 406, 1397, 2202),
    "gpt-j-6B": (191, 1477, 825, 6654, 426, 1399, 2145),
    "dolly-v2-12b": (204, 1519, 781, 7109, 455, 1393, 1858),
    "dolly-v2-7b": (196, 1506, 770, 6894, 477, 1380, 2106),
    "dolly-v1-6b": (205, 1496, 815, 6796, 451, 1422, 2249),
    "gpt-neox-20b": (201, 1625, 832, 7172, 479, 1441, 2274),
}


def standard_error(score: float, size: int) -> float | None:
    """Of a share of correct answers among `size` documents: sqrt(p (1 - p) / (n - 1)); None for a single document."""
    return math.sqrt(score * (1 - score) / (size - 1)) if size > 1 else None


def gmean(scores: Sequence[float]) -> float | None:
    """Geometric mean of the scores of all seven tasks; None when one is missing or 0."""
    if len(scores) != len(TASKS) or not all(scores):
        return None
    return math.exp(math.fsum(map(math.log, scores)) / len(scores))


def gmean_error(scores: Sequence[float], errors: Sequence[float | None]) -> float | None:
    """Standard error of `gmean` by the delta method: g / 7 * sqrt(sum((error / score)^2))."""
    mean = gmean(scores)
    if mean is None or None in errors:
        return None
    return mean / len(scores) * math.sqrt(math.fsum((e / s) ** 2 for s, e in zip(scores, errors, strict=True)))


def published_name(model: str) -> str | None:
    """Name of the card's row for a model, matched by the last part of the model's name; None when there is none."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    return next((name for name in CORRECT if name.lower() == last), None)
