"""dolly bench: what is measured is what is said; no test looks at how long something takes."""

from __future__ import annotations

import ast
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modelscope_dolly.benchmark import (
    draft_model_speed,
    engine_timing,
    examples,
    hardware_limits,
    machine,
    own_engine,
    peer_choice,
    peers,
    process,
    prompt_lookup_speed,
    quantization_quality,
    repeats,
    server_speed,
    synthetic_weights,
    worker,
)
from modelscope_dolly.benchmark.bench_options import BenchSettings
from modelscope_dolly.benchmark.bench_run import BenchRun, Variant
from modelscope_dolly.benchmark.report import format_report
from modelscope_dolly.benchmark.suite import run_benchmark
from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.checkpoint.memory import shape_config
from modelscope_dolly.checkpoint.tokenizer import read_tokenizer
from modelscope_dolly.cli.main import main
from modelscope_dolly.engine.cuda_graphs import GraphCapture
from modelscope_dolly.engine.step_input import StepInput
from modelscope_dolly.errors import CheckpointError, DollyError, HardwareError
from modelscope_dolly.kernels import cpu as kernels
from tests.support.models import TINY, our_engine, random_model
from tests.support.recorded import Recorder


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """--keep: random weights of the tiny shape."""
    place = tmp_path_factory.mktemp("kept")
    synthetic_weights.make_checkpoint(synthetic_weights.parse_shape(TINY), place / TINY)
    return place


@pytest.fixture
def quick(monkeypatch):
    """Limits of a machine of 10 GB/s and 1 TFLOP/s, so that shares can be computed by hand."""
    found = {"bandwidth": repeats.spread([1e10]), "matrix": {"fp32": repeats.spread([1e12])}, "disturbed": []}
    monkeypatch.setattr(engine_timing, "measure_limits", lambda _: found)


def settings(kept: Path, **changes) -> BenchSettings:
    values = dict(shape=TINY, dtypes=("fp32",), batches=(1, 3), peers=("hf",), peer_python={"hf": sys.executable})
    values |= dict(threads=1, repeats=2, prompt_tokens=12, new_tokens=6, keep=str(kept))
    return BenchSettings(**{**values, **changes})


def test_every_row_has_the_shares_and_ratios_that_its_figures_give(kept, quick):
    missing_python = {"hf": sys.executable, "vllm": sys.executable}
    asked = settings(kept, peers=("hf", "vllm", "llamacpp"), peer_python=missing_python, quantize=("none", "int8"))
    found = json.loads(json.dumps(run_benchmark(asked)))
    rows = {(row["engine"], row["format"], row["batch"]): row for row in found["rows"]}
    assert set(rows) == {
        (*kind, batch) for kind in (("dolly", "fp32"), ("dolly", "int8"), ("hf", "fp32")) for batch in (1, 3)
    }
    linear = 2 * (3 + 1 + 4 + 4) * 64 * 64 + 50280 * 64  # qkv, dense, h->4h, 4h->h of two layers, and the head
    for (engine, number_format, batch), row in rows.items():
        step, first, hf = row["step_s"]["median"], row["first_token_s"]["median"], rows["hf", "fp32", batch]
        assert len(row["step_s"]["values"]) == len(row["first_token_s"]["values"]) == 2
        assert row["tokens_per_s"] == pytest.approx(batch / step)
        assert row["prefill_tokens_per_s"] == pytest.approx(12 * batch / first)
        # random weights are stored in bf16: so our engine keeps them, where its kernels are there
        held = kernels.level() > 0 and engine == "dolly" and number_format == "fp32"
        assert row["held"] == ("bf16" if held else None)
        assert row["bytes_per_step"] == linear * (2 if held else {"fp32": 4, "int8": 1}[number_format])
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes_per_step"] / 1e10 / step)
        assert row["times_hf"] == pytest.approx(row["tokens_per_s"] / hf["tokens_per_s"])
        assert row["prefill_times_hf"] == pytest.approx(hf["first_token_s"]["median"] / first)
        assert row["peak_bytes"] > 1 << 26 and row["load_s"] > 0
    assert rows["dolly", "fp32", 3]["share_of_matrix_peak"] == pytest.approx(
        2 * linear * 36 / 1e12 / rows["dolly", "fp32", 3]["first_token_s"]["median"]
    )
    # the same weights and prompts reached both engines: greedy answers in fp32 are the same
    assert [rows["dolly", "fp32", batch]["same_tokens"] for batch in (1, 3)] == [1.0, 1.0]
    assert set(found["missing"]) == {"vllm", "llamacpp"} and found["machine"]["threads"] == 1
    lines = format_report(found).splitlines()
    assert sum(line.startswith("dolly ") for line in lines if "±" in line) == 4
    assert ("dolly fp32: linear weights stay in bf16" in format_report(found)) == (kernels.level() > 0)
    assert [line for line in lines if line.startswith("vLLM: not installed")]


