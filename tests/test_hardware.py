"""Device, number type and memory: each choice on machines that are not here, through torch's own queries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from modelscope_dolly import hardware
from modelscope_dolly.errors import HardwareError, SettingError
from modelscope_dolly.hardware import (
    DTYPES,
    Choice,
    choose_device,
    choose_dtype,
    cpu_computes_bf16,
    free_memory,
    parse_dtype,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """Pretend to have `count` CUDA devices of one kind."""

    def pretend(count: int, capability: tuple[int, int] = (8, 0), name: str = "NVIDIA A100") -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return pretend


@pytest.fixture
def cpu(monkeypatch):
    """Pretend to have a CPU with these instructions and so much free memory."""

    def pretend(flags: set[str], free: float = 1e15) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True), raising=False)
        monkeypatch.setattr(hardware, "free_memory", lambda device=None: int(free))

    return pretend


def check(choice: Choice, value: object, reason: str) -> None:
    assert isinstance(choice, Choice) and choice.value == value
    assert reason in choice.reason
    assert str(choice) == f"{value} ({choice.reason})"


@pytest.mark.parametrize(
    ("requested", "device", "reason"),
    [
        (None, "cuda:0", "first CUDA device"),
        ("", "cuda:0", "first CUDA device"),
        ("gpu", "cuda:0", "first CUDA device"),
        ("gpu:0", "cuda:0", "asked for"),
        ("gpu:1", "cuda:1", "asked for"),
        ("cuda", "cuda:0", "asked for"),
        ("CUDA:1", "cuda:1", "asked for"),
        (torch.device("cuda", 1), "cuda:1", "asked for"),
        ("cpu", "cpu", "asked for"),
        (torch.device("cpu"), "cpu", "asked for"),
    ],
)
def test_devices_of_a_machine_with_two_gpus(cuda, requested, device, reason):
    cuda(2)
    check(choose_device(requested), torch.device(device), reason)


@pytest.mark.parametrize("requested", [None, "gpu", "GPU"])
def test_gpu_without_number_falls_back_to_the_cpu_and_says_why(cuda, requested):
    cuda(0)
    check(choose_device(requested), CPU, "no CUDA device")


@pytest.mark.parametrize(
    ("count", "requested", "found", "remedy"),
    [
        (0, "cuda", "no CUDA device", "cpu"),
        (0, "cuda:0", "no CUDA device", "cpu"),
        (0, "gpu:0", "no CUDA device", "cpu"),
        (1, "cuda:1", "1 CUDA device", "cuda:0"),
        (2, "gpu:2", "2 CUDA devices", "cuda:0"),
        (4, torch.device("cuda", 31), "4 CUDA devices", "cuda:0"),
    ],
)
def test_a_named_gpu_that_is_not_here_is_an_error_with_the_count(cuda, count, requested, found, remedy):
    cuda(count)
    with pytest.raises(HardwareError) as caught:
        choose_device(requested)
    message = str(caught.value)
    assert f"device '{requested}' was asked for, but this machine shows {found}" in message
    assert message.endswith(f"use device='{remedy}'")
    assert ("built without CUDA" in message) == (torch.version.cuda is None)


@pytest.mark.parametrize("requested", ["tpu", "cuda:", "cuda:x", "cuda:-1", "xcuda:0", "cuda:0,1", 1])
def test_an_unknown_kind_of_device_is_an_error(requested):
    with pytest.raises(SettingError, match=f"unknown device {requested!r}.*Allowed: cpu, cuda"):
        choose_device(requested)


@pytest.mark.parametrize("requested", ["mps", "MPS:0", torch.device("mps")])
def test_an_apple_gpu_is_an_error_that_names_the_cpu(requested):
    with pytest.raises(HardwareError, match=r"'mps(:0)?' was asked for, but Apple GPUs .*use device='cpu'"):
        choose_device(requested)


ALIASES = {
    torch.bfloat16: ["bf16", "bfloat16", "torch.bfloat16", "BF16", torch.bfloat16],
    torch.float16: ["fp16", "float16", "half", "torch.float16", "torch.half", "FP16", torch.float16, torch.half],
    torch.float32: ["fp32", "float32", "float", "torch.float32", "Float32", torch.float32, torch.float],
}


@pytest.mark.parametrize("dtype", ALIASES)
def test_every_spelling_of_a_dtype_is_understood(dtype):
    for name in ALIASES[dtype]:
        assert parse_dtype(name) is dtype, name
        check(choose_dtype(CPU, name), dtype, "asked for")


def test_every_known_dtype_is_tested_here():
    assert set(ALIASES) == set(DTYPES.values())


@pytest.mark.parametrize("name", ["int8", "bf-16", "", torch.float64, 16])
def test_an_unknown_dtype_is_an_error_that_lists_those_there_are(name):
    with pytest.raises(SettingError, match=f"unknown dtype '?{name}'?.*Allowed: auto, bf16, fp16, fp32"):
        parse_dtype(name)


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "reason"),
    [
        ((7, 0), "Tesla V100", torch.float16, "Tesla V100 (compute capability 7.0) has no bfloat16"),
        ((7, 5), "Tesla T4", torch.float16, "Tesla T4 (compute capability 7.5) has no bfloat16"),
        ((8, 0), "NVIDIA A100", torch.bfloat16, "NVIDIA A100 computes it"),
        ((8, 9), "NVIDIA L4", torch.bfloat16, "NVIDIA L4 computes it"),
        ((12, 0), "NVIDIA RTX 5090", torch.bfloat16, "NVIDIA RTX 5090 computes it"),
    ],
)
def test_a_gpu_gets_bfloat16_where_its_tensor_cores_know_it(cuda, capability, name, dtype, reason):
    cuda(1, capability, name)
    for requested in (None, "auto"):
        check(choose_dtype(CUDA, requested, 4e12), dtype, reason)
    check(choose_dtype(CUDA, "fp32"), torch.float32, "asked for")


@pytest.mark.parametrize("flag", ["avx512_f", "avx512_bf16", "amx_bf16", "bf16"])
def test_any_cpu_gets_float32_where_it_fits_and_bfloat16_where_not(cpu, flag):
    cpu({"avx2", flag}, free=100e9)
    check(choose_dtype(CPU), torch.float32, "exact")
    check(choose_dtype(CPU, None, 48e9, "; packed"), torch.float32, "exact; packed")
    check(choose_dtype(CPU, None, 96e9), torch.bfloat16, "float32 needs 96.00 GB, 100.00 GB of memory are")
    check(choose_dtype(CPU, "fp32", 96e9), torch.float32, "asked for")


def test_the_cpu_of_this_machine_is_read():
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("no /proc/cpuinfo to compare with")
    flags = set(cpuinfo.read_text().split())
    assert cpu_computes_bf16() == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def test_free_memory_is_what_the_container_leaves(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=50 * 10**9))
    for limit, free in ((None, 50), (8, 8), (80, 50), (0, 0)):
        monkeypatch.setattr(hardware, "_cgroup_limit", lambda limit=limit: None if limit is None else limit * 10**9)
        assert free_memory() == free_memory(CPU) == free * 10**9


def test_free_memory_of_a_gpu_is_that_of_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * 10**9, 80 * 10**9))
    assert free_memory(CUDA) == 7 * 10**9


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.current": "300\n"}, 700),
        ({"memory.max": "1000\n", "memory.current": "1300\n"}, 0),
        ({"memory.max": "max\n", "memory.current": "300\n"}, None),
        ({"memory.max": "1000\n"}, None),
        ({"memory.max": "1000\n", "memory.current": "?\n"}, None),
        ({}, None),
    ],
)
def test_the_memory_limit_of_a_control_group_is_read(tmp_path, monkeypatch, files, left):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(hardware, "Path", lambda *parts: tmp_path if parts == ("/sys/fs/cgroup",) else Path(*parts))
    assert hardware._cgroup_limit() == left


def test_threads_are_lowered_to_the_cores_of_this_process_and_never_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for cores, value in ((2, 2), (4, 4), (64, 4)):
        monkeypatch.setattr(hardware, "available_cores", lambda cores=cores: cores)
        assert hardware.choose_threads().value == value
    assert hardware.choose_threads(9).value == 9
    for wrong in (0, -1, True, 1.5, "2"):
        with pytest.raises(SettingError, match=r"threads is .*, it must be a whole number from 1 to \d+"):
            hardware.choose_threads(wrong)


def test_cores_are_those_the_process_is_pinned_to(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert hardware.available_cores() == 1


@pytest.mark.parametrize("count", [1025, 20000, 40000, 10**30, 0, -1, True, 1.5, "2", [2]])
def test_more_threads_than_the_openmp_library_survives_are_refused(count, monkeypatch):
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2)
    with pytest.raises(SettingError, match=r"threads is .*, it must be a whole number from 1 to 1024"):
        hardware.choose_threads(count)


def test_threads_of_numpy_and_of_a_large_machine_are_taken(monkeypatch):
    monkeypatch.setattr(hardware.os, "cpu_count", lambda: 2000)
    monkeypatch.setattr(hardware, "_threads_that_start", lambda count: count)
    assert (
        hardware.choose_threads(np.int64(2000)).value == 2000
        and type(hardware.choose_threads(np.int64(2)).value) is int
    )


def test_threads_that_cannot_be_started_are_refused_with_the_number_that_can():
    """In a process whose threads need more address space than it has: as with a limit of processes, none starts."""
    program = (
        "import resource, torch; from modelscope_dolly.hardware import choose_threads; choose_threads(4)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "choose_threads(500)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "SettingError: threads is 500, but this process may start only" in done.stderr, done.stderr


@pytest.mark.skipif(not hardware._omp_pause(), reason="torch computes with another OpenMP runtime than GNU's here")
def test_a_thread_that_waits_has_no_openmp_threads_and_computes_again_with_new_ones():
    counts, before = [], torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(3)
        numbers = torch.arange(1 << 20, dtype=torch.float64)
        for release in (False, True, False):
            if release:
                hardware.release_threads()
            else:
                assert numbers.mul(2).sum() == (1 << 20) * ((1 << 20) - 1)
            counts.append(len(os.listdir("/proc/self/task")))
        hardware.release_threads()
        torch.set_num_threads(before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts[0] - counts[1] == 2 and counts[2] == counts[0]
