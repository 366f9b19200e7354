"""What training takes, against tensors and known figures, and which ZeRO stage is chosen for it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding

from modelscope_dolly.checkpoint.memory import shape_config
from modelscope_dolly.errors import HardwareError, SettingError
from tests.support.models import random_model, tiny_config
from tests.support.paths import ROOT
from train.planning.hardware import CARDS, Hardware, gib
from train.planning.memory import (
    GIB,
    PROCESS,
    Job,
    activations,
    checkpoint_bytes,
    disk_need,
    final_bytes,
    model_states,
    update_bytes,
)
from train.planning.zero_stage import LORA_RANK, Candidate, choose, number_type, table, with_spare

SETTINGS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all")]


@functools.cache
def job(size: str = "3b", **changes) -> Job:
    return Job(shape_config(size), **changes)


def held(size: str, stage: int, world: int, offload: str = "none", **changes):
    what = job(size, **changes)
    return model_states(what.parameters, stage, world, offload, "bf16", what.adapters, what.largest)


# GiB per GPU at 16 bytes per weight; 3b, 7b and 12b have 2.775, 6.856 and 11.842 billion.
@pytest.mark.parametrize(
    ("stage", "world", "offload", "expected"),
    [
        (0, 1, "none", (41.4, 102, 177)),
        (2, 4, "none", (14.2, 35.1, 60.7)),
        (3, 4, "none", (10.8, 26.3, 45.3)),
        (2, 8, "none", (9.7, 23.9, 41.4)),
        (3, 8, "none", (5.6, 13.5, 23.2)),
        (2, 1, "optimizer", (10.3, 25.5, 44.1)),
        (2, 4, "optimizer", (6.5, 16.0, 27.6)),
        (2, 8, "optimizer", (5.8, 14.4, 24.8)),
        (3, 8, "optimizer", (1.8, 4.0, 6.7)),
    ],
)
def test_states_per_gpu(stage, world, offload, expected):
    found = [held(size, stage, world, offload).gpu / GIB for size in ("3b", "7b", "12b")]
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("size", "host", "everything"), [("3b", 41.4, 46.5), ("7b", 102, 115), ("12b", 177, 199)])
def test_states_on_the_host_do_not_depend_on_the_ranks(size, host, everything):
    for world in (1, 8):
        assert held(size, 3, world).host == 0
        assert held(size, 3, world, "optimizer").host / GIB == pytest.approx(host, rel=0.01)
        assert held(size, 3, world, "all").host / GIB == pytest.approx(everything, rel=0.01)


def test_parameters_and_states_equal_those_of_a_network_and_its_optimizer():
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for weights in model.parameters():
        weights.grad = torch.zeros_like(weights)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    tensors = [*model.parameters(), *(weights.grad for weights in model.parameters()), *moments]
    what = Job(model.config)
    assert what.parameters == model.num_parameters()
    assert model_states(what.parameters, 0, 1, dtype="fp32").gpu == sum(t.numel() * t.element_size() for t in tensors)


def test_what_stage_3_gathers_is_the_largest_layer_or_embedding():
    for size, embedding in (("3b", True), ("7b", True), ("12b", False)):
        hidden = job(size).config.hidden_size
        assert job(size).largest == pytest.approx(50280 * hidden if embedding else 12 * hidden**2, rel=0.01)
    without = model_states(10**9, 3, 4)
    assert model_states(10**9, 3, 4, largest=10**6).gpu - without.gpu == 4 * 10**6


@pytest.mark.parametrize(("size", "millions", "gib"), [("3b", 21, 5.2), ("7b", 34, 12.8), ("12b", 47, 22.1)])
def test_lora_freezes_the_base_in_two_bytes(size, millions, gib):
    what = job(size, lora_rank=16)
    assert what.trained == what.adapters == pytest.approx(millions * 1e6, rel=0.02)
    found = held(size, 0, 1, lora_rank=16).gpu
    assert found == 2 * what.parameters + 16 * what.adapters
    assert found / GIB == pytest.approx(gib + 16 * what.adapters / GIB, rel=0.01)
    shared = (2 * (what.parameters + what.adapters) + 14 * what.adapters) / 4
    assert held(size, 3, 4, lora_rank=16).gpu == math.ceil(shared + 4 * what.largest)


def test_adapters_are_those_of_all_four_linears_and_the_rows_of_the_keys():
    model = random_model()
    linears = [m for m in model.gpt_neox.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * 3
    low_rank = sum(4 * (linear.in_features + linear.out_features) for linear in linears)
    assert Job(model.config, lora_rank=4).adapters == low_rank + 2 * 3 * model.config.hidden_size


def test_activations_of_a_micro_batch_of_2048_tokens():
    for size, inputs, total in (("3b", 0.31, 1.7), ("7b", 0.5, 1.95), ("12b", 0.70, 2.2)):
        found = activations(shape_config(size), 2048)
        assert found.inputs / GIB == pytest.approx(inputs, rel=0.02)
        assert found.logits / GIB == pytest.approx(1.15, rel=0.02)
        assert found.total / GIB == pytest.approx(total, rel=0.1)
    assert activations(shape_config("12b"), 2048, label_tokens=840).logits / GIB == pytest.approx(0.47, rel=0.02)


def test_activations_of_the_largest_padded_micro_batch_of_2023():
    found = activations(shape_config("12b"), 11_904)
    assert found.inputs / GIB == pytest.approx(4.1, rel=0.02) and found.logits / GIB == pytest.approx(6.7, rel=0.02)
    assert found.total / GIB == pytest.approx(4.1 + 1.9 + 6.7, rel=0.1)


def test_saved_activations_equal_those_of_transformers_layer():
    config = tiny_config(hidden_size=128, intermediate_size=512)
    config._attn_implementation = "sdpa"
    layer, tokens = GPTNeoXLayer(config, 0), 512
    x = torch.randn(1, tokens, 128, requires_grad=True)
    angles = GPTNeoXRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    kept, weights = {}, {weight.data_ptr() for weight in layer.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x, attention_mask=None, position_embeddings=angles)
    assert output is not None
    saved = sum(size for place, size in kept.items() if place not in weights)
    with_input = activations(config, tokens, checkpointing=False, dtype="fp32").inputs // config.num_hidden_layers
    assert saved == pytest.approx(with_input, rel=0.03)


def test_checkpointing_saves_activations_and_labels_bound_logits():
    config = shape_config("3b")
    assert activations(config, 2048, checkpointing=False).total > 4 * activations(config, 2048).total
    assert activations(config, 2048, label_tokens=5000) == activations(config, 2048)
    assert activations(config, 2048, label_tokens=0).logits == 0


def test_update_is_the_float32_gradient_of_what_a_rank_updates_at_once():
    assert update_bytes(8 * 10**9, 0, 4) == 32 * 10**9
    assert update_bytes(8 * 10**9, 2, 4) == 8 * 10**9
    assert update_bytes(8 * 10**9, 3, 4) == 4 * 10**9  # one sub-group
    assert update_bytes(8 * 10**9, 2, 4, offload="optimizer") == update_bytes(8 * 10**9, 2, 4, dtype="fp32") == 0


parameters = st.integers(10**6, 2 * 10**10)
adapters = st.one_of(st.just(0), st.integers(1, 10**6))
worlds = st.integers(1, 256)
largest = st.integers(0, 10**6)


@given(parameters, adapters, worlds, worlds, largest, st.sampled_from(SETTINGS[1:]), st.sampled_from(["bf16", "fp32"]))
def test_more_gpus_never_need_more_on_each(count, few, first, second, block, setting, dtype):
    small, large = sorted((first, second))
    stage, offload = setting
    needs = [model_states(count, stage, n, offload, dtype, few, block) for n in (small, large)]
    assert needs[1].gpu <= needs[0].gpu and needs[1].host == needs[0].host


@given(parameters, adapters, worlds, largest)
def test_a_higher_stage_never_needs_more_but_what_it_gathers(count, few, world, block):
    z0, z1, z2, z3 = (model_states(count, stage, world, adapters=few, largest=block).gpu for stage in range(4))
    assert z0 >= z1 >= z2 >= z3 - 4 * block


@given(parameters, adapters, worlds, largest, st.sampled_from(["bf16", "fp16", "fp32"]))
def test_offloading_never_needs_more_on_the_gpu(count, few, world, block, dtype):
    for stage in (1, 2, 3):
        none, optimizer = (
            model_states(count, stage, world, where, dtype, few, block) for where in ("none", "optimizer")
        )
        assert optimizer.gpu <= none.gpu and optimizer.host > none.host
    everything = model_states(count, 3, world, "all", dtype, few, block)
    assert everything.gpu <= optimizer.gpu and everything.host > optimizer.host


@given(st.integers(0, 4096), st.integers(0, 4096), st.booleans())
def test_more_tokens_never_need_less(first, second, checkpointing):
    small, large = sorted((first, second))
    config = tiny_config()
    assert activations(config, small, checkpointing).total <= activations(config, large, checkpointing).total


# Machines


@pytest.mark.parametrize("name", sorted(CARDS))
def test_known_cards_leave_less_than_their_nominal_memory(name):
    machine = Hardware.parse(f"8x{name}")
    nominal = int(name.rpartition("-")[2].removesuffix("G"))
    assert 0.84 * nominal < machine.gpu_memory / GIB < nominal
    assert machine.gpus == 8 and not machine.cpu_only and machine.host_memory is machine.disk is None
    assert machine.computes_bf16 == (not name.startswith(("V100", "T4")))


@given(
    st.integers(1, 64),
    st.sampled_from([*CARDS, "FOO-96G", "B200-180G", "P100-16G", "GTX1080TI-11G"]),
    st.one_of(st.none(), st.integers(0, 4096)),
    st.one_of(st.none(), st.integers(0, 9999)),
)
def test_text_of_a_machine_is_read_back_as_the_same(count, name, host, disk):
    text = f"{count}x{name}" + (f",host={host}G" if host is not None else "") + (f",disk={disk}G" if disk else "")
    machine = Hardware.parse(text)
    assert Hardware.parse(str(machine)) == machine and str(machine) == text
    assert machine.host_memory == (None if host is None else host * GIB)


@pytest.mark.parametrize(
    ("name", "gib"), [("A10-24G", 21.0), ("A100-80G", 78.5), ("RTX4090-24G", 22.5), ("X-24G", 21.0)]
)
def test_error_correction_and_the_reserve_are_taken_off(name, gib):
    assert Hardware.parse(name).gpu_memory == gib * GIB


def test_spellings_of_a_machine():
    assert Hardware.parse(" 1xh100-80g, host=1t ") == Hardware.parse("H100-80G,host=1024G")
    assert not Hardware.parse("2xP100-16G").computes_bf16 and Hardware.parse("2xB200-180G").computes_bf16
    assert Hardware.parse("cpu,host=64G").cpu_only and str(Hardware.parse("CPU,host=64G")) == "cpu,host=64G"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xA100", "Did you mean 'A100-"),
        ("", "Allowed: A10-24G"),
        ("0xA100-80G", "unknown GPU"),
        ("8x-80G", "unknown GPU"),
        ("FOO-1G", "unknown GPU"),
        ("8xA100-80G,host=lots", "'host=lots' must look like host=512G"),
        ("8xA100-80G,ram=64G", "'ram=64g' must look like"),
        ("8xA100-80G,", "must look like"),
        ("9" * 5000 + "xA100-80G", "unknown GPU"),
        ("\u0663xA100-80G", "unknown GPU"),
        ("FOO-" + "9" * 5000 + "G", "unknown GPU"),
        ("cpu,host=" + "9" * 5000 + "G", "must look like host=512G"),
    ],
)
def test_unreadable_machine_is_a_setting_error(text, said):
    with pytest.raises(SettingError, match=r"^[^\n]+$") as caught:
        Hardware.parse(text)
    assert said in str(caught.value)


def test_this_machine_without_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    machine = Hardware.here(tmp_path / "not" / "yet")
    assert machine.cpu_only and machine.gpu_memory == 0 and not machine.computes_bf16
    assert machine.host_memory > 0 and machine.disk > 0


@pytest.mark.parametrize(("capability", "bf16"), [((8, 0), True), ((7, 0), False)])
def test_of_several_gpus_the_fullest_counts(monkeypatch, tmp_path, capability, bf16):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0) if device.index else capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: ((5 - device.index) * GIB, 99 * GIB))
    machine = Hardware.here(tmp_path)
    assert (machine.gpus, machine.gpu_memory, machine.computes_bf16) == (3, 3 * GIB, bf16)
    assert str(machine).startswith("3xNVIDIA X,host=")


# The choice


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("1xH100-80G", ("z0", "z2 + optimizer offload", "z2 + optimizer offload")),
        ("8xA100-80G", ("z1", "z1", "z1")),
        ("8xA100-40G", ("z1", "z2", "z3")),
        ("4xA10-24G", ("z2", "z3 + optimizer offload", "z3 + optimizer offload")),
        ("8xV100-32G", ("z1", "z3", "z3 + optimizer offload")),
        ("1xRTX4090-24G", ("z2 + optimizer offload", "z3 + full offload", "z3 + full offload")),
    ],
)
def test_first_setting_that_fits_is_taken(machine, expected):
    hardware = Hardware.parse(machine)
    found = [choose(job(size), hardware) for size in ("3b", "7b", "12b")]
    assert tuple(choice.taken.name for choice in found) == expected
    for choice in found:
        assert choice.fits and with_spare(choice.taken.gpu) <= hardware.gpu_memory
        before = choice.candidates[: choice.candidates.index(choice.taken)]
        assert all(not row.fits or row.stage == 0 for row in before)
        assert all(row.fits or row.why for row in choice.candidates)


def test_order_of_the_candidates():
    shared = ["z0", "z1", "z2", "z3", "z3 + optimizer offload", "z3 + full offload"]
    assert [row.name for row in choose(job(), Hardware.parse("8xA100-80G")).candidates] == shared
    alone = [*shared[:4], "z2 + optimizer offload", *shared[4:]]
    assert [row.name for row in choose(job(), Hardware.parse("A100-80G")).candidates] == alone


def test_sharing_optimizer_states_is_preferred_to_copies_and_one_gpu_is_told_that_stages_share_nothing():
    choice = choose(job(), Hardware.parse("8xA100-80G"))
    assert choice.stage == 1 and choice.candidates[0].fits and "communicates no more" in choice.candidates[0].why
    choice = choose(job(), Hardware.parse("1xH100-80G"))
    assert len({row.gpu for row in choice.candidates[:3]}) == 1
    assert choice.stage == 0 and "nothing to share with" in choice.reason


def test_need_is_states_and_the_larger_of_activations_and_update():
    hardware = Hardware.parse("8xA100-80G")
    z1 = choose(job("12b"), hardware).candidates[1]
    assert z1.gpu == held("12b", 1, 8).gpu + update_bytes(job("12b").parameters, 1, 8)
    long = Job(shape_config("12b"), tokens=11_904)
    z1 = choose(long, hardware, zero_stage="1", offload="none").taken
    assert z1.gpu == held("12b", 1, 8).gpu + activations(long.config, 11_904).total


def test_spare_decides_at_the_edge():
    need = choose(job(), Hardware.parse("8xA100-80G")).taken.gpu
    assert with_spare(need) == pytest.approx(1.1 * need + 1.5 * GIB, abs=2)
    for more, stage in ((0, 1), (-1, 2)):
        assert choose(job(), Hardware("X", 8, with_spare(need) + more, None, None, True)).stage == stage


def test_asking_restricts_and_is_never_refused():
    hardware = Hardware.parse("4xA10-24G")
    choice = choose(job("12b"), hardware, zero_stage="2")
    assert (choice.stage, choice.offload, choice.fits) == (2, "optimizer", False)
    assert "zero_stage 2 was asked for, but does not fit: needs 34." in choice.reason
    choice = choose(job("12b"), hardware, zero_stage="3", offload="none")
    assert (choice.stage, choice.offload, choice.fits) == (3, "none", False) and len(choice.candidates) == 1
    assert "zero_stage 3 and offload none was asked for" in choice.reason
    assert choose(job(), hardware, zero_stage="3").taken.name == "z3"
    assert choose(job(), hardware, zero_stage="1").taken.name == "z1 + optimizer offload"
    assert choose(job(), hardware, offload="optimizer").taken.name == "z2 + optimizer offload"
    assert choose(job(), hardware, offload="all").taken.name == "z3 + full offload"
    assert choose(job(), Hardware.parse("8xA100-80G"), zero_stage="0").taken.name == "z0"


@pytest.mark.parametrize(
    ("stage", "offload", "needed"), [("0", "optimizer", "1, 2 or 3"), ("2", "all", "zero_stage 3")]
)
def test_offload_that_a_stage_cannot_do_is_a_setting_error(stage, offload, needed):
    with pytest.raises(SettingError, match=needed):
        choose(job(), Hardware.parse("8xA100-80G"), stage, offload)


def test_host_memory_decides_about_offloading():
    assert choose(job("7b"), Hardware.parse("1xH100-80G,host=128G")).offload == "optimizer"
    with pytest.raises(HardwareError, match=r"z2 \+ optimizer offload needs 113.9 GiB of host memory") as caught:
        choose(job("7b"), Hardware.parse("1xH100-80G,host=64G"))
    assert "lora: {r: 16}, which fits (18.4 GiB per GPU with spare, 78.5 GiB free)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_fits_names_figures_and_what_to_change():
    with pytest.raises(HardwareError) as caught:
        choose(job("12b"), Hardware.parse("1xFOO-5G,host=16G"))
    said = str(caught.value)
    assert "does not fit on 1xFOO-5G,host=16G: at the least, z3 + full offload needs 5.3 GiB per GPU" in said
    assert "a smaller model or more GPUs (lora: {r: 16, bits: 4} does not fit either)" in said and "\n" not in said
    with pytest.raises(HardwareError, match=r"Change first: a smaller model or more GPUs$"):
        choose(job("12b", lora_rank=8), Hardware.parse("1xFOO-5G,host=16G"))


def test_cpu_trains_in_float32_without_sharding():
    choice = choose(job(), Hardware.parse("cpu,host=64G"))
    assert (choice.stage, choice.offload, choice.dtype) == (0, "none", "fp32") and "no GPU" in choice.reason
    live = activations(job().config, 2048, dtype="fp32").total
    assert choice.taken.gpu == 0 and choice.taken.host == 16 * job().parameters + live + PROCESS
    assert choose(job(), Hardware.parse("cpu,host=64G"), zero_stage="2").stage == 2
    with pytest.raises(HardwareError, match=r"z0 needs .* host memory .*Change first: lora: .*; or a smaller model$"):
        choose(job("7b"), Hardware.parse("cpu,host=64G"))
    with pytest.raises(SettingError, match="no GPU to move"):
        choose(job(), Hardware.parse("cpu,host=64G"), offload="optimizer")


@pytest.mark.parametrize(
    ("machine", "requested", "dtype", "reason"),
    [
        ("1xA100-40G", "auto", "bf16", "A100-40G computes it"),
        ("1xV100-32G", "auto", "fp16", "no bfloat16; fp16 needs loss scaling"),
        ("cpu", "auto", "fp32", "no GPU"),
        ("1xA100-40G", "fp16", "fp16", "asked for"),
        ("1xV100-32G", "bf16", "bf16", "only emulates it"),
    ],
)
def test_number_type(machine, requested, dtype, reason):
    found, why = number_type(Hardware.parse(machine), requested)
    assert found == dtype and reason in why


def test_float32_on_gpus_needs_wider_weights_and_deepspeeds_copy():
    assert model_states(10**9, 0, 1, dtype="fp32").gpu == 16 * 10**9
    assert model_states(10**9, 2, 4, dtype="fp32").gpu == 4 * 10**9 + 16 * 10**9 // 4
    choice = choose(job(), Hardware.parse("8xA100-80G"), dtype="fp32")
    assert choice.dtype == "fp32" and choice.taken.gpu > choose(job(), Hardware.parse("8xA100-80G")).taken.gpu


# Disk and text


def test_disk_holds_the_kept_checkpoints_one_more_and_the_model():
    what = job("12b")
    assert checkpoint_bytes(what.parameters, 3) / GIB == pytest.approx(154, rel=0.01)
    one, final = checkpoint_bytes(what.parameters, 3), final_bytes(what.parameters)
    assert final / GIB == pytest.approx(22.1, rel=0.01)
    assert disk_need(what, steps=616, save_every=200, keep=2, checkpoint=one) == 3 * one + final
    assert disk_need(what, steps=616, save_every=200, keep=20, checkpoint=one) == 4 * one + final
    assert disk_need(what, steps=100, save_every=200, keep=2, checkpoint=one) == one + final
    assert [checkpoint_bytes(1, *way) for way in ((0, "bf16", False), (2, "bf16"), (2, "fp32"), (0, "fp32"))] == [
        12, 16, 20, 16
    ]  # fmt: skip


def test_activations_are_kept_where_they_fit_and_only_then():
    roomy = Hardware.parse("1xH100-80G")
    tight = Hardware("X", 1, with_spare(choose(job(), roomy).taken.gpu), None, None, True)
    for hardware, recompute in ((roomy, False), (tight, True)):
        choice = choose(job(), hardware, recompute="auto")
        assert choice.recompute is recompute and choice.fits, choice.reason
        assert (choice.stage, choice.offload) == (0, "none")
        assert ("without being recomputed" in choice.reason) is not recompute
    assert choose(job(), roomy, recompute="true").recompute and not choose(job(), tight, recompute="false").recompute
    kept = choose(job(), roomy, recompute="auto").taken.gpu
    copies = 2 * job().parameters
    whole = activations(job().config, 2048, checkpointing=False).total
    assert kept == held("3b", 0, 1).gpu + max(whole + copies, update_bytes(job().parameters, 0, 1))


def test_table_has_a_row_per_candidate_and_marks_the_taken_one():
    choice = choose(job("12b"), Hardware.parse("8xA100-40G,host=512G"))
    lines = table(choice).splitlines()
    assert lines[0] == "8xA100-40G,host=512G: 38.5 GiB free per GPU, free host memory 512.0 GiB"
    rows = [line for line in lines if " GiB  " in line]
    assert len(rows) == len(choice.candidates) == 6
    assert [line.split()[1] for line in rows if line.startswith("->")] == ["z3"]
    assert sum("no: needs" in line for line in rows) == 3 and lines[-1].startswith("taken: z3 (z0, z1, z2 too large; ")
    assert "0.0 GiB" not in table(choose(job(), Hardware.parse("cpu,host=64G"))).splitlines()[4]


# The documentation's table

SIZES = ("3b", "7b", "12b")
DOCUMENTED = ("1xH100-80G", "8xA100-80G", "8xA100-40G", "4xA10-24G", "8xV100-32G")


def table_row(machine: str) -> str:
    """What is chosen for each size on a machine, and its need without spare; where that offloads, LoRA or QLoRA too."""
    cells = []
    for size in SIZES:
        full = taken(job(size), machine)
        parts = [f"{full.name}: {need(full)}"] if full else []
        if full is None or full.offload != "none":
            for name, bits in (("LoRA", None), ("QLoRA", 4)):
                if adapters := taken(job(size, lora_rank=LORA_RANK, lora_bits=bits), machine):
                    parts.append(f"{name} {adapters.name}: {need(adapters)}")
                    break
        cells.append("; or ".join(parts) or "does not fit")
    return f"| {machine} | {' | '.join(cells)} |"


def taken(what: Job, machine: str) -> Candidate | None:
    try:
        return choose(what, Hardware.parse(machine)).taken
    except HardwareError:
        return None


def need(row: Candidate) -> str:
    return ", ".join([gib(row.gpu)] * (row.gpu > 0) + [f"host {gib(row.host)}"] * (row.host > 0))


def test_the_table_of_the_documentation_is_what_is_chosen():
    """The English page; tests/test_translations.py compares the numbers of the Chinese one with it."""
    lines = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith(tuple(f"| {machine} |" for machine in DOCUMENTED))]
    assert rows == [table_row(machine) for machine in DOCUMENTED]


def test_adapters_are_never_split_by_zero_3():
    hardware = Hardware.parse("4xA10-24G")
    for job_of in (job("12b", lora_rank=16, lora_bits=4), job("12b", lora_rank=16, lora_bits=8)):
        choice = choose(job_of, hardware)
        assert choice.stage < 3 and all(row.stage < 3 for row in choice.candidates)
    with pytest.raises(SettingError, match="zero_stage is '3', but lora works with zero_stage 0, 1 or 2: "):
        choose(job("3b", lora_rank=16), hardware, zero_stage="3")
    with pytest.raises(SettingError, match="offload is 'all', but lora works with zero_stage 0, 1 or 2"):
        choose(job("3b", lora_rank=16), hardware, offload="all")
    with pytest.raises(HardwareError, match=r"Change first: lora with bits: 4, which fits"):
        choose(job("12b", lora_rank=16), hardware)


def test_frozen_weights_take_their_bits():
    what = job("12b", lora_rank=16)
    linear = sum(math.prod(shape) for _, shape in what._matrices)
    rest = 2 * (what.parameters - linear)
    assert what.frozen() == 2 * what.parameters
    assert job("12b", lora_rank=16, lora_bits=8).frozen() == linear + rest
    assert job("12b", lora_rank=16, lora_bits=4).frozen() == pytest.approx(linear * (4 + 0.127) / 8 + rest, rel=1e-4)
    assert job("12b").frozen() == 0


def test_what_only_lora_or_nothing_can_train():
    assert table_row("cpu,host=64G").split(" | ")[2] == "LoRA z0: host 28.9 GiB"
    assert table_row("1xFOO-4G,host=8G").endswith(" | does not fit |")
