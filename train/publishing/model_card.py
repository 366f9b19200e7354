"""README.md of a published directory: what the run recorded, in English and Chinese, and not a word more.

One file holds both languages: README.md is the one page that ModelScope and Hugging Face show of a repository, so a
README_zh.md would be read by those who look through the list of files.

The YAML head has the keys of both hubs: `tasks` and `frameworks` are ModelScope's, `pipeline_tag`, `library_name` and
`base_model_relation` are Hugging Face's (huggingface/hub-docs, modelcard.md), the others are read by both. `base_model`
and `datasets` must be ids on a hub: what came from a file is named in the text alone.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from modelscope_dolly.checkpoint.manifest import write_atomically
from modelscope_dolly.checkpoint.reader import read_config
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from train.data.validate import DROPPED
from train.publishing.run_metadata import Record, last_part, read_record
from train.training.report import draw_loss

NAME, PICTURE = "README.md", "loss.png"
#: Settings that shape the result. No other setting is shown: they may hold paths, addresses and secrets.
HYPERPARAMETERS = (
    "epochs", "global_batch_size", "max_length", "learning_rate", "schedule", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_clip", "batching", "seed",
)  # fmt: skip
CHOSEN = ("dtype", "zero_stage", "offload", "checkpoint_activations")
ADAPTER = ("r", "alpha", "dropout")
PROGRAMS = ("modelscope_dolly", "torch", "transformers", "deepspeed", "python")
Say = Callable[[str, str], str]  # of an English and a Chinese text, the one of the language being written
Rows = list[tuple[str, str]]


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
        license: of the result, as the hubs spell it; left out where nobody gave one.
        evaluated: digest of the files that the evaluation must be of; None: not known, all of its rows are shown.

    Raises:
        CheckpointError: run.json, metrics.jsonl or config.json cannot be read.
        SettingError: no evaluation of these files is there.
    """
    directory = Path(directory)
    record = read_record(run)
    picture = bool(record.steps) and run is not None and copy_picture(Path(run), directory)
    measured = evaluation_section(Path(evaluation), evaluated, model_id) if evaluation else ""
    parts = [f"---\n{head(record, license)}---", heading(1, title(model_id)), "[English](#english) | [中文](#中文)"]
    for name, say in (("English", lambda english, _: english), ("中文", lambda _, chinese: chinese)):
        parts += [heading(2, name), introduction(say, directory), sample(say, model_id, revision)]
        parts += body(say, record, license, picture, measured)
    write_atomically(directory / NAME, "\n\n".join(parts) + "\n")


def copy_picture(run: Path, directory: Path) -> bool:
    """Copy the run's loss.png, drawn now if it is missing; False where it cannot be drawn."""
    if not (run / PICTURE).exists() and draw_loss(run) is None:
        return False
    (directory / PICTURE).unlink(missing_ok=True)  # perhaps a link to another directory's file
    shutil.copyfile(run / PICTURE, directory / PICTURE)
    return True


def evaluation_section(evaluation: Path, evaluated: str | None, model_id: str) -> str:
    """The table that `dolly eval` left, beside the published rows. Raises SettingError: it left none there."""
    from modelscope_dolly.evaluation.results import markdown_table

    table = markdown_table(evaluation, evaluated, model_id if evaluated else None)
    return table.strip().replace("<", "&lt;")  # names of models stand in it as they are


def head(record: Record, license: str | None) -> str:
    """The YAML between the two lines of dashes."""
    known, hub = record.known_data, record.base_is_on_hub
    values = {
        "tasks": ["text-generation"],
        "frameworks": ["pytorch"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "license": clean(license) if license else None,
        "language": [known.language] if known else None,
        "base_model": [record.base] if hub else None,
        "base_model_relation": "finetune" if hub else None,
        "datasets": [record.data_id] if record.data_id else None,
        "tags": ["dolly-v2", "gpt_neox", *(["lora"] if record.get("settings", "lora") else [])],
    }
    kept = {key: value for key, value in values.items() if value}
    return yaml.safe_dump(kept, allow_unicode=True, sort_keys=False, width=10_000)


def body(say: Say, record: Record, license: str | None, picture: bool, measured: str) -> Iterable[str]:
    """The paragraphs of one language, from the training data on."""
    if record.starts:
        yield heading(3, say("Training data", "训练数据"))
        yield table(say, data_rows(say, record))
        yield heading(3, say("Training", "训练"))
        yield table(say, training_rows(say, record))
        if picture:
            yield f"![{say('loss per response token', '每个回答词元的损失')}]({PICTURE})"
        yield heading(3, say("Settings", "超参数"))
        yield table(say, setting_rows(record))
    if measured:
        yield heading(3, say("Evaluation", "评测"))
        yield measured
    yield heading(3, say("Limitations", "局限"))
    yield "\n".join(f"- {line}" for line in limitations(say, record, bool(measured)))
    licences = licence_rows(say, record, license)
    if licences:
        yield heading(3, say("Licence", "许可证"))
        yield table(say, licences)


def introduction(say: Say, directory: Path) -> str:
    config = read_config(directory)
    weights = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    return say(
        f"A GPT-NeoX network of {weights:,} weights ({config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"window of {config.max_position_embeddings} tokens), trained to answer instructions in the prompt format of "
        "dolly-v2.",
        f"GPT-NeoX 网络，共 {weights:,} 个权重（{config.num_hidden_layers} 层，宽度 {config.hidden_size}，窗口 "
        f"{config.max_position_embeddings} 个词元），按 dolly-v2 的提示格式训练，用于回答指令。",
    )


