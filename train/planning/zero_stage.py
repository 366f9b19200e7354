"""Which ZeRO stage and how much offloading: the fastest that fits, with all figures and the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from modelscope_dolly.errors import HardwareError, SettingError
from train.config import NO_SPLIT_ADAPTERS
from train.planning.hardware import Hardware, gib
from train.planning.memory import GIB, PROCESS, Job, activations, model_states, update_bytes

#: What must stay free of the memory: 10 % for fragmentation, 1.5 GiB for DeepSpeed's buckets.
SPARE_SHARE, SPARE = 0.1, int(1.5 * GIB)
#: Rank of the adapters that are proposed when training all weights does not fit.
LORA_RANK = 16
_OFFLOAD_SUFFIX = {"none": "", "optimizer": " + optimizer offload", "all": " + full offload"}


@dataclass(frozen=True)
class Candidate:
    """One setting and the bytes it needs, without spare: on each GPU, and in host memory for all ranks."""

    stage: int
    offload: str
    gpu: int
    host: int
    fits: bool
    why: str

    @property
    def name(self) -> str:
        return f"z{self.stage}{_OFFLOAD_SUFFIX[self.offload]}"


@dataclass(frozen=True)
class ZeroChoice:
    """The setting that was taken, why, and all that were considered; `recompute`: activation checkpointing."""

    taken: Candidate
    hardware: Hardware
    dtype: str
    dtype_reason: str
    reason: str
    candidates: tuple[Candidate, ...]
    recompute: bool

    @property
    def stage(self) -> int:
        return self.taken.stage

    @property
    def offload(self) -> str:
        return self.taken.offload

    @property
    def fits(self) -> bool:
        return self.taken.fits


def choose(
    job: Job,
    hardware: Hardware,
    zero_stage: str = "auto",
    offload: str = "auto",
    dtype: str = "auto",
    recompute: str = "true",
) -> ZeroChoice:
    """The first setting that fits with its spare, from the fastest to the smallest.

    `zero_stage` ("0" to "3") and `offload` ("none", "optimizer", "all") restrict the settings that are considered; if
    none of these fits, the smallest is taken anyway, with `fits` False.

    `recompute` says whether activations are recomputed: "true", "false", or "auto", which chooses the setting as if
    they were, and then stores them where they fit into what is left: that saves a quarter of a pass's arithmetic.

    Raises:
        HardwareError: nothing was requested and nothing fits.
        SettingError: the stage does not support that offload, or there is no GPU to offload from.
    """
    dtype, dtype_reason = number_type(hardware, dtype)
    job = replace(job, checkpoint_activations=recompute != "false")
    settings = _settings(hardware, zero_stage, offload, bool(job.lora_rank))
    candidates = tuple(_candidate(job, hardware, dtype, *setting) for setting in settings)
    shared = hardware.gpus > 1 and zero_stage == "auto"
    if shared and candidates[0].stage == 0 and candidates[0].fits:
        # Sharing optimizer states costs no communication: arXiv:1910.02054, section 7.
        skipped = replace(candidates[0], why="fits, but z1 communicates no more and takes less")
        candidates = (skipped, *candidates[1:])
    taken = next((row for row in candidates if row.fits and not (shared and row.stage == 0)), None)
    if taken is not None:
        reason = _reason(taken, candidates, hardware)
    elif zero_stage == offload == "auto":
        raise HardwareError(_nothing_fits(job, hardware, dtype, candidates))
    else:
        taken = _least(candidates, hardware)
        requested = {"zero_stage": zero_stage, "offload": offload}
        names = " and ".join(f"{key} {value}" for key, value in requested.items() if value != "auto")
        reason = f"{names} was asked for, but does not fit: {taken.why}"
    if recompute == "auto" and taken.fits:
        storing = _candidate(replace(job, checkpoint_activations=False), hardware, dtype, taken.stage, taken.offload)
        if storing.fits:
            candidates = tuple(storing if row == taken else row for row in candidates)
            note = f"activations fit without being recomputed: {_figures(storing, hardware)}"
            return ZeroChoice(storing, hardware, dtype, dtype_reason, f"{reason}; {note}", candidates, False)
    return ZeroChoice(taken, hardware, dtype, dtype_reason, reason, candidates, job.checkpoint_activations)


def number_type(hardware: Hardware, requested: str = "auto") -> tuple[str, str]:
    """Number type of forward and backward, and why."""
    if requested != "auto":
        slow = requested == "bf16" and not hardware.computes_bf16 and not hardware.cpu_only
        return requested, f"asked for, though {hardware.name} only emulates it" if slow else "asked for"
    if hardware.cpu_only:
        return "fp32", "no GPU"
    if hardware.computes_bf16:
        return "bf16", f"{hardware.name} computes it"
    return "fp16", f"{hardware.name} has no bfloat16; fp16 needs loss scaling"


def _settings(hardware: Hardware, zero_stage: str, offload: str, adapters: bool = False) -> list[tuple[int, str]]:
    """(stage, offload) to consider, fastest first."""
    if adapters and (zero_stage == "3" or offload == "all"):
        asked = "zero_stage is '3'" if zero_stage == "3" else "offload is 'all'"
        raise SettingError(f"{asked}, but {NO_SPLIT_ADAPTERS}")
    if hardware.cpu_only:
        if offload not in ("auto", "none"):
            raise SettingError(f"offload is {offload!r}, but there is no GPU to move anything from: set it to none")
        return [(0 if zero_stage == "auto" else int(zero_stage), "none")]
    settings = [(0, "none"), (1, "none"), (2, "none"), (3, "none")]
    settings += [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
    if zero_stage == "auto":
        settings.remove((1, "optimizer"))
        if hardware.gpus > 1 and offload == "auto":
            # Stage 3 shares its weights too, and the host's optimizer is the slow part.
            settings.remove((2, "optimizer"))
    settings = [
        (stage, where) for stage, where in settings if zero_stage in ("auto", str(stage)) and offload in ("auto", where)
    ]
    if adapters:
        settings = [(stage, where) for stage, where in settings if stage < 3]
    if not settings:
        needed = "3" if offload == "all" else "1, 2 or 3"
        raise SettingError(f"offload {offload!r} needs zero_stage {needed}, not {zero_stage}")
    return settings


def _candidate(job: Job, hardware: Hardware, dtype: str, stage: int, offload: str) -> Candidate:
    ranks = hardware.ranks
    held = model_states(job.parameters, stage, ranks, offload, dtype, job.adapters, job.largest, job.frozen(dtype))
    live = activations(job.config, job.tokens, job.checkpoint_activations, job.label_tokens, dtype).total
    live += job.widened(dtype)
    if stage == 0 and ranks == 1 and dtype != "fp32":
        live += 2 * job.trained  # autocast, which computes without DeepSpeed, keeps its copies of float32 weights
    gpu, host = held.gpu + max(live, update_bytes(job.trained, stage, ranks, offload, dtype)), held.host
    if hardware.cpu_only:
        gpu, host = 0, (gpu + PROCESS) * ranks
    why = "; ".join(
        f"needs {gib(need)} {where} with spare, {gib(free)} are free"
        for need, free, where in _needs(gpu, host, hardware)
        if free is not None and need > free
    )
    return Candidate(stage, offload, gpu, host, not why, why)


def _needs(gpu: int, host: int, hardware: Hardware) -> list[tuple[int, int | None, str]]:
    """(bytes with spare, bytes free, where), without what needs nothing."""
    both = ((gpu, hardware.gpu_memory, "per GPU"), (host, hardware.host_memory, "of host memory"))
    return [(with_spare(need), free, where) for need, free, where in both if need]


def with_spare(need: int) -> int:
    """Bytes that must be free for `need` bytes."""
    return int(need * (1 + SPARE_SHARE)) + SPARE if need else 0


def _figures(row: Candidate, hardware: Hardware) -> str:
    needs = _needs(row.gpu, row.host, hardware)
    text = "; ".join(f"{gib(need)} {where} with spare, {gib(free)} free" for need, free, where in needs)
    return text.replace("not stated free", "free memory not stated")


def _reason(taken: Candidate, candidates: Sequence[Candidate], hardware: Hardware) -> str:
    if hardware.cpu_only:
        return f"no GPU: one process without sharding; {_figures(taken, hardware)}"
    before = ", ".join(row.name for row in candidates[: candidates.index(taken)] if not row.fits)
    alone = "one GPU has nothing to share with, so z0 to z2 take the same; " if hardware.gpus == 1 else ""
    return f"{alone}{f'{before} too large; ' if before else ''}{_figures(taken, hardware)}"


def _least(candidates: Sequence[Candidate], hardware: Hardware) -> Candidate:
    """Of the candidates that fit on the GPU the one that takes least of the host, else the smallest on the GPU."""
    on_gpu = [row for row in candidates if with_spare(row.gpu) <= hardware.gpu_memory]
    return min(on_gpu, key=lambda row: row.host) if on_gpu else min(candidates, key=lambda row: row.gpu)


def _nothing_fits(job: Job, hardware: Hardware, dtype: str, candidates: Sequence[Candidate]) -> str:
    least = _least(candidates, hardware)
    advice = "a smaller model" if hardware.cpu_only else "a smaller model or more GPUs"
    if not job.lora_rank:
        for bits in (None, 4):
            value = f"{{r: {LORA_RANK}{f', bits: {bits}' if bits else ''}}}"
            adapters = _first_that_fits(replace(job, lora_rank=LORA_RANK, lora_bits=bits), hardware, dtype)
            if adapters is not None:
                advice = f"lora: {value}, which fits ({_figures(adapters, hardware)}); or {advice}"
                break
        else:
            advice += f" (lora: {value} does not fit either)"
    elif job.lora_bits != 4 and (adapters := _first_that_fits(replace(job, lora_bits=4), hardware, dtype)):
        advice = f"lora with bits: 4, which fits ({_figures(adapters, hardware)}); or {advice}"
    return f"training does not fit on {hardware}: at the least, {least.name} {least.why}. Change first: {advice}"


def _first_that_fits(job: Job, hardware: Hardware, dtype: str) -> Candidate | None:
    try:
        return choose(job, hardware, dtype=dtype).taken
    except HardwareError:
        return None


def table(choice: ZeroChoice) -> str:
    """All candidates for people, one row each; an arrow marks the one that was taken."""
    hardware = choice.hardware
    width = max(len(row.name) for row in choice.candidates)
    on_gpu = "" if hardware.cpu_only else f"{gib(hardware.gpu_memory)} free per GPU, "
    lines = [
        f"{hardware}: {on_gpu}free host memory {gib(hardware.host_memory)}",
        f"number type: {choice.dtype} ({choice.dtype_reason})",
        "",
        f"   {'setting':<{width}}{'per GPU':>12}{'with spare':>12}{'host':>12}{'with spare':>12}   fits",
    ]
    for row in choice.candidates:
        needs = (row.gpu, with_spare(row.gpu), row.host, with_spare(row.host))
        sizes = "".join(f"{gib(size) if size else '-':>12}" for size in needs)
        verdict = "yes" if row.fits else "no"
        mark = "->" if row == choice.taken else "  "
        lines.append(f"{mark} {row.name:<{width}}{sizes}   {verdict}{f': {row.why}' if row.why else ''}")
    return "\n".join([*lines, "", f"taken: {choice.taken.name} ({choice.reason})"])
