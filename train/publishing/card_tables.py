"""The tables of the model card: what the metadata of a run say about data, training, settings and licences."""

from __future__ import annotations

import re

from train.data.data_report import DROPPED
from train.publishing.card_markdown import Rows, Translate, code, hex_digest, number, setting
from train.publishing.run_metadata import RunMetadata

#: Settings that shape the result. No other setting is shown: they may hold paths, addresses and secrets.
HYPERPARAMETERS = (
    "epochs", "global_batch_size", "max_length", "learning_rate", "schedule", "warmup_steps",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_clip", "batching", "seed",
)  # fmt: skip
CHOSEN = ("dtype", "zero_stage", "offload", "checkpoint_activations")
ADAPTER = ("r", "alpha", "dropout")
PROGRAMS = ("modelscope_dolly", "torch", "transformers", "deepspeed", "python")


def data_rows(tr: Translate, metadata: RunMetadata) -> Rows:
    known = metadata.known_dataset
    dropped = [(kind, metadata.get("plan", "report", "dropped", kind)) for kind in DROPPED]
    reasons = [f"`{kind}` {number(count)}" for kind, count in dropped if number(count) and count]
    kept = [number(metadata.get("plan", "records")), number(metadata.get("plan", "records_kept"))]
    lost = number(metadata.get("plan", "records") - metadata.get("plan", "records_kept")) if all(kept) else None
    return [
        (tr("data set", "数据集"), code(metadata.dataset)),
        (tr("recognised by their hash as", "按哈希识别为"), code(known and known.id)),
        (tr("SHA-256 of the records", "记录的 SHA-256"), code(hex_digest(metadata.get("data", "sha256")))),
        (tr("records read", "读入记录"), kept[0]),
        (tr("records kept", "保留记录"), kept[1]),
        (tr("records dropped", "丢弃记录"), lost and ", ".join([lost, *reasons])),
        (tr("held out for evaluation", "留作评估"), number(metadata.get("plan", "records_held_out"))),
        (tr("tokens kept", "保留的词元"), number(metadata.get("plan", "tokens"))),
        (tr("of these, of responses", "其中回答的词元"), number(metadata.get("plan", "label_tokens"))),
    ]


def training_rows(tr: Translate, metadata: RunMetadata) -> Rows:
    revision = metadata.get("base", "revision") if metadata.base_is_on_hub else None
    date = re.match(r"\d{4}-\d\d-\d\d", str(metadata.get("time")), re.ASCII)
    versions = [(name, code(metadata.get("versions", name))) for name in PROGRAMS]
    rows = metadata.evaluations
    return [
        (tr("base model", "基座模型"), code(metadata.base)),
        (tr("its revision", "基座版本"), code(revision)),
        (tr("date", "日期"), date and date[0]),
        (tr("optimizer steps", "优化步数"), number(metadata.get("plan", "steps"))),
        (tr("hash of the batch plan", "批次计划的哈希"), code(hex_digest(metadata.get("plan", "plan_hash")))),
        (tr("hash of the order of records", "记录顺序的哈希"), code(hex_digest(metadata.get("plan", "order_hash")))),
        (tr("starts of the run", "启动次数"), number(len(metadata.starts)) if len(metadata.starts) > 1 else None),
        (tr("processes", "进程数"), number(metadata.get("world"))),
        (tr("hardware", "硬件"), code(metadata.hardware)),
        (tr("weights of step", "权重所属步数"), number(_other_step(metadata))),
        (tr("tokens processed", "处理的词元"), number(total(metadata.steps, "tokens"))),
        (tr("seconds in steps", "各步用时（秒）"), number(total(metadata.steps, "seconds"), 0)),
        (tr("training loss, first and last step", "训练损失（首步与末步）"), first_and_last(metadata.steps, "loss")),
        (tr("held-out loss, first and last", "留出损失（首次与末次）"), first_and_last(rows, "eval_loss")),
        (tr("versions", "软件版本"), ", ".join(f"{name} {version}" for name, version in versions if version)),
    ]


def setting_rows(metadata: RunMetadata) -> Rows:
    # Runs of earlier versions could pad.
    size = "padded_batch_size" if metadata.get("settings", "batching") == "padded" else "tokens_per_batch"
    limited = ["max_steps"] if metadata.get("settings", "max_steps") else []  # 0 means: all
    paths = [("settings", name) for name in (*HYPERPARAMETERS, *limited, size)]
    paths += [*(("chosen", name) for name in CHOSEN), *(("settings", "lora", name) for name in ADAPTER)]
    # A setting that was changed for a resume shows every value, in order.
    values = {keys: filter(None, map(setting, metadata.values(*keys))) for keys in paths}
    return [(f"`{'.'.join(keys[1:])}`", " → ".join(dict.fromkeys(values[keys]))) for keys in paths]


def licence_rows(tr: Translate, metadata: RunMetadata, license: str | None) -> Rows:
    known = metadata.known_dataset
    rows = [
        (tr("this model", "本模型"), code(license)),
        (tr("base model, by its card", "基座模型（据其卡片）"), code(metadata.get("base", "license"))),
        (tr("training records", "训练记录"), code(known and known.licence)),
    ]
    return [row for row in rows if row[1]]


def total(rows: list[dict], name: str) -> float | None:
    values = [row.get(name) for row in rows]
    return sum(values) if values and all(map(number, values)) else None


def first_and_last(rows: list[dict], name: str) -> str:
    values = [text for row in rows if (text := number(row.get(name), 4))]
    return f"{values[0]}, {values[-1]}" if values else ""


def _other_step(metadata: RunMetadata) -> int | None:
    """The step whose weights the model has, where that is not the last one of the plan."""
    step = metadata.get("final", "step")
    return step if isinstance(step, int) and step != metadata.get("plan", "steps") else None
