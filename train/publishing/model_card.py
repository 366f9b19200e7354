"""README.md of a published directory: what the run recorded, in English and Chinese, and nothing else.

One file holds both languages: README.md is the one page that ModelScope and Hugging Face show of a repository, so a
README_zh.md would be seen only by those who look through the list of files.

The YAML head has the keys of both hubs: `tasks` and `frameworks` are ModelScope's, `pipeline_tag`, `library_name` and
`base_model_relation` are Hugging Face's (huggingface/hub-docs, modelcard.md), the others are read by both. `base_model`
and `datasets` must be ids on a hub: what came from a file is named in the text alone.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import yaml

from modelscope_dolly.checkpoint.config import read_config
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.files import write_atomically
from train.publishing.card_markdown import Translate, clean, heading, literal, table, title
from train.publishing.card_tables import data_rows, licence_rows, setting_rows, training_rows
from train.publishing.run_metadata import RunMetadata, read_run_metadata
from train.training.report import draw_loss

NAME, PICTURE = "README.md", "loss.png"
LANGUAGES = "[English](#english) | [中文](#中文)"


def write_card(
    directory: Path,
    model_id: str,
    revision: str,
    run: Path | None = None,
    evaluation: Path | None = None,
    license: str | None = None,
    evaluated: str | None = None,
) -> None:
    """Write README.md, and loss.png where the run has losses, into a directory that is about to be published.

    The same inputs give the same bytes.

    Args:
        directory: with config.json.
        model_id: where it will be published, for the sample.
        revision: the tag that the sample pins.
        run: directory of the run, with run.json and metrics.jsonl.
        evaluation: what `dolly eval --output` wrote.
        license: of the result, as the hubs spell it; left out where it is not known.
        evaluated: digest of the model that the evaluation must be of (manifest.model_digest); None: all rows are shown.

    Raises:
        CheckpointError: run.json, metrics.jsonl or config.json cannot be read.
        SettingError: `evaluation` has no results, or none of this model.
    """
    directory = Path(directory)
    metadata = read_run_metadata(run)
    picture = bool(metadata.steps) and run is not None and copy_picture(Path(run), directory)
    measured = evaluation_section(Path(evaluation), evaluated, model_id) if evaluation else ""
    parts = [f"---\n{yaml_head(metadata, license)}---", heading(1, title(model_id)), LANGUAGES]
    for name, tr in (("English", lambda english, _: english), ("中文", lambda _, chinese: chinese)):
        parts += [heading(2, name), introduction(tr, directory), sample(tr, model_id, revision)]
        parts += body(tr, metadata, license, picture, measured)
    write_atomically(directory / NAME, "\n\n".join(parts) + "\n")


def copy_picture(run: Path, directory: Path) -> bool:
    """Copy the run's loss.png, drawn now if it is missing; False where it cannot be drawn."""
    if not (run / PICTURE).exists() and draw_loss(run) is None:
        return False
    (directory / PICTURE).unlink(missing_ok=True)  # perhaps a link to another directory's file
    shutil.copyfile(run / PICTURE, directory / PICTURE)
    return True


def evaluation_section(evaluation: Path, evaluated: str | None, model_id: str) -> str:
    """The table of `dolly eval`, beside the published rows. Raises SettingError: there is none."""
    from modelscope_dolly.evaluation.tables import markdown_table

    table = markdown_table(evaluation, evaluated, model_id if evaluated else None)
    return table.strip().replace("<", "&lt;")  # the table has the names of models as they are


def yaml_head(
    metadata: RunMetadata, license: str | None, relation: str = "finetune", library: str = "transformers"
) -> str:
    """The YAML between the two lines of dashes; `relation` is to the base model."""
    known, on_hub = metadata.known_dataset, metadata.base_is_on_hub
    values = {
        "tasks": ["text-generation"],
        "frameworks": ["pytorch"],
        "pipeline_tag": "text-generation",
        "library_name": library,
        "license": clean(license) if license else None,
        "language": [known.language] if known else None,
        "base_model": [metadata.base] if on_hub else None,
        "base_model_relation": relation if on_hub else None,
        "datasets": metadata.dataset_ids,
        "tags": ["dolly-v2", "gpt_neox", *(["lora"] if metadata.get("settings", "lora") else [])],
    }
    kept = {key: value for key, value in values.items() if value}
    return yaml.safe_dump(kept, allow_unicode=True, sort_keys=False, width=10_000)


