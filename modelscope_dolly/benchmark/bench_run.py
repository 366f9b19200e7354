"""One call of `dolly bench`: settings, weights on disk, jobs for child processes, and the results so far."""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modelscope_dolly.benchmark.bench_options import BenchSettings
from modelscope_dolly.benchmark.process import progress, run_child
from modelscope_dolly.benchmark.synthetic_weights import make_checkpoint, parse_shape
from modelscope_dolly.checkpoint.config import read_config
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.reader import open_checkpoint
from modelscope_dolly.hardware import DTYPES, choose_device, choose_threads, parse_dtype
from modelscope_dolly.load import choose_number_type


class Variant(NamedTuple):
    """What one child process measures."""

    engine: str  # "dolly" or a peer
    format: str  # a number type, or a name of `quantize=`
    dtype: str  # of what is not quantised
    program: str = sys.executable  # the interpreter that runs it; for llamacpp, its program

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


class BenchRun:
    """What every measurement needs.

    Attributes:
        settings: the checked flags.
        device, threads: of the measurement.
        dtypes: names of the number types; the first is that of the yardstick.
        model, config: the checkpoint directory, inside `weights()`.
        scratch: directory for what peers convert.
        results: all that is measured, from the moment it is; `not_measured` names what is still to come.
    """

    def __init__(self, settings: BenchSettings, results: dict | None = None):
        self.settings = settings
        self.results = {} if results is None else results
        self.device = choose_device(settings.device).value
        self.threads = choose_threads(settings.threads).value
        self.dtypes = tuple(_short_name(parse_dtype(name)) for name in settings.dtypes)
        self.random = random.Random(settings.seed)
        if settings.draft and not Path(settings.draft).is_dir():
            parse_shape(settings.draft)  # reports a mistake before minutes of work

    @contextlib.contextmanager
    def weights(self) -> Iterator[None]:
        """Find or make the checkpoint; what was made and is not to be kept goes when the block ends."""
        settings = self.settings
        with tempfile.TemporaryDirectory(prefix="dolly-bench-") as temporary:
            self.scratch = Path(temporary)
            if settings.model:
                self.model = locate(settings.model, settings.revision)
                self.config = read_config(self.model)
            else:
                self.model = self.random_weights(settings.shape)
                self.config = parse_shape(settings.shape)
                if settings.keep:
                    self.scratch = Path(settings.keep) / f"{settings.shape}-peers"
                    self.scratch.mkdir(exist_ok=True)
            if not self.dtypes:
                checkpoint = open_checkpoint(self.model, verify=False)
                self.dtypes = (_short_name(choose_number_type(checkpoint, self.device).value),)
            yield

    def random_weights(self, shape: str) -> Path:
        """A checkpoint of this shape, below --keep or `scratch`; made unless it is there."""
        directory = (Path(self.settings.keep) if self.settings.keep else self.scratch) / shape
        if not directory.exists():
            progress(f"making random weights of shape {shape}")
            directory.parent.mkdir(parents=True, exist_ok=True)
            make_checkpoint(parse_shape(shape), directory, self.settings.seed)
        return directory

    def expect(self, names: Iterable[str]) -> None:
        """Names of all that will be measured."""
        self.results["not_measured"] = list(names)

    def measured(self, names: Iterable[str]) -> None:
        """Take these off the list of what is still to come."""
        done = set(names)
        self.results["not_measured"] = [name for name in self.results["not_measured"] if name not in done]

    def prompt(self, tokens: int | None = None) -> list[int]:
        """Random ids, as many as --prompt-tokens unless said otherwise; from 4 on: no end of text among them."""
        top = min(self.config.vocab_size, 50000)
        return [self.random.randrange(4, top) for _ in range(tokens or self.settings.prompt_tokens)]

    def variants(self) -> list[Variant]:
        """Our own: the number types as they are, then the quantised formats."""
        plain = [Variant("dolly", name, name) for name in self.dtypes] if "none" in self.settings.quantize else []
        return plain + [Variant("dolly", name, self.dtypes[0]) for name in self.settings.quantize if name != "none"]

    def job(self, variant: Variant, **more: Any) -> dict:
        """What a child process is asked; `more` says what to measure (worker.py, peers.py)."""
        return {
            "engine": variant.engine, "format": variant.format, "dtype": variant.dtype, "model": str(self.model),
            "scratch": str(self.scratch), "device": "cuda:0" if self.device.type == "cuda" else "cpu",  # all it sees
            "threads": self.threads, "repeats": self.settings.repeats, **more,
        }  # fmt: skip

    def child(self, variant: Variant, partial: Callable[[dict], object] | None = None, **more: Any) -> dict:
        """Result of a job in a process of its own; see process.run_child."""
        return run_child(self.job(variant, **more), variant.program, self.device, partial)

    def child_rows(self, rows: list[dict], variant: Variant, rows_of: Callable[[dict], dict[str, dict]], **job) -> None:
        """Append a job's rows as they come in, so that those of a run that is stopped are not lost.

        Args:
            rows: all rows of this measurement.
            variant: what is measured.
            rows_of: a result, perhaps partial -> its rows by the names given to expect().
            job: see job().
        """
        before = list(rows)

        def keep(result: dict) -> None:
            new = rows_of(result)
            rows[:] = [*before, *new.values()]
            self.measured(new)

        keep(self.child(variant, keep, **job))


def _short_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)
