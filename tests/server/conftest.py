from __future__ import annotations

import pytest

from modelscope_dolly.load import Dolly, load
from tests.support.serving import running


@pytest.fixture(scope="session")
def dolly(checkpoint_dir) -> Dolly:
    return load(checkpoint_dir, "cpu", "fp32")


@pytest.fixture(scope="module")
def server(dolly):
    """With four slots and no key."""
    with running(dolly, idle_seconds=5) as one:
        yield one
