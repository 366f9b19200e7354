"""The recipe: fine-tune a GPT-NeoX on instruction records, as dolly-v2 was, without its padding.

    python -m train.finetune train/recipes/dolly-v2-3b.yaml                       one process
    deepspeed --module train.finetune train/recipes/dolly-v2-3b.yaml              all GPUs of this machine
    torchrun --nproc-per-node 8 --module train.finetune train/recipes/dolly-v2-3b.yaml

Reads from top to bottom: settings, records, plan, hardware, model, training, export, publishing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import re
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXForCausalLM, PrinterCallback, ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging as transformers_logging

import modelscope_dolly
from modelscope_dolly.checkpoint.check import check_directory
from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.errors import DollyError, PublishError, SettingError
from modelscope_dolly.files import read_json, write_atomically
from train.bench import peak_memory
from train.config import Parser, Resolved, TrainConfig, add_flags, resolve
from train.data.batch_plan import Plan
from train.planning.memory import checkpoint_bytes, disk_need
from train.planning.zero_stage import Hardware, choose
from train.prepare import Prepared, prepare
from train.publish import after_training, before_training
from train.publishing.run_metadata import describe_base
from train.training import packed_attention as attention
from train.training.checkpoints import RunCheckpoint, check_disk, choose_resume, taken_by_checkpoints, writing
from train.training.elastic_resume import AfterConversion, Start, convert_together, starting_point
from train.training.lora import Lora, add_adapters, check_lora, merge
from train.training.progress import Progress
from train.training.report import draw_loss, summary
from train.training.trainer import DollyTrainer, LossOf, Metrics, PlannedPasses, SaveOnSignal, StopOnBadLoss

FINAL = "final"
_NEIGHBOUR_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("train.finetune", "Fine-tune dolly-v2.")
    add_flags(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    if "WORLD_SIZE" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ:
        # One process is one GPU: left alone, transformers would split each pass over all that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    try:
        run(resolve(parser.parse(arguments)))
    except DollyError as error:
        # All processes find the same mistakes. What has a cause outside may have gone wrong in this one alone.
        if _rank() == 0 or error.__cause__ is not None:
            print(f"train.finetune: {error}", file=sys.stderr)
        return 1 if isinstance(error, PublishError) else 2
    except RuntimeError as error:  # gloo has no type of its own
        if not _NEIGHBOUR_GONE.search(str(error)):
            raise
        text = "another process of this run ended; its message says why"
        print(f"train.finetune: process {_rank()}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(resolved: Resolved) -> Path:
    """Train as configured; returns the directory of the finished model.

    Raises:
        DollyError: bad settings or records, before anything is written; or a run that cannot go on.
    """
    config = resolved.config
    world, first = _world(), _rank() == 0
    say = print if first else _silent
    say(resolved.table())
    output = Path(config.output_dir)
    if (output / FINAL).exists():
        raise SettingError(f"{output / FINAL}: this run is finished; give another output_dir, or remove it")

    reporters(config)
    publish = config.publish if first and "DOLLY_BENCH" not in os.environ else None
    if publish:
        before_training(publish)

    # Records and plan: every process makes the same ones.
    made = prepare(config, world)
    tokenizer, plan, lora = made.tokenizer, made.plan, made.lora
    say(made.checked.report)
    say(", ".join(f"{name} {value}" for name, value in plan.summary().items()))

    # Hardware: what fits, and why.
    job = made.job
    hardware = see_hardware(output, world)
    wishes = {"offload": config.offload, "dtype": config.dtype, "recompute": config.checkpoint_activations}
    choice = choose(job, hardware, config.zero_stage, **wishes)
    use_deepspeed = choice.stage > 0 or world > 1
    say(f"{choice.dtype} ({choice.dtype_reason}); ZeRO {choice.stage}, offload {choice.offload} ({choice.reason})")
    say(
        "optimizer by DeepSpeed" if use_deepspeed else "one process and ZeRO 0: transformers' Trainer without DeepSpeed"
    )
    need = disk_need(job, len(plan.steps), config.save_every, config.keep_checkpoints, choice.dtype)
    check_disk(output, need - taken_by_checkpoints(output), "the run")
    resume, lines = choose_resume(output, config.resume, plan.order_hash)
    for line in lines:
        say(line)
    start = starting_point(resume, world, choice.stage, use_deepspeed, config.zero_stage == "auto")
    for line in [*start.lines, *changed_settings(output / "run.json", config, resume)]:
        say(line)
    check_lora(lora, start.stage, resume.path if resume else None)
    use_deepspeed = start.use_deepspeed
    if start.stage != choice.stage:
        choice = choose(job, hardware, str(start.stage), **wishes)

    # Training. The arguments come before the model: with ZeRO 3 they make from_pretrained shard while it loads.
    if first:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            record_run(output / "run.json", resolved, made, choice, world, resume)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    set_seed(config.seed)
    if use_deepspeed:
        # DeepSpeed calls torch by names of last year, hundreds of times.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
        if "RANK" not in os.environ:
            launch_alone()
    arguments = training_arguments(config, plan, choice, start)
    convert_together(start, world, first)
    model = load_base(made.base, tokenizer, config, choice, use_deepspeed, arguments.device)
    if lora:
        model = add_adapters(model, lora, tokenizer)
    metrics = Metrics(output / "metrics.jsonl", plan)
    trainer = DollyTrainer(
        config,
        plan,
        checkpoint_bytes(job.trained),
        made.held_out,
        model=model,
        args=arguments,
        train_dataset=PlannedPasses(plan, made.examples, tokenizer.control.eos, config.batching == "padded"),
        callbacks=[metrics, Progress(plan), StopOnBadLoss(), AfterConversion(start), stopper := SaveOnSignal()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    agree(trainer, choice)
    trainer.train(resume_from_checkpoint=str(start.path) if start.path else None)
    if stopper.received:
        raise DollyError(f"stopped by SIGTERM at step {trainer.state.global_step}; the same command goes on from there")

    # Export: whatever spread the weights over processes brings them together here.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if first and "DOLLY_BENCH" in os.environ:
        write_atomically(output / "peak.json", json.dumps({"bytes": peak_memory()}) + "\n")
    elif first:
        with writing(output / FINAL):
            finish(trainer, state, tokenizer, choice.dtype, output / FINAL, lora)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    if publish:
        after_training(publish, output / FINAL)
    return output / FINAL


def launch_alone() -> None:
    """Set what a launcher would have set: without it DeepSpeed looks for MPI."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def see_hardware(output: Path, world: int) -> Hardware:
    """The machine, as far as this process may look at it."""
    if world == 1:
        return Hardware.here(output)
    local_rank, local_world = (int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return Hardware.of_process(output, local_rank, world, local_world or world)


def agree(trainer: DollyTrainer, choice: Any) -> None:
    """Raise DollyError unless all processes chose alike: they looked at free memory at slightly different times."""
    world = trainer.args.world_size
    if world == 1:
        return
    chosen: list[Any] = [None] * world
    torch.distributed.all_gather_object(chosen, (choice.stage, choice.offload, choice.dtype, choice.recompute))
    if len(set(chosen)) > 1:
        raise DollyError(
            f"the processes chose different settings, {sorted(set(chosen))}; set zero_stage, offload, dtype and "
            "checkpoint_activations"
        )


def training_arguments(config: TrainConfig, plan: Plan, choice: Any, start: Start) -> TrainingArguments:
    """The Trainer's settings; batches and schedule are the plan's and ours."""
    report_to = reporters(config)
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


def reporters(config: TrainConfig) -> list[str]:
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


def deepspeed_settings(choice: Any) -> dict:
    """DeepSpeed's configuration: what differs from its defaults. `auto` takes the Trainer's value."""
    zero: dict[str, Any] = {"stage": choice.stage, "overlap_comm": True, "contiguous_gradients": True}
    # DeepSpeed's buckets of 5e8 elements would take several GB that the plan counts as free.
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


def load_base(
    base: Path, tokenizer: Any, config: TrainConfig, choice: Any, use_deepspeed: bool, device: torch.device
) -> LossOf:
    """The base model, its vocabulary cut or extended to the tokenizer's, as the public recipe does.

    In float32; but DeepSpeed casts a network to its half type before it makes its float32 master weights, so there it
    is loaded as that, which is the same and takes half the memory; and what stays frozen under adapters needs no more.
    Straight onto the GPU, or every process of a machine would hold a copy in host memory; with ZeRO 3 transformers
    shards it while it loads instead.
    """
    implementation = "sdpa" if config.batching == "padded" else attention.NAME
    model, report = GPTNeoXForCausalLM.from_pretrained(
        str(base),
        dtype=HALF.get(choice.dtype, torch.float32) if use_deepspeed or config.lora else torch.float32,
        device_map={"": device} if device.type == "cuda" and choice.stage < 3 else None,
        attn_implementation=implementation,
        output_loading_info=True,
    )
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise DollyError(
            f"{base}: {len(wrong)} weights were not loaded, among them {wrong[0]}; run: dolly check {base}"
        )
    if model.config.vocab_size != len(tokenizer.tokenizer):
        model.resize_token_embeddings(len(tokenizer.tokenizer), mean_resizing=False)
    if choice.recompute:
        # Renamed in transformers 5; the old name goes in 6.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return LossOf(model)


def finish(
    trainer: DollyTrainer, state: dict, tokenizer: Any, dtype: str, target: Path, lora: Lora | None = None
) -> None:
    """Export the trained weights, read the result back, and say what is wrong with it if anything is."""
    saved = HALF.get(dtype, torch.float32)
    trained = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    model = trained.network
    if lora:
        model = merge(trained, lora, tokenizer, trainer.config.model, target.parent / "adapter")
        state = model.state_dict()
    model.config.dtype = saved
    weights = {name.removeprefix("network."): tensor.to(saved) for name, tensor in state.items()}
    export_checkpoint(model, tokenizer, target, state=weights)
    problems = [finding.detail for finding in check_directory(target) if finding.status == "problem"]
    if problems:
        raise DollyError(f"{target} was written, but is not sound: {'; '.join(problems)}")
    draw_loss(target.parent)
    print(summary(target.parent))
    print(f"wrote {target}; try: dolly ask --model {target} 'Name three colours.'")


def record_run(
    path: Path, resolved: Resolved, made: Prepared, choice: Any, world: int, resume: RunCheckpoint | None
) -> None:
    """run.json: every setting with its origin, versions, and hashes; earlier starts of the same run are kept in it."""
    versions = {
        name: sys.modules[name].__version__ for name in ("torch", "transformers", "deepspeed") if name in sys.modules
    }
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": dataclasses.asdict(resolved.config),
        "origins": resolved.origins,
        "data": {"dataset": resolved.config.dataset, "sha256": made.data_sha256},
        "plan": made.summary() | {"order_hash": made.plan.order_hash},
        "base": describe_base(resolved.config.model, resolved.config.model_revision, made.base),
        "world": world,
        "hardware": {"name": choice.hardware.name, "gpus": choice.hardware.gpus},
        "chosen": {
            "dtype": choice.dtype,
            "zero_stage": choice.stage,
            "offload": choice.offload,
            "checkpoint_activations": choice.recompute,
        },
        "reason": choice.reason,
        "resumed_from": str(resume.path) if resume else None,
        "versions": {"modelscope_dolly": modelscope_dolly.__version__, "python": platform.python_version(), **versions},
    }
    earlier = json.loads(path.read_text())["starts"] if path.exists() else []
    write_atomically(path, json.dumps({"starts": [*earlier, start]}, indent=2, ensure_ascii=False) + "\n")


def changed_settings(path: Path, config: TrainConfig, resume: RunCheckpoint | None) -> list[str]:
    """A line for each setting that is not what the run so far had; those that change the plan are refused elsewhere."""
    if resume is None or not path.exists():
        return []
    before = read_json(path)["starts"][-1]["settings"]
    now = dataclasses.asdict(config)
    free = {"resume", "output_dir", "save_every", "keep_checkpoints", "report_to", "publish"}
    names = [name for name in now if name not in free and before.get(name, now[name]) != now[name]]
    return [f"changed since the last start: {name} was {before[name]!r}, is {now[name]!r}" for name in names]


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _silent(*_: object) -> None:
    """What processes other than the first print."""


if __name__ == "__main__":
    sys.exit(main())
