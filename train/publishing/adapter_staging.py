"""An adapter directory becomes a revision of its own: its two files, the record of its base, a card, a manifest."""

from __future__ import annotations

import shutil
from pathlib import Path

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.adapter import BASE, CONFIG, WEIGHTS, AdapterFacts, check_alone
from modelscope_dolly.errors import CheckpointError
from modelscope_dolly.files import file_kind, new_directory, write_atomically
from train.publishing.card_markdown import code, heading, literal, table, title
from train.publishing.model_card import LANGUAGES, NAME, body, copy_picture, yaml_head
from train.publishing.publish_settings import PublishSettings
from train.publishing.run_metadata import last_part, read_run_metadata
from train.publishing.staging import (
    StagedRevision,
    check_replaceable,
    link_or_copy,
    list_files,
    resolve_inside,
    staged_writing,
)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no model."""
    return file_kind(directory / CONFIG) == "file" and file_kind(directory / "config.json") is None


def stage_adapter(
    source: str | Path, settings: PublishSettings, run: Path | None = None, parent: Path | None = None
) -> StagedRevision:
    """Make `NAME.staged` of an adapter directory NAME, as staging.stage does of a model.

    Args:
        source: the directory.
        settings: name, revision and licence, for the card.
        run: directory with run.json and metrics.jsonl (default: the parent of `source`, if it has a run.json).
        parent: where to put it (default: beside `source`).

    Raises:
        CheckpointError: the adapter is damaged, or does not say which base it is of.
        DollyError: the staged directory cannot be written.
    """
    source = Path(source).resolve()
    facts = check_alone(source)
    target = (Path(parent).resolve() if parent else source.parent) / f"{source.name}.staged"
    check_replaceable(target)
    if run is None and (source.parent / "run.json").is_file():
        run = source.parent
    with staged_writing(target), new_directory(target, replace=True) as directory:
        weights_as = link_or_copy(resolve_inside(source, WEIGHTS), directory / WEIGHTS)
        for name in (CONFIG, BASE):
            shutil.copyfile(resolve_inside(source, name), directory / name)
        write_card(directory, settings, facts, run)
        manifest.write(directory)
        listed, staged = manifest.read(source) or {}, manifest.read(directory) or {}
        changed = [name for name in (WEIGHTS, CONFIG, BASE) if name in listed and listed[name] != staged[name]]
        if changed:
            raise CheckpointError(f"{source / changed[0]}: its content changed since {manifest.NAME} was written")
        names = {path.name for path in directory.iterdir()}
    left_out = sorted(path.name + "/" * path.is_dir() for path in source.iterdir() if path.name not in names)
    return StagedRevision(target, list_files(target), left_out, weights_as)


def write_card(directory: Path, settings: PublishSettings, facts: AdapterFacts, run: Path | None) -> None:
    """README.md of an adapter, in English and Chinese, and loss.png where the run has losses."""
    metadata = read_run_metadata(run)
    picture = bool(metadata.steps) and run is not None and copy_picture(Path(run), directory)
    head = yaml_head(metadata, settings.license, relation="adapter", library="peft")
    parts = [f"---\n{head}---", heading(1, title(settings.model_id)), LANGUAGES]
    base = metadata.base if metadata.base_is_on_hub else "BASE"
    sample = f"""```python
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
import modelscope_dolly

pipe = pipeline(
    Tasks.text_generation, model={literal(base)}, adapter={literal(f"{settings.model_id}@{settings.revision}")}
)
```"""
    for name, tr in (("English", lambda english, _: english), ("中文", lambda _, chinese: chinese)):
        what = tr(
            f"A LoRA adapter (rank {facts.rank}, alpha {facts.alpha:g}) of a GPT-NeoX, for the prompts of dolly-v2. "
            "It is merged into its base while that is loaded; any other base is refused by the SHA-256 below. "
            "`peft.PeftModel.from_pretrained` reads it as well.",
            f"GPT-NeoX 的 LoRA 适配器（秩 {facts.rank}，alpha {facts.alpha:g}），采用 dolly-v2 的提示格式。"
            "加载基座模型时合并；其他基座会按下面的 SHA-256 被拒绝。`peft.PeftModel.from_pretrained` 也能读取。",
        )
        rows = [
            (tr("Base model", "基座模型"), code(metadata.base or last_part(facts.base_name))),
            (tr("SHA-256 of its weights", "其权重的 SHA-256"), code(facts.base_digest)),
        ]
        parts += [heading(2, name), what, heading(3, tr("Use", "使用")), sample, table(tr, rows)]
        parts += body(tr, metadata, settings.license, picture, "")
    write_atomically(directory / NAME, "\n\n".join(parts) + "\n")
