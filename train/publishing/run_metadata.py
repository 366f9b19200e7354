"""What a finished run recorded about itself: settings and data in run.json, the losses in metrics.jsonl.

A run.json may come from an older version or have been edited: what is missing or of another type counts as unknown.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from modelscope_dolly.checkpoint.download import HUB_ID
from train.data.sources import HUB_DATASET
from train.training.report import read_metrics, read_starts


class KnownDataset(NamedTuple):
    """A data set that is recognised by the hash of its records, wherever they were read from."""

    id: str
    licence: str
    language: str


#: Hash of the records (see sources.Source.sha256) -> what they are. This is databricks-dolly-15k as first released,
#: with 15,015 records.
KNOWN_DATASETS = {
    "fd6924efaf133eb1633ded10992827c471b5fdb3d9bdc49ad31f0fb574d5153e": KnownDataset(
        "databricks/databricks-dolly-15k", "CC BY-SA 3.0", "en"
    )
}


@dataclass(frozen=True)
class RunMetadata:
    """Of one run; empty where there is none.

    Attributes:
        starts: entries of run.json: the last start from step 0, and all resumes after it.
        steps, evaluations: rows of metrics.jsonl.
    """

    starts: list[dict[str, Any]]
    steps: list[dict]
    evaluations: list[dict]

    def get(self, *keys: str) -> Any:
        """The value at a path of keys in the last start; None where there is none."""
        return next(reversed(self.values(*keys)), None)

    def values(self, *keys: str) -> list[Any]:
        """The value at a path of keys in every start."""
        values: list[Any] = self.starts
        for key in keys:
            values = [value.get(key) if isinstance(value, dict) else None for value in values]
        return values

    @property
    def base(self) -> str:
        """Name of the base model: an id on a hub, or of a directory its last part alone."""
        name = self.get("base", "name")
        return name if self.base_is_on_hub else last_part(name)

    @property
    def base_is_on_hub(self) -> bool:
        name = self.get("base", "name")
        return self.get("base", "hub") is True and isinstance(name, str) and bool(HUB_ID.fullmatch(name))

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets: `ms:` or `hf:` and an id, or of a file its last part alone."""
        names = self.get("data", "dataset")
        names = names if isinstance(names, list) else [names]
        return [name if isinstance(name, str) and HUB_DATASET.fullmatch(name[3:]) and name[:3] in ("ms:", "hf:")
                else last_part(name) for name in names]  # fmt: skip

    @property
    def dataset(self) -> str:
        return ", ".join(filter(None, self.datasets))

    @property
    def dataset_ids(self) -> list[str]:
        """Their ids on a hub."""
        if self.known_dataset:
            return [self.known_dataset.id]
        on_hub = [HUB_DATASET.fullmatch(name[3:]) for name in self.datasets if name.startswith(("ms:", "hf:"))]
        return list(dict.fromkeys(match["id"] for match in on_hub if match))

    @property
    def known_dataset(self) -> KnownDataset | None:
        digest = self.get("data", "sha256")
        return KNOWN_DATASETS.get(digest) if isinstance(digest, str) else None

    @property
    def hardware(self) -> str:
        """`8 x NAME`, or CPU."""
        name, gpus = self.get("hardware", "name"), self.get("hardware", "gpus")
        if not isinstance(name, str):
            return ""
        return f"{gpus} x {name}" if isinstance(gpus, int) and gpus > 0 else name


def read_run_metadata(run: Path | None) -> RunMetadata:
    """The metadata in a run's directory; empty for None. Raises CheckpointError: a file is damaged."""
    if run is None:
        return RunMetadata([], [], [])
    starts = read_starts(Path(run) / "run.json")
    fresh = max(i for i, start in enumerate(starts) if i == 0 or start.get("resumed_from") is None)
    steps, evaluations = read_metrics(Path(run))
    return RunMetadata(starts[fresh:], steps, evaluations)


def describe_base(model: str, revision: str, directory: Path) -> dict[str, Any]:
    """What run.json keeps of the base model: its name, for one from a hub its revision, and the licence of its card."""
    hub = not os.path.isdir(os.path.expanduser(model))
    return {"name": model, "hub": hub, "revision": revision if hub else None, "license": card_license(directory)}


def card_license(directory: Path) -> str | None:
    """`license` in the YAML head of a README.md; None where there is none."""
    try:
        text = (directory / "README.md").read_text("utf-8")
        head = re.match(r"---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
        value = yaml.safe_load(head[1])["license"] if head else None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return value if isinstance(value, str) and value else None


def last_part(path: Any) -> str:
    """Of a path of any system: the folders above may be private."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] if isinstance(path, str) else ""
