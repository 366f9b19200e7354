"""The compiled linear layers, against exact whole numbers and float64."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_dolly.kernels import cpu as kernels
from modelscope_dolly.kernels.quantized_linear import (
    BF16Linear,
    Int4Linear,
    Int8DynamicLinear,
    Int8Linear,
    PackedLinear,
    quantise_int4,
    quantise_int8,
)
from tests.support.models import logits, our_network, prompts, quantised, random_model

pytestmark = pytest.mark.skipif(
    not kernels.level(), reason="no compiler built the library, or it knows nothing of this processor"
)

LEVELS = [level for level in (1, 2) if level <= kernels.level()]
KINDS = [Int8Linear, Int8DynamicLinear, Int4Linear, BF16Linear]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: type[PackedLinear], weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    made = kind(weight.shape[1], weight.shape[0])
    made.take("weight", weight)
    if bias is not None:
        made.take("bias", bias)
    return made


def run(made: PackedLinear, x: torch.Tensor, level: int, activation: str | None = None) -> torch.Tensor:
    tensors = made.weight, made.scales, made.bias
    return kernels.linear(made.kind, x, *tensors, made.out_features, activation, level, made.row_bytes)


def quantise_16_bits(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as whole numbers from -32512 to 32512, 127 * 256, times a factor."""
    largest = x.abs().amax(dim=1)
    inverse = torch.where(largest > 1e-30, torch.div(torch.tensor(32512.0), largest), 0.0)
    return (x * inverse[:, None]).round(), torch.where(largest > 1e-30, largest / 32512.0, 0.0)


def reference(kind: type[PackedLinear], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same arithmetic in float64, where every sum of whole numbers is exact."""
    inputs = weight.shape[1]
    if kind is BF16Linear:
        return x.double() @ weight.bfloat16().double().T + bias
    whole, factors = quantise_int8(x) if kind.row_bytes == 1 else quantise_16_bits(x)
    x = whole.double() * factors.double()[:, None]
    if issubclass(kind, Int8Linear):
        whole, scales = quantise_int8(weight)
        return x @ (whole.double() * scales.double()[:, None]).T + bias
    whole, scales = quantise_int4(weight)
    return x @ (whole.double() * scales.double().repeat_interleave(128, dim=1)[:, :inputs]).T + bias


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert (out.double() - expected).abs().max() <= 3e-6 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [*range(1, 41), 130])
def test_every_number_of_rows(kind, rows, level):
    x, weight, bias = random(rows, 260), random(75, 260, seed=1), random(75, seed=2)
    assert_close(run(layer(kind, weight, bias), x, level), reference(kind, x, weight, bias))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@given(
    rows=st.integers(1, 14),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 300),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_odd_sizes(kind, level, rows, outputs, inputs, scale, seed):
    x, weight = random(rows, inputs, seed=seed), random(outputs, inputs, seed=seed + 1) * scale
    bias = random(outputs, seed=seed + 2)
    assert_close(run(layer(kind, weight, bias), x, level), reference(kind, x, weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_50280_rows_without_bias(kind):
    x, weight = random(2, 64), random(50280, 64, seed=1)
    out = run(layer(kind, weight, None), x, kernels.level())
    assert_close(out, reference(kind, x, weight, torch.zeros(50280)))


@pytest.mark.parametrize("kind", KINDS)
def test_largest_sums_do_not_overflow(kind):
    """All numbers at their largest, of either sign, as many inputs as are allowed."""
    inputs = kernels.LARGEST_K
    for sign in (1.0, -1.0):
        x, weight = torch.full((5, inputs), sign), torch.full((17, inputs), -1.0)
        for level in LEVELS:
            torch.testing.assert_close(
                run(layer(kind, weight, None), x, level), torch.full((5, 17), -sign * inputs), rtol=1e-3, atol=0
            )


@pytest.mark.parametrize("kind", KINDS)
def test_more_inputs_than_sums_can_hold_are_refused(kind):
    from modelscope_dolly.errors import SettingError

    with pytest.raises(SettingError, match="65537 inputs cannot be packed"):
        kind(kernels.LARGEST_K + 1, 4)


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_neither_on_its_neighbours_nor_on_threads_nor_on_the_instruction_set(kind, number):
    x, made = random(67, 515).to(number), layer(kind, random(200, 515, seed=1), random(200, seed=2))
    expected = run(made, x, kernels.level())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for level in LEVELS:
                assert torch.equal(run(made, x, level), expected)
                for rows in (1, 2, 7, 13, 30):
                    assert torch.equal(run(made, x[:rows], level), expected[:rows])
                assert torch.equal(torch.cat([run(made, row[None], level) for row in x]), expected)
    finally:
        torch.set_num_threads(before)


def test_long_inputs_that_are_worked_on_in_chunks():
    """Rows of more than 2 MiB in all: the weights are read once for each chunk of them."""
    x, weight, bias = random(700, 4096), random(70, 4096, seed=1), random(70, seed=2)
    for kind in (Int8Linear, Int8DynamicLinear, BF16Linear):
        assert_close(run(layer(kind, weight, bias), x, kernels.level()), reference(kind, x, weight, bias))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_rows_are_rounded_once(kind, level):
    x, made = random(9, 300).bfloat16(), layer(kind, random(50, 300, seed=1), random(50, seed=2))
    assert torch.equal(run(made, x, level), run(made, x.float(), level).bfloat16())


@pytest.mark.parametrize("level", LEVELS)
def test_ties_are_rounded_to_even_in_bfloat16(level):
    bias = 1 + torch.arange(1, 64, 2) / 256  # each halfway between two neighbours
    made = layer(BF16Linear, torch.zeros(32, 8), bias)
    assert torch.equal(run(made, torch.zeros(1, 8).bfloat16(), level)[0], bias.bfloat16())


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x times the normal distribution, in float64, also where 1 + erf would lose its digits."""
    return x * torch.special.erfc(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("level", LEVELS)
def test_gelu_is_exact_to_a_few_units_of_the_last_place(level):
    x = torch.cat([torch.linspace(-14, 14, 400_001), torch.logspace(-30, 30, 5_000), -torch.logspace(-30, 30, 5_000)])
    made = layer(BF16Linear, torch.zeros(len(x), 2), x)  # outputs are the bias
    found, expected = run(made, torch.zeros(1, 2), level, "gelu")[0].double(), gelu(x.double())
    error = (found - expected).abs()
    assert (error <= 5e-7 * expected.abs() + 1e-36).all()
    for place in range(0, len(x), 4_321):  # the definition itself, by another erf
        value = x[place].item()
        assert abs(found[place].item() - value * (1 + math.erf(value / math.sqrt(2))) / 2) <= 5e-7 * max(1, abs(value))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 8, 30])
