"""The measuring of memory: what it counts, what it refuses, and a whole run of it."""

from __future__ import annotations

import pytest
import torch

from train.memory_table import SETTINGS, SHAPES, MemoryWatch, main, row


def test_allocated_memory_is_seen_also_when_it_is_given_back():
    watch = MemoryWatch()
    watch.start()
    for _ in range(3):
        kept = torch.ones(16 << 20)  # 64 MiB, touched
        del kept
    peak = watch.stop()
    assert 60 << 20 < peak < 160 << 20


def test_a_row_says_how_far_the_prediction_is_off():
    assert row("nano", "lora z2", 3 << 30, 2 << 30) == "| nano | lora z2 | 2 | 3.000 GiB | 2.000 GiB | +50 % |"


@pytest.mark.parametrize(
    ("flags", "says"), [(["--shapes", "nan"], "unknown shape 'nan'"), (["--settings", "z0,x"], "unknown setting 'x'")]
)
def test_unknown_names_are_one_line(flags, says, capsys):
    assert main(flags) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert says in line and all(name in line for name in (SHAPES if "--shapes" in flags else SETTINGS))


def test_the_nano_model_takes_what_is_predicted(capsys):
    """Within 15 % where docs/training.md was measured; other libraries, other processors: a wider bound."""
    assert main(["--shapes", "nano", "--settings", "lora"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| nano | lora | 1 |")]
    assert abs(int(line.split("|")[-2].removesuffix(" % "))) <= 30