def test_agreement_ends_at_the_first_token_that_differs():
    assert engine_timing.same_tokens([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == (0.5 + 1) / 2


def test_yardstick_is_transformers_in_the_first_number_type():
    rows = [
        {
            "engine": engine,
            "format": name,
            "batch": 1,
            "tokens_per_s": speed,
            "prefill_tokens_per_s": 1.0,
            "answers": None,
        }
        for engine, name, speed in (("dolly", "int8", 9.0), ("hf", "fp32", 2.0), ("hf", "bf16", 3.0))
    ]
    engine_timing.compare([*rows, {"engine": "vllm", "format": "bf16", "error": "no"}], "bf16")
    assert [row["times_hf"] for row in rows] == [3.0, pytest.approx(2 / 3), 1.0]
    assert {row["yardstick"] for row in rows} == {"bf16"}


def test_disturbed_figures_are_named():
    calm, wild = repeats.spread([1.0, 1.05, 1.1]), repeats.spread([1.0, 1.0, 1.2])
    assert wild["spread"] == pytest.approx(0.2) and calm["median"] == 1.05
    assert repeats.disturbances({"step": calm}, {"others_cpus": 0.1}) == []
    assert repeats.disturbances({"step": wild}, {"others_cpus": 1.0}) == [
        "step spread 20%", "other processes used 1.0 CPUs"
    ]  # fmt: skip


def test_work_of_others_is_told_from_that_of_our_children():
    watch = repeats.OtherLoad()
    watch._look = lambda: (watch._start[0] + 2.0, watch._start[1] + 5.0, watch._start[2] + 2.0)
    assert watch.cpus() == pytest.approx(1.5)


def test_limits_are_measured_over_the_array_that_was_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        hardware_limits, "_rate", lambda work, amount, *_: seen.append((amount, work())) or {"median": 1.0}
    )
    cpu = torch.device("cpu")
    hardware_limits.read_bandwidth(cpu, array=1 << 20)
    hardware_limits.matrix_peak(cpu, torch.float32, size=64)
    monkeypatch.setattr(hardware_limits, "last_cache", lambda: 1 << 28)
    monkeypatch.setattr(hardware_limits, "_huge", lambda size: seen.append(size) or bytearray(1 << 14))
    hardware_limits.read_bandwidth(cpu)
    assert seen[0][0] == 1 << 20 and torch.equal(seen[0][1], torch.full((64,), 4096.0))  # every value was read
    assert seen[1][0] == 2 * 32 * 64 * 64 and seen[1][1].shape == (32, 64)
    assert seen[2] > 4 << 28


def test_limit_of_a_gpu_is_the_fastest_way_to_read_and_a_copy_counts_both_directions(monkeypatch):
    """The arithmetic, on the CPU; the speeds are made up: sum 3 and product 2 at 1 MiB, product 5 at 2 MiB."""
    rates = iter([2.0, 3.0, 9.0, 5.0, 4.0, 8.0])
    seen = []

    def rate(work, amount, *_):
        seen.append((amount, work()))
        return repeats.spread([next(rates)])

    monkeypatch.setattr(hardware_limits, "_rate", rate)
    found = hardware_limits.gpu_bandwidth(torch.device("cpu"), [(1 << 20) + 5, 2 << 20], repeats=1)
    assert (found["max"], found["how"], found["array_bytes"]) == (5.0, "matrix-vector product", 2 << 20)
    assert found["copy"]["max"] == 9.0 and len(found["tried"]) == 6
    assert [amount for amount, _ in seen] == [1 << 20] * 3 + [2 << 20] * 3
    assert torch.equal(seen[0][1], torch.full((64,), 4096.0)) and seen[1][1] == 64 * 4096  # every value was read
    assert seen[2][1].nbytes == 1 << 19  # so much is read, and as much written


def test_calls_on_a_gpu_are_timed_together_and_waited_for(monkeypatch):
    clock = itertools.count()
    done = []
    monkeypatch.setattr(hardware_limits.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    found = hardware_limits._rate(lambda: done.append("work"), 10.0, 1, torch.device("cuda", 0))
    assert done == [*["work"] * hardware_limits._CALLS, "wait"] * 2
    assert found["values"] == [10.0 * hardware_limits._CALLS]


def test_children_see_the_gpu_that_is_measured_and_no_other(monkeypatch):
    cuda, cpu = (lambda number: torch.device("cuda", number)), torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [process._visible_devices(one) for one in (cpu, cuda(0), cuda(3))] == ["", "0", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert [process._visible_devices(one) for one in (cpu, cuda(1))] == ["", "6"]


def test_memory_of_a_gpu_is_what_torch_counts_there_or_unknown(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: seen.append(device) or len(seen) * 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    job = {"device": "cuda:0"}
    assert (peers.peak(job, reset=True), peers.peak(job)) == (100, 300) and seen == ["cuda:0"] * 3
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 0)  # an engine in a process of its own
    assert peers.peak(job) is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert peers.peak(job) is None
    assert peers.peak({"device": "cpu"}) > 1 << 26


def test_warm_up_on_a_gpu_is_as_long_as_what_is_measured():
    calls = []

    def generate(prompts, new):
        calls.append(new)
        return [], [0.0] * new

    for device, expected in (("cpu", [2, 9]), ("cuda:0", [9, 9])):
        calls.clear()
        job = {"device": device, "prompts": {"1": [[1]]}, "new_tokens": 9, "repeats": 1}
        assert [row["batch"] for row in peers.measure(job, generate)] == [1] and calls == expected


def test_formats_of_peers_are_those_of_the_device(kept, monkeypatch):
    monkeypatch.setattr(peer_choice.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    run = BenchRun(settings(kept, peers=("hf-compile", "ctranslate2"), dtypes=("bf16",),
                          peer_python=dict.fromkeys(("hf-compile", "ctranslate2"), sys.executable)))  # fmt: skip
    variants, missing = peer_choice.choose_variants(run)
    assert [variant[:2] for variant in variants] == [("dolly", "bf16"), ("ctranslate2", "int8")]
    assert missing == {"hf-compile": "its steps are compiled on a GPU only"}
    run.device = torch.device("cuda", 1)
    variants, missing = peer_choice.choose_variants(run)
    assert [variant[:2] for variant in variants[1:]] == [
        ("hf-compile", "bf16"),
        ("ctranslate2", "bf16"),
    ] and missing == {}
    run.scratch = run.model = kept
    assert run.job(Variant("dolly", "bf16", "bf16"))["device"] == "cuda:0"  # the only one that a child sees


def test_a_gpu_is_described_with_its_driver(monkeypatch):
    properties = SimpleNamespace(total_memory=80, multi_processor_count=132, major=9, minor=0, L2_cache_size=50)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    answer = SimpleNamespace(returncode=0, stdout="580.1\n580.1\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: answer)
    found = machine.describe_machine(torch.device("cuda", 0), 2)
    assert found["gpu"]["driver"] == "580.1" and found["gpu"]["capability"] == "9.0" and found["device"] == "a card"
    answer.returncode = 9
    assert machine.describe_machine(torch.device("cuda", 0), 2)["gpu"]["driver"] is None


def test_bytes_of_a_step_are_those_of_the_linear_layers():
    config = shape_config("3b")
    assert hardware_limits.linear_weights(config) == pytest.approx(2.645e9, rel=1e-3)
    assert hardware_limits.bytes_per_step(config, "bf16") == 2 * hardware_limits.linear_weights(config)
    assert hardware_limits.bytes_per_step(config, "int4") == hardware_limits.linear_weights(config) * (0.5 + 2 / 128)
    assert hardware_limits.bytes_per_step(config, "fp32", "bf16") == hardware_limits.bytes_per_step(config, "fp16")


def test_random_weights_make_a_sound_checkpoint_that_the_seed_decides(kept, tmp_path):
    assert {finding.status for finding in check_directory(kept / TINY)} == {"ok"}
    read = lambda path: [file.read_bytes() for file in sorted(path.glob("*.safetensors"))]  # noqa: E731
    config = synthetic_weights.parse_shape(TINY)
    assert read(synthetic_weights.make_checkpoint(config, tmp_path / "same")) == read(kept / TINY)
    assert read(synthetic_weights.make_checkpoint(config, tmp_path / "other", seed=1)) != read(kept / TINY)
    with pytest.raises(CheckpointError, match="exists already"):
        synthetic_weights.make_checkpoint(config, tmp_path / "same")


def test_rows_of_random_weights_never_repeat():
    config = synthetic_weights.parse_shape("128x2x4")
    for name, tensor in synthetic_weights._tensors(config, 0, torch.float32):
        if tensor.dim() == 2 and "mlp" in name:
            assert len(torch.unique(tensor, dim=0)) == len(tensor)


def test_random_weights_that_do_not_fit_the_disk_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("modelscope_dolly.files.free_disk", lambda _: 10**6)
    with pytest.raises(HardwareError, match=r"needs 0\.01 GB of disk, 0\.00 GB are free.*--keep"):
        synthetic_weights.make_checkpoint(synthetic_weights.parse_shape(TINY), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_static_batches_step_until_their_longest_answer_is_done():
    calls = []

    def generate(prompts, new):
        calls.append((len(prompts), new))
        return [], [0.0] * new

    requests = [[[1], 5], [[1], 20], [[1], 7], [[1], 6], [[1], 9]]
    found = peers.run_mixed({"requests": requests, "slots": 2, "repeats": 1}, generate)
    assert calls == [(2, 2), (2, 20), (2, 7), (1, 9)]  # the first is the warm-up
    assert (found["slot_steps"], found["useful_steps"]) == (2 * 20 + 2 * 7 + 9, 47)


@pytest.fixture
def tiny_worker(monkeypatch):
    """Our engine on the tests' model in this process; gives the engine that the worker gets."""
    engine = our_engine(random_model())
    monkeypatch.setattr(own_engine, "load_engine", lambda _: engine)
    monkeypatch.setattr(peers, "say", lambda _: None)
    return engine


def test_slots_are_refilled_and_their_steps_counted(tiny_worker):
    requests = [[[5, 6, 7], 2], [[8, 9], 9], [[3], 3], [[4, 4], 4]]
    found = worker.run_mixed({"requests": requests, "slots": 2, "repeats": 1})
    # slot A: 2, then 3, then 4 tokens; slot B: 9. Each answer's first token comes with its prompt.
    assert found["useful_steps"] == 18
    assert found["slot_steps"] == 4 + 2 * 8
    assert len(found["seconds"]) == 1


def test_worker_gives_the_time_of_each_step_of_the_slowest_answer(tiny_worker):
    answers, elapsed = worker.load_generate({})([[5, 6, 7], [8, 9]], 4)
    assert [len(answer) for answer in answers] == [4, 4] and len(elapsed) == 4
    assert elapsed == sorted(elapsed) and elapsed[0] > 0


def test_scripted_network_answers_as_the_record_does_and_draft_tokens_are_counted(tiny_worker):
    copied = list(range(100, 140))
    texts = {"context": [[[7, *copied, 8, *copied, 9], 42, True]], "free": [[[5, *range(200, 260)], 20, False]]}
    found = prompt_lookup_speed.run_lookup({"lookup": texts, "repeats": 2})
    context, free = found["kinds"]["context"], found["kinds"]["free"]
    assert context["accepted"] > 10 and context["accepted_share"] > 0.5 and context["passes_per_token"] < 0.9
    assert free["accepted"] == 0 and free["passes_per_token"] == 1.0
    assert context["tokens"] == len(copied) and len(context["plain_s"]) == len(context["guessing_s"]) == 2


def test_a_draft_pays_from_where_it_makes_as_many_tokens_as_plain_decoding():
    for count, rate in ((1, 0.5), (4, 0.8), (8, 0.01)):
        chances = [rate**place * (1 - rate) for place in range(count)] + [rate**count]
        tokens = sum((place + 1) * chance for place, chance in enumerate(chances))  # place: guesses that are right
        assert draft_model_speed.expected_tokens(rate, count) == pytest.approx(tokens)
        assert draft_model_speed.break_even(count, tokens) == pytest.approx(rate, abs=1e-6)
    assert draft_model_speed.break_even(3, 4.1) is None and draft_model_speed.break_even(3, 4.0) == pytest.approx(1)
    assert draft_model_speed.break_even(3, 0.5) == pytest.approx(0)


def test_a_draft_is_measured_beside_its_network(kept):
    found = run_benchmark(settings(kept, draft="64x1x4", repeats=1))
    rows = found["draft"]["rows"]
    assert [row["guesses"] for row in rows] == list(range(1, 9)) and (kept / "64x1x4").is_dir()
    for row in rows:
        plain, draft, verify = (row[name]["median"] for name in ("plain_s", "draft_s", "verify_s"))
        cost = (verify + row["guesses"] * draft) / plain
        assert row["times_plain"][0.9] == pytest.approx((1 - 0.9 ** (row["guesses"] + 1)) / 0.1 / cost)
        assert row["pays_from"] == draft_model_speed.break_even(row["guesses"], cost) and plain > 0 and draft > 0
    assert "it was not measured" in format_report(found) and "x at 90%" in format_report(found)


def test_recorded_steps_follow_the_script_too(tiny_worker):
    """As on a GPU: plain steps are recorded ones, which read where the script lies, not which script it is."""
    net, recorder = tiny_worker.net, Recorder()
    tiny_worker.capture = decoder = GraphCapture(net, tiny_worker.device, recorder)
    # like the fused kernels, it does not go through the network's own call
    by_itself = lambda ids, places, cache: net(ids, StepInput(places, length=cache.length, padded=True), cache)  # noqa: E731
    decoder.forwards.insert(0, ("by itself", by_itself))
    answers = [[[5, *range(200, 260)], 20, False], [[6, *range(300, 340)], 5, False]]
    found = prompt_lookup_speed.run_lookup({"lookup": {"free": answers}, "repeats": 1})
    assert found["kinds"]["free"]["tokens"] == 40 + 35
    assert recorder.recordings and len(decoder.forwards) == 2, "the recording was given up"


def test_quality_compares_with_what_transformers_predicts(checkpoint_dir):
    from transformers import AutoModelForCausalLM

    asked = BenchSettings(model=str(checkpoint_dir), quality=True, quantize=("int8",), dtypes=("fp32", "bf16"))
    found = run_benchmark(asked)["quality"]
    rows = {row["format"]: row for row in found["rows"]}
    assert list(rows) == ["fp32", "bf16", "int8"] and rows["fp32"]["kl_mean"] == 0
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32).eval()
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.bfloat16).eval()
    losses, divergences = [], []
    for text in quantization_quality.choose_examples(read_tokenizer(checkpoint_dir), asked):
        with torch.no_grad():
            truth, other = (
                torch.log_softmax(one(torch.tensor([text.ids])).logits[0, text.prompt_tokens - 1 : -1].double(), -1)
                for one in (model, rounded)
            )
        losses.append(-truth[torch.arange(len(truth)), text.ids[text.prompt_tokens :]])
        divergences.append((truth.exp() * (truth - other)).sum(-1))
    assert sum(map(len, losses)) == found["tokens"]
    assert rows["fp32"]["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)
    assert rows["bf16"]["kl_mean"] == pytest.approx(torch.cat(divergences).mean().item(), rel=0.5)
    assert 0 < rows["int8"]["kl_mean"] < 1 and rows["int8"]["kl_p99"] > rows["int8"]["kl_mean"]
    assert 0.5 < rows["int8"]["top1"] <= 1
    assert "built-in sample is small" in format_report({"quality": found})


def test_quality_under_outliers(checkpoint_dir):
    """The copy computes the same, but for rounding; 8-bit activations lose far more by it than those of 16."""
    formats = ("int8", "int8-dynamic") if kernels.level() else ("int8",)
    asked = BenchSettings(model=str(checkpoint_dir), quality=True, outliers=30.0, quantize=formats, dtypes=("fp32",))
    found = run_benchmark(asked)["quality"]
    rows = {(row["format"], row["outliers"]): row for row in found["rows"]}
    assert list(rows) == [(name, factor) for factor in (None, 30.0) for name in ("fp32", *formats)]
    assert rows["fp32", 30.0]["perplexity"] == pytest.approx(rows["fp32", None]["perplexity"], rel=1e-3)
    lines = [line.split() for line in format_report({"quality": found}).splitlines()]
    assert [line[:2] for line in lines if line and line[0] == "fp32"] == [["fp32", "-"], ["fp32", "30"]]
    if kernels.level():
        assert rows["int8-dynamic", 30.0]["kl_mean"] > 5 * rows["int8", 30.0]["kl_mean"]


def test_start_is_told_by_phase(kept):
    found = run_benchmark(settings(kept, cold=True, repeats=1))["cold"]["rows"]
    assert [row["files_from"] for row in found] == ["memory, compared before", "memory", "disk"]
    for row in found:
        assert set(row["phases"]) == {"import", "check", "read_and_place", "compare", "rest_of_load", "first_step"}
        total = sum(phase["median"] for phase in row["phases"].values())
        assert row["total"]["median"] == pytest.approx(total) and min(p["median"] for p in row["phases"].values()) >= 0


def test_peer_that_fails_is_a_row_and_ours_an_error(kept, quick, monkeypatch):
    monkeypatch.setattr(peer_choice, "free_memory", lambda: 10**6)
    found = run_benchmark(settings(kept, batches=(1,), repeats=1))
    assert [row.get("error", "")[:16] for row in found["rows"]] == ["", "the weights need"]
    assert "transformers fp32 failed: the weights need" in format_report(found)
    run = BenchRun(settings(kept))
    run.scratch, run.model = kept, kept / "nowhere"
    for engine, says in (("dolly", "no such directory"), ("hf", "hf fp32 ended with 1: ")):
        with pytest.raises(DollyError, match=says) as caught:
            run.child(Variant(engine, "fp32", "fp32"), prompts={}, new_tokens=2)
        assert "\n" not in str(caught.value)


def test_peers_need_nothing_but_the_standard_library_to_start():
    tree = ast.parse(Path(peers.__file__).read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "12c"], "unknown shape '12c'. Did you mean '12b'?"),
        (["--shape", "60x2x4"], "multiple of 8 times the heads"),
        (["--draft", "2b"], "unknown shape '2b'"),
        (["--peers", "ctranslate"], "unknown peer 'ctranslate'. Did you mean 'ctranslate2'?"),
        (["--quantize", "int9"], "unknown quantize 'int9'"),
        (["--dtype", "fp33"], "unknown dtype 'fp33'"),
        (["--device", "cuda:9"], "'cuda:9' was asked for"),
        (["--batch", "1,x"], "'x' is not a whole number"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--new-tokens", "1"], "must be at least 2"),
        (["--prompt-tokens", "2000"], "over 2048"),
        (["--peer-python", "ctranslate2"], "expected PEER=PYTHON"),
        (["--peer-python", "ctranslate2=/no/python"], "/no/python is not a program"),
        (["--mixed", "4", "--cold"], "--mixed and --cold"),
        (["--quality"], "needs a model"),
        (["--lookup"], "needs --data FILE"),
        (["--lookup", "--data", "/no/file"], "no such file"),
        (["some/model", "--shape", "3b"], "exclude each other"),
        (["/no/such/place"], "no such directory"),
    ],
)
def test_bad_flag_is_one_line_and_exit_code_2(arguments, says, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and says in err


def test_data_that_is_no_record_is_named_with_its_line(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n{"instruction": "a"}\n')
    with pytest.raises(DollyError, match=r"data\.jsonl:2: needs the texts"):
        examples.read_records(str(file))


def test_a_line_separator_inside_a_text_ends_no_record(tmp_path):
    record = {"instruction": "a\u2028b", "response": "c"}
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert examples.read_records(str(file)) == [record]


@pytest.mark.parametrize("engine, name", [(engine, name) for engine, names in peers.FORMATS.items() for name in names])
def test_memory_of_every_format_of_every_peer_is_known(engine, name, monkeypatch):
    run = SimpleNamespace(config=shape_config("3b"), device=torch.device("cpu"))
    monkeypatch.setattr(peer_choice, "free_memory", lambda: 10**12)
    peer_choice.check_memory(run, Variant(engine, name, name))
    monkeypatch.setattr(peer_choice, "free_memory", lambda: 10**9)
    with pytest.raises(DollyError, match=f"the weights need .* GB in {name}, 1.00 GB are free"):
        peer_choice.check_memory(run, Variant(engine, name, name))


def test_callers_are_compared_with_a_list_of_them(kept):
    found = json.loads(json.dumps(run_benchmark(settings(kept, callers=(1, 3), peers=()))))
    rows = found["callers"]["rows"]
    assert [row["callers"] for row in rows] == [1, 3]
    for row in rows:
        shares = [a / b for a, b in zip(row["list_s"]["values"], row["threads_s"]["values"], strict=True)]
        assert min(shares) <= row["share"] <= max(shares)
        assert row["list_tokens_per_s"] == pytest.approx(6 * row["callers"] / row["list_s"]["median"])
    [pause] = found["callers"]["pauses"]
    assert 0 < pause["step_s"]["median"] <= pause["longest_s"]["median"]
    assert "beside somebody else's prompt of 2,000 tokens" in format_report(found)


def test_a_server_is_compared_with_the_engine_and_missing_peers_say_why(kept):
    found = json.loads(json.dumps(run_benchmark(settings(kept, serve=(1, 3), peers=("llamacpp",), repeats=1))))
    rows = {(row["engine"], row["clients"]): row for row in found["serve"]["rows"]}
    assert set(rows) == {(name, count) for name in ("dolly engine", "dolly server") for count in (1, 3)}
    for (_, count), row in rows.items():
        assert row["tokens_per_s"] == pytest.approx(6 * row["requests_per_s"])  # all answers have their length
        assert 0 < row["first_p50_s"] <= row["first_p95_s"] and 0 < row["between_p50_s"] <= row["between_p95_s"]
        assert row["share"] == row["tokens_per_s"] / rows["dolly engine", count]["tokens_per_s"]
    assert "llama-server and --gguf" in found["serve"]["missing"]["llamacpp"]
    assert "llama.cpp: give --peer-python" in format_report(found)


def test_a_server_that_does_not_start_says_why(kept, monkeypatch):
    monkeypatch.setattr(server_speed, "_our_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no')"])
    with pytest.raises(DollyError, match="does not serve: no"):
        run_benchmark(settings(kept, serve=(1,), peers=(), repeats=1))
