"""One served page for all tests of this folder: to start one takes seconds."""

from __future__ import annotations

import pytest

from tests.support.web_page import serve


@pytest.fixture(scope="package")
def page(checkpoint_dir):
    pytest.importorskip("gradio", reason="gradio is not installed; modelscope-dolly[web] brings it")
    with serve(checkpoint_dir) as served:
        yield served
