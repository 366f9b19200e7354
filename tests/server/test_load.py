"""A slice of the load test; `python -m tests.server.load_test` is the whole of it."""

from __future__ import annotations

from tests.server import load_test


def test_a_server_under_load_answers_as_alone_and_is_afterwards_as_before(checkpoint_dir, tmp_path):
    figures = load_test.run(checkpoint_dir, tmp_path / "log.txt", seconds=15.0, clients=64)
    assert figures["problems"] == []
    assert figures["completed"] > 0
