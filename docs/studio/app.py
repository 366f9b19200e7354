"""A ModelScope Studio that answers with dolly-v2: the model is fetched and quantised once, then the page is served."""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: The disk of a Studio that outlives restarts.
HOME = Path(os.environ.get("DOLLY_HOME", "/mnt/workspace/dolly"))
os.environ.setdefault("MODELSCOPE_CACHE", str(HOME / "hub"))  # read when ModelScope is imported

from modelscope_dolly.checkpoint.download import locate  # noqa: E402
from modelscope_dolly.checkpoint.quantize import quantize_checkpoint  # noqa: E402
from modelscope_dolly.errors import DollyError  # noqa: E402
from modelscope_dolly.load import Dolly, load  # noqa: E402
from modelscope_dolly.web import launch  # noqa: E402


def ready_model(model: str, revision: str | None, quantize: str, home: Path) -> Dolly:
    """The model, from its quantised copy in `home` if there is one; else that copy is written first."""
    if quantize == "none":
        return load(locate(model, revision), device="cpu")
    name = "--".join([*model.strip("/").split("/")[-2:], revision or "newest", quantize])
    copy = home / name
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        print(quantize_checkpoint(locate(model, revision), copy, quantize), flush=True)
    return load(copy, device="cpu")


def main() -> int:
    try:
        launch.check_packages()
        launch.check_address("0.0.0.0", launch.PORT)
        dolly = ready_model(
            os.environ.get("DOLLY_MODEL", "AI-ModelScope/dolly-v2-3b"),
            os.environ.get("DOLLY_REVISION") or None,
            os.environ.get("DOLLY_QUANTIZE", "int8"),
            HOME,
        )
        with launch.serving(dolly, "0.0.0.0", launch.PORT) as page:
            print(f"serving {dolly.checkpoint.path} on {page.local_url}", flush=True)
            page.server.thread.join()
    except DollyError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    return 1


if __name__ == "__main__":
    sys.exit(main())
