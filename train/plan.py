"""What a run will do and what it takes, before anything is trained.

    python -m train.plan train/recipes/dolly-v2-3b.yaml                      on the hardware that is here
    python -m train.plan train/recipes/dolly-v2-12b.yaml --gpus 8xA100-80G   on hardware that is not

Of the base model only config.json and the tokenizer are read; of the records, all.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from modelscope_dolly.errors import DollyError, HardwareError
from train.config import Parser, Resolved, add_flags, resolve
from train.planning.memory import checkpoint_bytes, disk_need, final_bytes
from train.planning.zero_stage import Choice, Hardware, check_disk, choose, table
from train.prepare import Prepared, make_plan, prepare


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("train.plan", "Plan a fine-tuning run.")
    add_flags(parser)
    parser.add_argument(
        "--gpus", metavar="HARDWARE", help="hardware that is not here, for instance 8xA100-80G,host=512G"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse(arguments)
        resolved = resolve(options)
        print(json.dumps(figures(resolved, options.gpus), indent=2) if options.json else report(resolved, options.gpus))
    except DollyError as error:
        print(f"train.plan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _look(resolved: Resolved, gpus: str | None) -> tuple[Prepared, Choice]:
    config = resolved.config
    hardware = Hardware.parse(gpus) if gpus else Hardware.here(Path(config.output_dir))
    world = max(1, hardware.gpus)
    made = prepare(config, world)
    wishes = (config.zero_stage, config.offload, config.dtype, config.checkpoint_activations)
    choice = choose(made.job, hardware, *wishes)
    return made, choice


def figures(resolved: Resolved, gpus: str | None = None) -> dict:
    """All of it as a JSON-ready dictionary; `padded_tokens` is what the 2023 batches would process."""
    made, choice = _look(resolved, gpus)
    job = made.job
    return {
        **made.summary(),
        "padded_tokens": _padded_tokens(resolved, made),
        "hardware": str(choice.hardware),
        "zero_stage": choice.stage,
        "offload": choice.offload,
        "dtype": choice.dtype,
        "checkpoint_activations": choice.recompute,
        "fits": choice.fits,
        "reason": choice.reason,
        "gpu_bytes": choice.taken.gpu,
        "host_bytes": choice.taken.host,
        "checkpoint_bytes": checkpoint_bytes(job.trained),
        "final_bytes": final_bytes(job.parameters, choice.dtype),
    }


def report(resolved: Resolved, gpus: str | None = None) -> str:
    """The same for people."""
    config = resolved.config
    made, choice = _look(resolved, gpus)
    plan = made.plan
    summary = made.summary()
    padded = _padded_tokens(resolved, made)
    try:
        need = disk_need(made.job, len(plan.steps), config.save_every, config.keep_checkpoints, choice.dtype)
        disk = check_disk(need, choice.hardware, config.keep_checkpoints)
    except HardwareError as error:
        disk = f"NOT enough: {error}"
    lines = [
        resolved.table(),
        "",
        str(made.checked.report),
        "",
        f"{len(plan.steps)} steps of {config.global_batch_size} records on {plan.world} process(es), "
        f"{plan.accumulation} pass(es) each; largest pass {plan.largest[0]} tokens",
        f"{plan.processed:,} tokens are processed, {100 * summary['useful_share']:.1f} % of them useful "
        f"({100 * summary['useful_share_with_waiting']:.1f} % counting ranks that wait); padded as in 2023 it would be "
        f"{padded:,}, {padded / plan.processed:.2f} times as many",
        f"plan {plan.hash[:16]}, records {made.data_sha256[:16]}",
        "",
        table(choice),
        f"disk: {disk}",
    ]
    return "\n".join(lines)


def _padded_tokens(resolved: Resolved, made: Prepared) -> int:
    """Tokens that batches of padded_batch_size records, padded to their longest, would process in one process."""
    config = dataclasses.replace(resolved.config, batching="padded", padded_batch_size=_divisor(resolved.config))
    return make_plan(config, [len(ids) for ids, _ in made.examples], 1).processed


def _divisor(config) -> int:
    """padded_batch_size, or the largest smaller number that divides the global batch."""
    sizes = range(1, min(config.padded_batch_size, config.global_batch_size) + 1)
    return max(size for size in sizes if config.global_batch_size % size == 0)


if __name__ == "__main__":
    sys.exit(main())
