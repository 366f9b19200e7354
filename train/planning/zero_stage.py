"""Which ZeRO stage and how much offloading: the fastest that fits, with all figures and the reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from modelscope_dolly.checkpoint.memory import SHAPES, shape_config
from modelscope_dolly.errors import HardwareError, SettingError, unknown_name
from modelscope_dolly.files import free_disk
from modelscope_dolly.hardware import choose_dtype, free_memory
from train.planning.memory import GIB, Job, activations, states, update

#: name -> (computes bfloat16, keeps error-correction bits in its memory). GDDR6 cards of data centers give 1/16 of
#: their memory to those bits (an A10 of 24 GiB reports 22.5); HBM has its own, and an RTX 4090 has them switched off.
CARDS = {
    "A10-24G": (True, True),
    "A100-40G": (True, False),
    "A100-80G": (True, False),
    "H100-80G": (True, False),
    "H200-141G": (True, False),
    "L4-24G": (True, True),
    "L40S-48G": (True, True),
    "RTX4090-24G": (True, False),
    "T4-16G": (False, True),
    "V100-16G": (False, False),
    "V100-32G": (False, False),
}
#: How the names of cards older than Ampere begin, for cards that are not listed.
_OLD = ("GTX", "K80", "M40", "P100", "P40", "RTX20", "T4", "TITAN", "V100")
#: GiB of a card that a job cannot have: driver, CUDA context, NCCL. Only for cards that are described by name.
RESERVE = 1.5
#: What must stay free of the memory that is there: 10 % for fragmentation, 1.5 GiB for DeepSpeed's buckets.
SPARE_SHARE, SPARE = 0.1, int(1.5 * GIB)

OFFLOAD_NAMES = {"none": "", "optimizer": " + optimizer offload", "all": " + full offload"}
#: What the documentation's table shows.
DOCUMENTED = ("1xH100-80G", "8xA100-80G", "8xA100-40G", "4xA10-24G", "8xV100-32G")
#: Rank of the adapters that are proposed when training all weights does not fit.
LORA_RANK = 16


def gib(count: float | None) -> str:
    """Bytes as GiB (2^30), the unit of GPU memory; one digit."""
    return "not stated" if count is None else f"{count / GIB:.1f} GiB"


@dataclass(frozen=True)
class Hardware:
    """One machine. Bytes that are free; None where the user did not say, which is taken as enough."""

    name: str
    gpus: int
    gpu_memory: int
    host_memory: int | None
    disk: int | None
    computes_bf16: bool

    @property
    def cpu_only(self) -> bool:
        return self.gpus == 0

    @classmethod
    def here(cls, output_dir: str | Path) -> Hardware:
        """This machine; of several GPUs the one with the least free memory counts."""
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return cls(
            name=torch.cuda.get_device_name(devices[0]) if devices else "CPU",
            gpus=len(devices),
            gpu_memory=min(map(free_memory, devices), default=0),
            host_memory=free_memory(),
            disk=free_disk(output_dir),
            computes_bf16=bool(devices) and all(choose_dtype(device).value == torch.bfloat16 for device in devices),
        )

    @classmethod
    def of_process(cls, output_dir: str | Path, local_rank: int, world: int, local_world: int) -> Hardware:
        """What one of `world` processes, `local_world` of them on each machine, sees of all of it.

        It looks at its own GPU only, because a look opens a context on it, and at how large that is instead of what is
        free just now, because all processes must come to the same choice.
        """
        nodes = max(1, world // max(1, local_world))
        host = free_memory() * nodes
        if not torch.cuda.is_available():
            return cls("CPU", 0, 0, host, free_disk(output_dir), False)
        device = torch.device("cuda", local_rank)
        size = torch.cuda.get_device_properties(device).total_memory
        computes_bf16 = choose_dtype(device).value == torch.bfloat16
        name = torch.cuda.get_device_name(device)
        return cls(name, world, size - int(RESERVE * GIB), host, free_disk(output_dir), computes_bf16)

    @classmethod
    def parse(cls, text: str) -> Hardware:
        """Hardware that is not here: `8xA100-80G`, `4xNAME-24G,host=512G,disk=2T`, `cpu,host=64G`.

        G is 2^30 bytes, T is 2^40; `host` and `disk` are what is free there.

        Raises:
            SettingError: unknown card, or something that cannot be read.
        """
        first, *rest = text.upper().replace(" ", "").split(",")
        sizes = {"HOST": None, "DISK": None}
        for part in rest:
            match = re.fullmatch(r"(HOST|DISK)=(\d+)([GT])", part)
            if match is None:
                raise SettingError(f"hardware {text!r}: {part.lower()!r} must look like host=512G or disk=2T")
            sizes[match[1]] = int(match[2]) * GIB * (1024 if match[3] == "T" else 1)
        if first == "CPU":
            return cls("CPU", 0, 0, sizes["HOST"], sizes["DISK"], False)
        count, name = re.fullmatch(r"(?:(\d+)X)?(.*)", first).groups()
        nominal = re.fullmatch(r".+-(\d+)G", name)
        if nominal is None or int(nominal[1]) <= 2 * RESERVE or (count and int(count) == 0):
            raise SettingError(f"hardware {text!r}: {unknown_name('GPU', name, (*CARDS, 'NxNAME-NNG', 'cpu'))}")
        computes_bf16, corrects = CARDS.get(name, (not name.startswith(_OLD), True))
        usable = int(nominal[1]) * (15 / 16 if corrects else 1) - RESERVE
        return cls(name, int(count or 1), int(usable * GIB), sizes["HOST"], sizes["DISK"], computes_bf16)

    def __str__(self) -> str:
        """As `parse` reads it, if the name is one it knows."""
        options = (("host", self.host_memory), ("disk", self.disk))
        stated = "".join(f",{key}={size // GIB}G" for key, size in options if size is not None)
        return ("cpu" if self.cpu_only else f"{self.gpus}x{self.name}") + stated


@dataclass(frozen=True)
class Candidate:
    """One setting and what it takes in bytes, without spare: on each GPU, and in host memory for all ranks."""

    stage: int
    offload: str
    gpu: int
    host: int
    fits: bool
    why: str

    @property
    def name(self) -> str:
        return f"z{self.stage}{OFFLOAD_NAMES[self.offload]}"


@dataclass(frozen=True)
class Choice:
    """The setting that was taken, why, and all that were considered; `recompute`: activations, in the backward pass."""

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
) -> Choice:
    """The first setting that fits with its spare, from the fastest to the smallest.

    `zero_stage` ("0" to "3") and `offload` ("none", "optimizer", "all") restrict the settings that are considered; if
    none of these fits, the smallest is taken all the same, with `fits` False.

    `recompute` says whether activations are recomputed: "true", "false", or "auto", which chooses the setting as if
    they were, and then keeps them where they fit into what is left: that saves a quarter of a pass's arithmetic.

    Raises:
        HardwareError: nothing was asked for and nothing fits.
        SettingError: the stage cannot be offloaded so, or there is no GPU to offload from.
    """
    dtype, dtype_reason = number_type(hardware, dtype)
    job = replace(job, checkpoint_activations=recompute != "false")
    settings = _settings(hardware, zero_stage, offload)
    candidates = tuple(_candidate(job, hardware, dtype, stage, where) for stage, where in settings)
    shared = hardware.gpus > 1 and zero_stage == "auto"
    if shared and candidates[0].stage == 0 and candidates[0].fits:
        # Sharing optimizer states costs no communication: arXiv:1910.02054, section 7.
        passed = replace(candidates[0], why="fits, but z1 communicates no more and takes less")
        candidates = (passed, *candidates[1:])
    taken = next((row for row in candidates if row.fits and not (shared and row.stage == 0)), None)
    if taken is not None:
        reason = _reason(taken, candidates, hardware)
    elif zero_stage == offload == "auto":
        raise HardwareError(_nothing_fits(job, hardware, dtype, candidates))
    else:
        taken = _least(candidates, hardware)
        asked = [
            f"{key} {value}" for key, value in (("zero_stage", zero_stage), ("offload", offload)) if value != "auto"
        ]
        reason = f"{' and '.join(asked)} was asked for, but does not fit: {taken.why}"
    if recompute == "auto" and taken.fits:
        keeping = replace(job, checkpoint_activations=False)
        kept = _candidate(keeping, hardware, dtype, taken.stage, taken.offload)
        if kept.fits:
            candidates = tuple(kept if row == taken else row for row in candidates)
            note = f"activations fit without being recomputed: {_figures(kept, hardware)}"
            return Choice(kept, hardware, dtype, dtype_reason, f"{reason}; {note}", candidates, False)
    return Choice(taken, hardware, dtype, dtype_reason, reason, candidates, job.checkpoint_activations)


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


def _settings(hardware: Hardware, zero_stage: str, offload: str) -> list[tuple[int, str]]:
    """(stage, offload) to consider, fastest first."""
    if hardware.cpu_only:
        if offload not in ("auto", "none"):
            raise SettingError(f"offload is {offload!r}, but there is no GPU to move anything from: set it to none")
        return [(0 if zero_stage == "auto" else int(zero_stage), "none")]
    known = [(0, "none"), (1, "none"), (2, "none"), (3, "none")]
    known += [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
    if zero_stage == "auto":
        known.remove((1, "optimizer"))
        if hardware.gpus > 1 and offload == "auto":
            known.remove((2, "optimizer"))  # stage 3 shares its weights too, and the host's optimizer is the slow part
    found = [row for row in known if zero_stage in ("auto", str(row[0])) and offload in ("auto", row[1])]
    if not found:
        needed = "3" if offload == "all" else "1, 2 or 3"
        raise SettingError(f"offload {offload!r} needs zero_stage {needed}, not {zero_stage}")
    return found


def _candidate(job: Job, hardware: Hardware, dtype: str, stage: int, offload: str) -> Candidate:
    ranks = max(1, hardware.gpus)
    held = states(job.parameters, stage, ranks, offload, dtype, job.adapters, job.largest)
    live = activations(job.config, job.tokens, job.checkpoint_activations, job.label_tokens, dtype).total
    if stage == 0 and ranks == 1 and dtype != "fp32":
        live += 2 * job.trained  # autocast, which computes without DeepSpeed, keeps its copies of float32 weights
    gpu, host = held.gpu + max(live, update(job.trained, stage, ranks, offload, dtype)), held.host
    if hardware.cpu_only:
        gpu, host = 0, gpu
    why = []
    if with_spare(gpu) > hardware.gpu_memory and not hardware.cpu_only:
        why.append(f"needs {gib(with_spare(gpu))} per GPU with spare, {gib(hardware.gpu_memory)} are free")
    if host and hardware.host_memory is not None and with_spare(host) > hardware.host_memory:
        why.append(f"needs {gib(with_spare(host))} of host memory with spare, {gib(hardware.host_memory)} are free")
    return Candidate(stage, offload, gpu, host, not why, "; ".join(why))


def with_spare(need: int) -> int:
    """What must be free for this need."""
    return int(need * (1 + SPARE_SHARE)) + SPARE if need else 0


def _figures(row: Candidate, hardware: Hardware) -> str:
    parts = []
    if not hardware.cpu_only:
        parts.append(f"{gib(with_spare(row.gpu))} per GPU with spare, {gib(hardware.gpu_memory)} free")
    if row.host:
        parts.append(f"{gib(with_spare(row.host))} of host memory with spare, {gib(hardware.host_memory)} free")
    return "; ".join(parts).replace("not stated free", "free memory not stated")


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
        adapters = _try(replace(job, lora_rank=LORA_RANK), hardware, dtype)
        if adapters is None:
            advice += f" (lora: {{r: {LORA_RANK}}} does not fit either)"
        else:
            advice = f"lora: {{r: {LORA_RANK}}}, which fits ({_figures(adapters, hardware)}); or {advice}"
    return f"training does not fit on {hardware}: at the least, {least.name} {least.why}. Change first: {advice}"


def table(choice: Choice) -> str:
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


def check_disk(need: int, hardware: Hardware, keep: int) -> str:
    """What the run will have on disk, against what is free. Raises HardwareError when that is too little."""
    text = f"up to {gib(need)} on disk ({keep} checkpoints kept, one being written, the final model)"
    if hardware.disk is not None and need > hardware.disk:
        raise HardwareError(
            f"the run needs {text}, but {gib(hardware.disk)} are free: lower keep_checkpoints or change output_dir"
        )
    return f"{text}; free: {gib(hardware.disk)}"


def hardware_table(machines: Sequence[str] = DOCUMENTED, sizes: Sequence[str] = tuple(SHAPES)) -> str:
    """Markdown for the documentation: what is chosen for each size on each machine, and its need without spare."""
    lines = [f"| hardware | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    jobs = [Job(shape_config(size)) for size in sizes]
    for text in machines:
        cells = [_cell(job, Hardware.parse(text)) for job in jobs]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(job: Job, hardware: Hardware) -> str:
    """What is chosen; where that leaves the GPU, what LoRA takes as well."""
    full, adapters = _try(job, hardware), _try(replace(job, lora_rank=LORA_RANK), hardware)
    parts = [f"{full.name}: {_need(full)}"] if full else []
    if adapters and (full is None or full.offload != "none"):
        parts.append(f"LoRA {adapters.name}: {_need(adapters)}")
    return "; or ".join(parts) or "does not fit"


def _need(row: Candidate) -> str:
    return ", ".join([gib(row.gpu)] * (row.gpu > 0) + [f"host {gib(row.host)}"] * (row.host > 0))


def _try(job: Job, hardware: Hardware, dtype: str = "auto") -> Candidate | None:
    try:
        return choose(job, hardware, dtype=dtype).taken
    except HardwareError:
        return None