def test_gelu_of_a_layer(kind, rows, level):
    x, weight, bias = random(rows, 260), random(75, 260, seed=1) / 8, random(75, seed=2)
    made = layer(kind, weight, bias)
    out = run(made, x, level, "gelu")
    assert_close(out, gelu(reference(kind, x, weight, bias)))
    assert_close(out, torch.nn.functional.gelu(run(made, x, level)).double())
    assert torch.equal(out, run(made, x, kernels.level(), "gelu"))
    half = x.bfloat16()
    assert torch.equal(run(made, half, level, "gelu"), run(made, half.float(), level, "gelu").bfloat16())


@pytest.mark.parametrize("level", LEVELS)
def test_a_nan_of_any_bits_stays_one_in_bfloat16(level):
    made = layer(BF16Linear, torch.zeros(3, 2), torch.zeros(3))
    made.bias.view(torch.int32)[1] = 0x7FFFFFFF
    assert run(made, torch.zeros(1, 2).bfloat16(), level)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("level", LEVELS)
def test_gelu_hides_nothing_that_is_not_finite(level):
    made = layer(BF16Linear, torch.zeros(3, 2), torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert not run(made, torch.zeros(1, 2), level, "gelu").isfinite().any()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError):
        run(layer(Int8Linear, random(20, 64), None), random(1, 64), kernels.level(), "relu")


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_a_network_takes_its_own_activation(activation):
    """Packed and not packed: GELU in the layer, others by torch."""
    net = our_network(random_model(hidden_act=activation))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.bfloat16())
    torch.testing.assert_close(logits(quantised(net, "bf16"), prompts()), logits(net, prompts()), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_spoils_its_own_row(kind, bad, level):
    x, made = random(6, 200), layer(kind, random(40, 200, seed=1), None)
    good = run(made, x, level)
    x[2, 7] = bad
    out = run(made, x, level)
    assert not out[2].isfinite().any()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(out[rest], good[rest])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_the_smallest_numbers(kind, level):
    x = torch.zeros(3, 130)
    x[1] = 1e-40
    made = layer(kind, random(20, 130, seed=1), random(20, seed=2))
    assert_close(run(made, x, level), made.bias.double().expand(3, 20))


@pytest.mark.parametrize("level", LEVELS)
def test_activations_of_16_bits_keep_the_small_values_beside_a_large_one(level):
    """A channel 300 times the others, as in networks with outliers: 8 bits leave next to nothing of the rest."""
    x, weight = random(4, 512), random(64, 512, seed=1)
    weight[:, 7] = 0
    x[:, 7] = 300
    exact = x.double() @ weight.double().T
    errors = {}
    for kind in (Int8Linear, Int8DynamicLinear):
        out = run(layer(kind, weight, None), x, level)
        errors[kind] = float((out - exact).norm() / exact.norm())
    weights_alone = float((x.double() @ (reference_weights(weight) - weight).T).norm() / exact.norm())
    assert errors[Int8Linear] < 1.1 * weights_alone and errors[Int8DynamicLinear] > 50 * weights_alone


def reference_weights(weight: torch.Tensor) -> torch.Tensor:
    whole, scales = quantise_int8(weight)
    return whole.double() * scales.double()[:, None]


@pytest.mark.parametrize("level", LEVELS)
def test_every_value_of_16_bits_is_split_into_its_two_bytes(level):
    """One input per whole number from -32512 to 32512, times a weight of one: the number itself must come back."""
    whole = torch.arange(-32512.0, 32513.0)
    x = torch.stack((whole, torch.full_like(whole, 32512.0)), dim=1)  # the second keeps the step at 1
    out = run(layer(Int8Linear, torch.tensor([[1.0, 0.0]]), None), x, level)
    assert torch.equal((out[:, 0] * 1).round(), whole)


def test_rows_are_quantised_as_torch_does_it():
    for shape in ((1, 1), (3, 5), (16, 16), (33, 257)):
        for number in (torch.float32, torch.bfloat16):
            x = random(*shape).to(number)
            whole, factors = kernels.quantise_rows(x)
            expected, scales = quantise_int8(x)
            assert torch.equal(whole[:, : shape[1]], expected) and torch.equal(factors, scales)
            assert not whole[:, shape[1] :].any()


def unpack(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of kernels.pack: [N, W]."""
    return packed.transpose(1, 2).reshape(-1, packed.shape[1])[:rows]


def test_pack_and_unpack():
    words = torch.arange(37 * 5, dtype=torch.int32).view(37, 5)
    assert torch.equal(unpack(kernels.pack(words), 37), words)


def test_memory_of_the_wrong_size_or_type_never_reaches_the_library():
    made, x = layer(Int8Linear, random(20, 64), None), random(3, 64)
    wrong = [
        (x.double(), made.weight, made.scales, None, 20),
        (x[:, :60], made.weight, made.scales, None, 20),
        (x, made.weight, made.scales, None, 40),
        (x, made.weight.float(), made.scales, None, 20),
        (x, made.weight, made.scales.half(), None, 20),
        (x, made.weight, made.scales, torch.zeros(19), 20),
        (x, made.weight, made.scales, torch.zeros(20, dtype=torch.bfloat16), 20),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="do not fit each other"):
            kernels.linear(kernels.INT8, *arguments)


def test_a_library_of_another_interface_is_passed_over(tmp_path):
    """One that was built before the arguments changed would read them wrongly."""
    source = tmp_path / "other.c"
    source.write_text("int dolly_interface(void) { return 1; }\nint dolly_level(void) { return 2; }\n")
    library = tmp_path / "_kernels.x.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no C compiler called cc")
    code = (
        "import modelscope_dolly.kernels.cpu as kernels\n"
        f"kernels.__file__ = {str(tmp_path / 'kernels.py')!r}\nprint(kernels.level())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_threads_are_torchs():
    """One OpenMP runtime in the process, and torch.set_num_threads rules it, in threads of Python's too."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = {line.split()[-1] for line in lines if "libgomp" in line or "libomp" in line}
    assert len(maps) == 1, maps
    before, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(3)
        worker = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        worker.start()
        worker.join()
        assert found == [3] and kernels._library().dolly_threads(torch.get_num_threads()) == 3
    finally:
        torch.set_num_threads(before)


def test_a_layer_asks_for_torchs_threads(monkeypatch):
    made, asked, library = layer(Int8Linear, random(32, 64), None), [], kernels._library()
    recorder = SimpleNamespace(
        dolly_level=library.dolly_level,
        dolly_linear=lambda *call: asked.append(call[-1]) or library.dolly_linear(*call),
    )
    monkeypatch.setattr(kernels, "_library", lambda: recorder)
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            run(made, random(1, 64), kernels.level())
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 4]


def test_calls_from_several_threads_at_once():
    x, made = random(8, 512), layer(Int8Linear, random(96, 512, seed=1), None)
    expected, wrong = run(made, x, kernels.level()), []

    def work() -> None:
        wrong.extend(None for _ in range(50) if not torch.equal(run(made, x, kernels.level()), expected))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_file_that_is_no_library_of_ours_is_passed_over(tmp_path):
    code = (
        "import pathlib, modelscope_dolly.kernels.cpu as kernels\n"
        f"kernels.__file__ = {str(tmp_path / 'kernels.py')!r}\n"
        f"pathlib.Path({str(tmp_path)!r}, '_kernels.x.so').write_bytes(b'not a library')\n"
        "print(kernels.level(), kernels.describe())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0 torch (no compiled kernels for this machine)", done.stderr
