"""What Triton's compiler makes of the kernels of a decode step, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA on Linux")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Every launch of a decode step of 3b and 12b, for capability 8.0 and 9.0 (support/compiled_kernels.py)."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "compiled_kernels.py"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def halves(made: list[dict], **constants) -> list[dict]:
    """The linear layers that use tensor cores: those of float16 and bfloat16."""
    found = [one for one in made if one["tensor_cores"]]
    return [one for one in found if all(one["constants"][name] == value for name, value in constants.items())]


def test_all_of_them_compile_and_fit(compiled):
    assert {one["capability"] for one in compiled} == {80, 90}
    assert {one["kernel"] for one in compiled} == {"_linear", "_two_norms", "_attend"}
    for one in compiled:
        assert one["stack"] == one["local"] == 0, f"registers are spilt: {one}"
        assert one["shared"] <= 99 << 10, one


def test_weights_are_copied_16_bytes_at_a_time_and_several_pieces_ahead(compiled):
    checked = 0
    for one in compiled:
        c = one["constants"]
        if not c.get("EVEN"):  # no linear layer, or the smallest
            continue
        size = 2 if one["tensor_cores"] else 4
        weights = c["PARTS"] * c["BLOCK_N"] * c["BLOCK_K"] * (c["BITS"] or 8 * size) // 8
        x = c["PARTS"] * c["BLOCK_M"] * c["BLOCK_K"] * size
        ahead = c["STAGES"] - 1
        per_piece = (weights + x) // (16 * 32 * one["warps"])
        # The loop copies one piece, and what is before it the others.
        assert one["copies"].count(16) == (ahead + 1) * per_piece, one
        assert set(one["copies"]) == ({8, 16} if c["BITS"] == 4 else {16})  # 8: four scales of float16
        if c["BLOCK_M"] == 8 and one["tensor_cores"]:
            assert 2560 // c["BLOCK_N"] * ahead * weights >= 2.6e6  # under way in all, to keep an H100 busy
        checked += 1
    assert checked >= 40


def test_half_precision_uses_tensor_cores_without_repetition(compiled):
    for bits in (0, 4, 8):
        found = halves(compiled, BITS=bits)
        assert {one["constants"]["BLOCK_M"] for one in found} == {8, 16, 32}
        for one in found:
            c = one["constants"]
            # An instruction takes 16 outputs, 8 rows and 16 inputs; each warp has its own inputs.
            assert len(one["tensor_cores"]) == c["BLOCK_N"] * c["BLOCK_M"] * c["BLOCK_K"] // (16 * 8 * 16)
            assert all(name.startswith("mma.sync.aligned.m16n8k16.row.col.f32.") for name in one["tensor_cores"])


def test_the_order_of_sums_is_the_same_for_every_number_of_rows(compiled):
    """Same instruction, same split over warps, same order of inputs; only how often it is done differs."""
    for bits in (0, 4, 8):
        for capability in (80, 90):
            found = [one for one in halves(compiled, BITS=bits) if one["capability"] == capability]
            assert len({json.dumps(one["layouts"]) for one in found if one["constants"]["EVEN"]}) == 1
            assert len({one["constants"]["BLOCK_K"] for one in found}) == 1
            assert all("warpsPerCTA = [4, 1, 1]" in " ".join(one["layouts"]) for one in found)


def test_norms_and_attention_read_16_bytes_at_a_time(compiled):
    norms = [one for one in compiled if one["kernel"] == "_two_norms" and one["warps"] > 4]
    attention = [one for one in compiled if one["kernel"] == "_attend" and one["constants"]["D"] > 2]
    assert norms and attention
    for one in norms:
        assert set(one["loads"]) == {"ld.global.v4.b32"}
    for one in attention:  # keys and values; the few of the new token come as they lie
        assert set(one["copies"]) == {16} and len(one["copies"]) == 24
