"""A slice of `make fuzz`: each fuzzer for a few seconds with a fixed seed, and proof that they see what is wrong."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest

from modelscope_dolly import generation_settings
from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.cli import exit_codes
from tests.fuzz import fuzz_api, fuzz_checkpoints, fuzz_command_line, fuzz_kernels
from tests.fuzz.cases import run_cases
from tests.fuzz.run import NAMES

SECONDS, SEED = 6, 20261121


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_of_the_fuzz_job_fails_nowhere(name, record_property):
    count = importlib.import_module(f"tests.fuzz.{name}").main(SECONDS, SEED)
    if name == "fuzz_kernels" and not count:
        pytest.skip("no C compiler with address and undefined behaviour sanitizers here")
    record_property("cases", (name, count))
    assert count >= 1


def test_all_fuzzers_are_found():
    assert {"fuzz_api", "fuzz_checkpoints", "fuzz_command_line", "fuzz_kernels"} <= set(NAMES)


def test_a_failed_case_is_named_by_seed_and_number_and_comes_again():
    met = []

    def case(rng: random.Random) -> None:
        met.append(rng.random())
        if len(met) == 3:
            raise ValueError("wrong")

    runs = []
    for _ in range(2):
        met.clear()
        with pytest.raises(AssertionError, match=r"case 2 of seed 7: ValueError: wrong"):
            run_cases(60, 7, case)
        runs.append(met[:])
    assert runs[0] == runs[1]


def test_a_check_that_is_left_out_is_seen_by_the_fuzzer_of_the_api(monkeypatch):
    monkeypatch.setattr(generation_settings, "is_whole", lambda value, *_: not isinstance(value, bool))
    with pytest.raises(AssertionError, match="seed 1"):
        fuzz_api.main(60, 1)


def test_a_damaged_answer_is_seen_by_the_fuzzer_of_checkpoints(monkeypatch):
    """Where checksums are not compared, a weight that is flipped goes unnoticed."""

    def flip(directory: Path, _: random.Random) -> str:
        for path in directory.glob("*.safetensors"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = bytes(byte ^ 1 for byte in data[len(data) // 2 :])
            path.write_bytes(data)
        return "flipped"

    monkeypatch.setattr(fuzz_checkpoints, "make_hostile", flip)
    assert fuzz_checkpoints.main(1, 1) >= 1
    monkeypatch.setattr(manifest, "differences", lambda *_: [])
    with pytest.raises(AssertionError, match="flipped: another answer"):
        fuzz_checkpoints.main(60, 1)


def test_an_error_that_is_not_caught_is_seen_by_the_fuzzer_of_command_lines(monkeypatch):
    monkeypatch.setattr(exit_codes, "DollyError", KeyError)
    with pytest.raises(AssertionError, match=r"case \d of seed 2: \w+Error"):
        fuzz_command_line.main(60, 2)


def test_undefined_behaviour_is_seen_by_the_fuzzer_of_kernels(monkeypatch, tmp_path):
    """Signed overflow, as it was in the sums of rows that are not finite."""
    kernels = fuzz_kernels.SOURCES[0].parent
    for source in kernels.iterdir():
        (tmp_path / source.name).write_text(source.read_text().replace("if (bits >= NOT_FINITE) k = 0;", ""))
    monkeypatch.setattr(fuzz_kernels, "SOURCES", [tmp_path / source.name for source in fuzz_kernels.SOURCES])
    if fuzz_kernels.build(Path(tmp_path)) is None:
        pytest.skip("no C compiler with address and undefined behaviour sanitizers here")
    with pytest.raises(AssertionError, match="signed integer overflow"):
        fuzz_kernels.main(30, 1)