def sample(say: Say, model_id: str, revision: str) -> str:
    comment = say("registers the pipeline; package modelscope-dolly", "注册 pipeline；软件包 modelscope-dolly")
    place = say('"gpu": the first GPU, else the CPU', '"gpu"：第一块 GPU，没有则用 CPU')
    code = f"""```python
from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks
import modelscope_dolly  # {comment}

pipe = pipeline(
    Tasks.text_generation,
    model={literal(model_id)},
    model_revision={literal(revision)},
    device="gpu",  # {place}
)
print(pipe("Explain to me the difference between nuclear fission and fusion.")["text"])
```"""
    after = say(
        "No code of this repository is run, and no trust flag is needed. `chat_template.jinja` renders the same prompt "
        "for servers and for `apply_chat_template`; `manifest.json` has the SHA-256 of every file.",
        "不会运行本仓库中的任何代码，也不需要信任开关。`chat_template.jinja` 为各种推理服务和 "
        "`apply_chat_template` 生成同样的提示；`manifest.json` 记有每个文件的 SHA-256。",
    )
    return f"{heading(3, say('Use', '使用'))}\n\n{code}\n\n{after}"


def data_rows(say: Say, record: Record) -> Rows:
    known = record.known_data
    dropped = [(kind, record.get("plan", "report", "dropped", kind)) for kind in DROPPED]
    reasons = [f"`{kind}` {number(count)}" for kind, count in dropped if number(count) and count]
    kept = [number(record.get("plan", "records")), number(record.get("plan", "records_kept"))]
    lost = f"{record.get('plan', 'records') - record.get('plan', 'records_kept'):,}" if all(kept) else None
    return [
        (say("records of", "数据集"), code(record.data)),
        (say("recognised by their hash as", "按哈希识别为"), code(known and known.id)),
        (say("SHA-256 of the records", "记录的 SHA-256"), code(digest(record.get("data", "sha256")))),
        (say("records read", "读入记录"), kept[0]),
        (say("records kept", "保留记录"), kept[1]),
        (say("records dropped", "丢弃记录"), lost and ", ".join([lost, *reasons])),
        (say("held out for evaluation", "留作评估"), number(record.get("plan", "records_held_out"))),
        (say("tokens kept", "保留的词元"), number(record.get("plan", "tokens"))),
        (say("of these, of responses", "其中回答的词元"), number(record.get("plan", "label_tokens"))),
    ]


def training_rows(say: Say, record: Record) -> Rows:
    revision = record.get("base", "revision") if record.base_is_on_hub else None
    date = re.match(r"\d{4}-\d\d-\d\d", str(record.get("time")), re.ASCII)
    versions = [(name, code(record.get("versions", name))) for name in PROGRAMS]
    return [
        (say("base model", "基座模型"), code(record.base)),
        (say("its revision", "基座版本"), code(revision)),
        (say("date", "日期"), date and date[0]),
        (say("optimizer steps", "优化步数"), number(record.get("plan", "steps"))),
        (say("hash of the batch plan", "批次计划的哈希"), code(digest(record.get("plan", "plan_hash")))),
        (say("hash of the order of records", "记录顺序的哈希"), code(digest(record.get("plan", "order_hash")))),
        (say("starts of the run", "启动次数"), number(len(record.starts)) if len(record.starts) > 1 else None),
        (say("processes", "进程数"), number(record.get("world"))),
        (say("hardware", "硬件"), code(record.hardware)),
        (say("tokens processed", "处理的词元"), number(total(record.steps, "tokens"))),
        (say("seconds in steps", "各步用时（秒）"), number(total(record.steps, "seconds"), 0)),
        (say("training loss, first and last step", "训练损失（首步与末步）"), ends(record.steps, "loss")),
        (say("held-out loss, first and last", "留出损失（首次与末次）"), ends(record.evaluations, "eval_loss")),
        (say("versions", "软件版本"), ", ".join(f"{name} {found}" for name, found in versions if found)),
    ]


