"""Which engines and formats `dolly bench` compares, and which peers are missing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.benchmark import peers
from modelscope_dolly.benchmark.bench_options import PEERS
from modelscope_dolly.benchmark.bench_run import Variant
from modelscope_dolly.benchmark.process import progress
from modelscope_dolly.checkpoint.memory import FORMATS, weight_bytes
from modelscope_dolly.errors import DollyError
from modelscope_dolly.files import gigabytes
from modelscope_dolly.hardware import free_memory

if TYPE_CHECKING:
    from modelscope_dolly.benchmark.bench_run import BenchRun


def choose_variants(run: BenchRun) -> tuple[list[Variant], dict[str, str]]:
    """All that is measured, ours first; and the peers that are missing, with the reason."""
    variants, missing = run.variants(), {}
    # compilation takes minutes: only on request
    wanted = run.settings.peers if run.settings.peers is not None else [name for name in PEERS if name != "hf-compile"]
    for engine in wanted:
        program = run.settings.peer_python.get(engine)
        if reason := missing_reason(run, engine, program):
            missing[engine] = reason
        elif engine == "llamacpp":
            variants.append(Variant(engine, Path(run.settings.gguf).stem, run.dtypes[0], program))
        else:
            variants += [Variant(engine, name, name, program) for name in _formats(run, engine)]
    return variants, missing


def _formats(run: BenchRun, engine: str) -> list[str]:
    """The quantised formats asked for that the engine has, else the number types, else its own first format."""
    known = peers.FORMATS[engine]
    if run.device.type == "cuda":
        known = (*peers.GPU_FORMATS.get(engine, ()), *known)
    quantised = [] if engine.startswith("hf") else [name for name in run.settings.quantize if name in known]
    return quantised or [name for name in run.dtypes if name in known] or [known[0]]


def missing_reason(run: BenchRun, engine: str, program: str | None) -> str | None:
    """Why a peer cannot run here; None if it can."""
    if engine == "llamacpp":
        if program is None or run.settings.gguf is None:
            return "give --peer-python llamacpp=/path/llama-batched-bench and --gguf FILE"
        return None
    if engine == "hf-compile" and run.device.type == "cpu":
        return "its steps are compiled on a GPU only"
    progress(f"looking for {engine}")
    probe = [program, peers.__file__, f'{{"engine": "{engine}", "probe": true}}']
    if subprocess.run(probe, capture_output=True).returncode == 0:
        return None
    return f"not installed for {program}; install it there, or give --peer-python {engine}=/path/python"


def check_memory(run: BenchRun, variant: Variant) -> None:
    """A peer that does not fit would be killed by the system, and perhaps another process with it.

    On a GPU it fails with an error of its own, and no other process does.
    """
    if run.device.type != "cpu" or variant.engine in ("dolly", "llamacpp"):
        return
    kept = FORMATS[variant.dtype.replace("fp16", "bf16")]
    need, free = weight_bytes(run.config, kept.itemsize, kept.method), free_memory()
    if need > free:
        raise DollyError(f"the weights need {gigabytes(need)} in {variant.dtype}, {gigabytes(free)} are free")