def body(tr: Translate, metadata: RunMetadata, license: str | None, picture: bool, measured: str) -> Iterable[str]:
    """The paragraphs of one language, from the training data on."""
    if metadata.starts:
        yield heading(3, tr("Training data", "训练数据"))
        yield table(tr, data_rows(tr, metadata))
        yield heading(3, tr("Training", "训练"))
        yield table(tr, training_rows(tr, metadata))
        if picture:
            yield f"![{tr('loss per response token', '每个回答词元的损失')}]({PICTURE})"
        yield heading(3, tr("Settings", "超参数"))
        yield table(tr, setting_rows(metadata))
    if measured:
        yield heading(3, tr("Evaluation", "评测"))
        yield measured
    yield heading(3, tr("Limitations", "局限"))
    yield "\n".join(f"- {line}" for line in limitations(tr, metadata, bool(measured)))
    licences = licence_rows(tr, metadata, license)
    if licences:
        yield heading(3, tr("Licence", "许可证"))
        yield table(tr, licences)


def introduction(tr: Translate, directory: Path) -> str:
    config = read_config(directory)
    weights = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    return tr(
        f"A GPT-NeoX network of {weights:,} weights ({config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"window of {config.max_position_embeddings} tokens), trained to answer instructions in the prompt format of "
        "dolly-v2.",
        f"GPT-NeoX 网络，共 {weights:,} 个权重（{config.num_hidden_layers} 层，宽度 {config.hidden_size}，窗口 "
        f"{config.max_position_embeddings} 个词元），按 dolly-v2 的提示格式训练，用于回答指令。",
    )


def sample(tr: Translate, model_id: str, revision: str) -> str:
    comment = tr("registers the pipeline; package modelscope-dolly", "注册 pipeline；软件包 modelscope-dolly")
    device = tr('"gpu": the first GPU, else the CPU', '"gpu"：第一块 GPU，没有则用 CPU')
    code = f"""```python
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
import modelscope_dolly  # {comment}

pipe = pipeline(
    Tasks.text_generation,
    model={literal(model_id)},
    model_revision={literal(revision)},
    device="gpu",  # {device}
)
print(pipe("Explain to me the difference between nuclear fission and fusion.")["text"])
```"""
    after = tr(
        "No code of this repository is run, and no trust flag is needed. `chat_template.jinja` renders the same prompt "
        "for servers and for `apply_chat_template`; `manifest.json` has the SHA-256 of every file.",
        "不会运行本仓库中的任何代码，也不需要信任开关。`chat_template.jinja` 为各种推理服务和 "
        "`apply_chat_template` 生成同样的提示；`manifest.json` 记有每个文件的 SHA-256。",
    )
    return f"{heading(3, tr('Use', '使用'))}\n\n{code}\n\n{after}"


def limitations(tr: Translate, metadata: RunMetadata, measured: bool) -> Iterable[str]:
    yield tr(
        "Each input is answered by itself: this is not a dialogue model. Of a chat only the last user message is read, "
        "and a system message becomes the context.",
        "每个输入单独回答，不是对话模型。对于多轮聊天，只读取最后一条用户消息，系统消息作为上下文。",
    )
    yield tr(
        "Servers that tokenize the rendered chat template turn prompt keys typed by their users into control tokens; "
        "`modelscope_dolly` does not.",
        "对渲染后的聊天模板做分词的推理服务，会把用户输入的提示关键字变成控制词元；`modelscope_dolly` 不会。",
    )
    if not measured:
        yield tr("No evaluation is part of this card.", "本卡片不含评测结果。")
    yield tr(
        "Nothing is recorded about how true, fair or harmless the answers are: test that for your use.",
        "关于回答是否真实、公平、无害，没有任何记录：请针对您的用途自行测试。",
    )