def setting_rows(record: Record) -> Rows:
    # Runs of earlier versions could pad.
    size = "padded_batch_size" if record.get("settings", "batching") == "padded" else "tokens_per_batch"
    limited = ["max_steps"] if record.get("settings", "max_steps") else []  # 0 means: all
    places = [("settings", name) for name in (*HYPERPARAMETERS, *limited, size)]
    places += [*(("chosen", name) for name in CHOSEN), *(("settings", "lora", name) for name in ADAPTER)]
    # What a resume has changed shows every value, in order.
    values = {place: filter(None, map(setting, record.all(*place))) for place in places}
    return [(f"`{'.'.join(place[1:])}`", " → ".join(dict.fromkeys(values[place]))) for place in places]


def licence_rows(say: Say, record: Record, license: str | None) -> Rows:
    known = record.known_data
    rows = [
        (say("this model", "本模型"), code(license)),
        (say("base model, by its card", "基座模型（据其卡片）"), code(record.get("base", "license"))),
        (say("training records", "训练记录"), code(known and known.licence)),
    ]
    return [row for row in rows if row[1]]


def limitations(say: Say, record: Record, measured: bool) -> Iterable[str]:
    yield say(
        "Each input is answered by itself: this is not a dialogue model. Of a chat only the last user message is read, "
        "and a system message becomes the context.",
        "每个输入单独回答，不是对话模型。对于多轮聊天，只读取最后一条用户消息，系统消息作为上下文。",
    )
    yield say(
        "Servers that tokenize the rendered chat template turn prompt keys typed by their users into control tokens; "
        "`modelscope_dolly` does not.",
        "对渲染后的聊天模板做分词的推理服务，会把用户输入的提示关键字变成控制词元；`modelscope_dolly` 不会。",
    )
    if not measured:
        yield say("No evaluation is part of this card.", "本卡片不含评测结果。")
    yield say(
        "Nothing is recorded about how true, fair or harmless the answers are: test that for your use.",
        "关于回答是否真实、公平、无害，没有任何记录：请针对您的用途自行测试。",
    )


def heading(level: int, text: str) -> str:
    return f"{'#' * level} {text}"


def table(say: Say, rows: Rows) -> str:
    """The rows that have a value. Cells must be single lines without a bare `|`: see `code`."""
    lines = [f"| {label} | {value} |" for label, value in rows if value]
    return "\n".join([f"| {say('what', '项目')} | {say('value', '值')} |", "|---|---|", *lines])


def clean(text: str) -> str:
    """On one line, without what is invisible or has no UTF-8 form."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def code(value: Any) -> str:
    """A text of somebody else as a code span for a table's cell, where nothing in it is Markdown; "" for no text."""
    text = clean(value) if isinstance(value, str) else ""
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    # A `|` would end the cell, also in a code span, and readers differ in what a backslash before it does.
    return f"{fence}{space}{text.replace('|', '¦')}{space}{fence}"


def title(model_id: str) -> str:
    """The name for the heading; plain where it can be."""
    name = clean(last_part(model_id))
    return name if re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", name, re.ASCII) else code(name)


def literal(text: str) -> str:
    """A Python string; with double quotes where nothing speaks against it."""
    return f'"{text}"' if re.fullmatch(r"[\w./-]*", text, re.ASCII) else ascii(text)


def digest(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,128}", value) else ""


def number(value: Any, digits: int | None = None) -> str:
    """With separators for thousands; "" for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return ""
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def setting(value: Any) -> str:
    return f"`{json.dumps(value)}`" if isinstance(value, (bool, int, float)) else code(value)


def total(rows: list[dict], name: str) -> float | None:
    values = [row.get(name) for row in rows]
    return sum(values) if values and all(map(number, values)) else None


def ends(rows: list[dict], name: str) -> str:
    values = [text for row in rows if (text := number(row.get(name), 4))]
    return f"{values[0]}, {values[-1]}" if values else ""
