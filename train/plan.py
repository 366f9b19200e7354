"""What a run will do and what it needs, before anything is trained.

    python -m train.plan train/recipes/dolly-v2-3b.yaml                      on this machine
    python -m train.plan train/recipes/dolly-v2-12b.yaml --gpus 8xA100-80G   on hardware described by text

Of the base model only config.json and the tokenizer are read; of the records, all.
"""

from __future__ import annotations

import json
import sys

from modelscope_dolly.cli.exit_codes import exit_code
from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.files import gigabytes
from train.config import Resolved, add_flags, resolve
from train.data.padded import padded_batch_size, padded_plan
from train.planning.hardware import Hardware
from train.planning.memory import checkpoint_bytes, disk_need, final_bytes
from train.planning.zero_stage import ZeroChoice, choose, table
from train.prepare import PreparedData, prepare
from train.training.held_out import keeps_best


def main(arguments: list[str] | None = None) -> int:
    parser = UsageParser(prog="train.plan", description="Plan a fine-tuning run.", allow_abbrev=False)
    add_flags(parser)
    parser.add_argument("--gpus", metavar="HARDWARE", help="plan for other hardware, for instance 8xA100-80G,host=512G")
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    def command() -> int:
        options = parser.parse_args(arguments)
        resolved = resolve(options)
        print(
            json.dumps(figures(resolved, options.gpus), indent=2)
            if options.json
            else description(resolved, options.gpus)
        )
        return 0

    return exit_code(command, "train.plan")


def prepare_and_choose(resolved: Resolved, gpus: str | None) -> tuple[PreparedData, ZeroChoice]:
    config = resolved.config
    hardware = Hardware.parse(gpus) if gpus else Hardware.here(config.output_dir)
    data = prepare(config, max(1, hardware.gpus))
    options = (config.zero_stage, config.offload, config.dtype, config.checkpoint_activations)
    return data, choose(data.job, hardware, *options)


def figures(resolved: Resolved, gpus: str | None = None) -> dict:
    """All of it as a JSON-ready dictionary; `padded_tokens` is what the 2023 batches would process."""
    data, choice = prepare_and_choose(resolved, gpus)
    return {
        **data.summary(),
        "padded_tokens": _padded_tokens(resolved, data),
        "hardware": str(choice.hardware),
        "zero_stage": choice.stage,
        "offload": choice.offload,
        "dtype": choice.dtype,
        "checkpoint_activations": choice.recompute,
        "fits": choice.fits,
        "reason": choice.reason,
        "gpu_bytes": choice.taken.gpu,
        "host_bytes": choice.taken.host,
        "checkpoint_bytes": _checkpoint(data, choice),
        "final_bytes": final_bytes(data.job.parameters, choice.dtype),
    }


def description(resolved: Resolved, gpus: str | None = None) -> str:
    """The same for people."""
    config = resolved.config
    data, choice = prepare_and_choose(resolved, gpus)
    plan, padded = data.plan, _padded_tokens(resolved, data)
    lines = [
        resolved.table(),
        "",
        str(data.checked.report),
        "",
        f"{len(plan.steps)} steps of {config.global_batch_size} records on {plan.world} process(es), "
        f"{plan.accumulation} pass(es) each; largest pass {plan.largest.tokens} tokens",
        f"{plan.processed:,} tokens are processed, {100 * plan.tokens / plan.processed:.1f} % of them useful "
        f"({100 * plan.tokens / plan.waited:.1f} % counting ranks that wait); padded as in 2023 it would be "
        f"{padded:,}, {padded / plan.processed:.2f} times as many",
        f"plan {plan.hash[:16]}, records {data.sha256[:16]}",
        "",
        table(choice),
        f"disk: {_disk(resolved, data, choice)}",
    ]
    return "\n".join(lines)


def _checkpoint(data: PreparedData, choice: ZeroChoice) -> int:
    use_deepspeed = choice.stage > 0 or data.plan.world > 1
    return checkpoint_bytes(data.job.trained, choice.stage, choice.dtype, use_deepspeed)


def _disk(resolved: Resolved, data: PreparedData, choice: ZeroChoice) -> str:
    """What the run will have on disk, against what is free."""
    config, free = resolved.config, choice.hardware.disk
    kept, checkpoint = config.keep_checkpoints + keeps_best(config), _checkpoint(data, choice)
    need = disk_need(data.job, len(data.plan.steps), config.save_every, kept, checkpoint, choice.dtype)
    text = (
        f"up to {gigabytes(need)} ({kept} checkpoints kept, one being written, the final model); "
        f"free: {'not stated' if free is None else gigabytes(free)}"
    )
    too_small = free is not None and need > free
    return f"NOT enough: {text}; lower keep_checkpoints or change output_dir" if too_small else text


def _padded_tokens(resolved: Resolved, data: PreparedData) -> int:
    """Tokens that batches of 6 records, padded to their longest, would process in one process."""
    config, lengths = resolved.config, [len(ids) for ids, _ in data.examples]
    size = padded_batch_size(config.global_batch_size, 1)
    plan = padded_plan(lengths, config.seed, config.epochs, config.global_batch_size, 1, size)
    return (plan.first_steps(config.max_steps) if config.max_steps else plan).processed


if __name__ == "__main__":
    sys.exit(main())
