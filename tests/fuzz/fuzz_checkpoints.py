"""Damaged and hostile checkpoint directories: refused on one line, or loaded; with a manifest, only as they were."""

from __future__ import annotations

import random
import resource
import shutil
import tempfile
from pathlib import Path

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.check import check_directory, format_findings
from modelscope_dolly.checkpoint.quantize import quantize_checkpoint
from modelscope_dolly.errors import DollyError
from modelscope_dolly.model import DollyForTextGeneration
from tests.fuzz.cases import run_cases
from tests.fuzz.directories import make_hostile, tiny_checkpoint
from tests.support import layouts

QUESTION = "Name three colours of the rainbow."
#: Memory that no directory of this size may take.
_MOST_MEMORY = 2 << 30


def main(seconds: float, seed: int) -> int:
    """Fuzz for so long; returns the number of cases. Raises AssertionError for a case that fails."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        sealed = tiny_checkpoint(place)
        sources = {
            "sealed": sealed,
            "shards": layouts.shard(sealed, place / "shards"),
            "plain": layouts.plain_hf(sealed, place / "plain"),
            "2023": layouts.copy_2023_layout(sealed, place / "2023"),
        }
        expected = _answer(sealed)
        before = _peak_memory()

        def case(rng: random.Random) -> None:
            name = rng.choice(list(sources))
            directory = place / "case"
            shutil.copytree(sources[name], directory)
            try:
                harms = [make_hostile(directory, rng) for _ in range(rng.choice((1, 1, 2)))]
                _try(directory, expected, "; ".join(harms))
                assert _peak_memory() - before < _MOST_MEMORY, f"{name}: {harms}: took gigabytes of memory"
            finally:
                shutil.rmtree(directory)

        return run_cases(seconds, seed, case)


def _try(directory: Path, expected: dict, harm: str) -> None:
    try:
        text = format_findings(check_directory(directory))
        assert text.isprintable() or all(line.isprintable() for line in text.split("\n")), harm
    except DollyError as error:
        raise AssertionError(f"{harm}: dolly check ended with {error}") from error
    has_manifest = (directory / manifest.NAME).exists()
    for step in (lambda: _answer(directory), lambda: quantize_checkpoint(directory, directory / "copy")):
        try:
            answer = step()
        except DollyError as error:
            assert "\n" not in str(error), f"{harm}: {error}"
        except Exception as error:
            raise AssertionError(f"{harm}: {type(error).__name__}: {error}") from error
        else:
            if isinstance(answer, dict) and has_manifest and manifest.NAME not in harm:
                assert answer == expected, f"{harm}: another answer"


def _answer(directory: Path) -> dict:
    model = DollyForTextGeneration(str(directory), device="cpu", threads=1)
    return model.forward(QUESTION, do_sample=False, max_new_tokens=4)


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
