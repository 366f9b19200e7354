"""The recipe's settings in the words of transformers' Trainer and of DeepSpeed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from modelscope_dolly.errors import SettingError
from train.config import TrainConfig
from train.data.batch_plan import BatchPlan
from train.planning.zero_stage import ZeroChoice
from train.training.elastic_resume import StartingPoint


def training_arguments(
    config: TrainConfig, plan: BatchPlan, choice: ZeroChoice, start: StartingPoint
) -> TrainingArguments:
    """The Trainer's settings. Batches come from the plan and the schedule from schedule.py."""
    report_to = report_backends(config)
    if "tensorboard" in report_to:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(config.output_dir) / "tensorboard"))
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=len(plan.steps),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.gradient_clip,
        optim="adamw_torch",
        bf16=choice.dtype == "bf16",
        fp16=choice.dtype == "fp16",
        use_cpu=choice.hardware.cpu_only,
        deepspeed=deepspeed_settings(choice) | start.deepspeed_settings if start.use_deepspeed else None,
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="steps" if config.eval_every and config.test_size else "no",
        eval_steps=config.eval_every or None,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # StopOnBadLoss must see them
        report_to=report_to or "none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        seed=config.seed,
        disable_tqdm=None if sys.stderr.isatty() else True,
    )


def report_backends(config: TrainConfig) -> list[str]:
    """The names in report_to. Raises SettingError for one that is not installed."""
    names = [name for part in config.report_to.split(",") if (name := part.strip()) not in ("", "none")]
    installed = get_available_reporting_integrations()
    missing = [name for name in names if name not in installed]
    if missing:
        raise SettingError(
            f"report_to names {', '.join(missing)}, which is not installed here; install it, or take one of these: "
            f"{', '.join([*sorted(installed), 'none'])}"
        )
    return names


def deepspeed_settings(choice: ZeroChoice) -> dict[str, Any]:
    """DeepSpeed's configuration: what differs from its defaults. `auto` takes the Trainer's value."""
    zero: dict[str, Any] = {"stage": choice.stage, "overlap_comm": True, "contiguous_gradients": True}
    # DeepSpeed's default buckets of 5e8 elements would take several GB that the plan counts as free.
    zero |= {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    settings: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": choice.dtype == "bf16"},
        "fp16": {"enabled": choice.dtype == "fp16"},
        "steps_per_print": 2**31 - 1,
    }
    if choice.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero |= {"stage3_prefetch_bucket_size": 50_000_000, "stage3_max_live_parameters": 300_000_000}
    if choice.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        settings["optimizer"] = {"type": "AdamW", "params": adam}  # the one that computes on the host
    if choice.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if choice.hardware.cpu_only:
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling that gloo does without
    return settings
