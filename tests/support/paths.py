"""Where things are, for tests in any folder."""

from pathlib import Path

import pytest

#: The checkout.
ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
#: Material for tests and measurements that lies beside a developer's checkout, and on nobody else's machine.
SHARED_DATA = ROOT.parent / "shared" / "data"

needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason=f"databricks-dolly-15k and the GPT-NeoX tokenizer are not in {SHARED_DATA}"
)
