"""The recipe: fine-tune a GPT-NeoX on instruction records, as dolly-v2 was, without its padding.

    python -m train.finetune train/recipes/dolly-v2-3b.yaml                       one process
    deepspeed --module train.finetune train/recipes/dolly-v2-3b.yaml              all GPUs of this machine
    torchrun --nproc-per-node 8 --module train.finetune train/recipes/dolly-v2-3b.yaml

Reads from top to bottom: the run directory, records, batch plan, hardware, resuming, training, export, comparison,
publishing.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.weights import weight_files
from modelscope_dolly.cli.exit_codes import exit_code
from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.cli.streams import complain
from modelscope_dolly.errors import DollyError, PublishError
from modelscope_dolly.files import check_disk
from modelscope_dolly.locks import FileLock
from train.config import Resolved, add_flags, resolve
from train.data.collate import PassDataset
from train.data.data_report import DataReport, RecordsRefused
from train.distributed import check_agreement, is_first_process, launch_alone, print_first, rank, world_size
from train.planning.hardware import Hardware
from train.planning.memory import checkpoint_bytes, disk_need
from train.planning.zero_stage import ZeroChoice, choose
from train.prepare import Batching, PreparedData, prepare
from train.publish import after_training, before_training
from train.publishing.run_metadata import describe_base
from train.training.arguments import report_backends, training_arguments
from train.training.before_after import compare_before_after
from train.training.callbacks import MetricsFile, Progress, SaveAndStop, SpikeLog, StopOnBadLoss, StopWithoutLock
from train.training.checkpoints import DISK_REMEDY, Origin, existing_checkpoint_bytes, step_of, writing
from train.training.elastic_resume import AfterConversion, StartingPoint, convert_together, starting_point
from train.training.held_out import EarlyStopping, HeldOutLosses, best_checkpoint, keeps_best
from train.training.lora import check_resume
from train.training.model import export_model, load_base
from train.training.report import METRICS, draw_loss, read_metrics, summary
from train.training.report_sections import add_comparison, run_sections
from train.training.resume_choice import ResumeChoice, choose_resume, origin_of
from train.training.run_directory import FINAL, finish, prepare_directory
from train.training.run_json import record_end, record_start
from train.training.run_lock import locked
from train.training.run_report import write_report
from train.training.samples import Samples
from train.training.trainer import DollyTrainer

_PEER_EXITED = re.compile(r"Connection (closed|reset) by peer|Broken pipe")


def main(arguments: list[str] | None = None) -> int:
    parser = UsageParser(prog="train.finetune", description="Fine-tune dolly-v2.", allow_abbrev=False)
    add_flags(parser)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    program = "train.finetune"
    return exit_code(lambda: told_by_first(program, lambda: run(resolve(parser.parse_args(arguments)))), program)


def told_by_first(program: str, recipe: Callable[[], object]) -> int:
    """Run a recipe in this process, one of several; print what went wrong on one line, once. Returns the exit code."""
    if "WORLD_SIZE" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ:
        # One process is one GPU: left alone, transformers would split each pass over all that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    try:
        with cleaning_up_at_sigterm():
            recipe()
    except DollyError as error:
        # All processes find the same mistakes. An error with a cause outside may concern this process alone.
        if is_first_process() or error.__cause__ is not None:
            complain(str(error), program)
        return 1 if isinstance(error, PublishError) else 2
    except RuntimeError as error:  # gloo has no type of its own
        if not _PEER_EXITED.search(str(error)):
            raise
        complain(f"process {rank()}: another process of this run ended; its message says why", program)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


@contextmanager
def cleaning_up_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the first process by way of its `finally` blocks: nothing half-written stays. SaveOnSignal is for
    the steps themselves."""
    if not is_first_process() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame):
        print("stopped by SIGTERM; the same command goes on from here", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(resolved: Resolved) -> Path:
    """Train as configured; returns the directory of the finished model, or of the run where its time ended before.

    Raises:
        DollyError: bad settings or records, or another run in the same directory, before anything is written; or a run
            that cannot continue.
    """
    begun = time.monotonic()
    config = resolved.config
    print_first(resolved.table())
    output = Path(config.output_dir)
    final = output / FINAL
    with locked(output) if is_first_process() else nullcontext((None, [])) as (lock, lines):
        print_first(*lines)
        publish = config.publish if is_first_process() else None
        if final.exists():
            if is_first_process():
                finish(config, final)
        else:
            if publish:
                before_training(publish)
            setup = set_up(resolved)
            trained = train(setup, lock, begun)
            if trained.out_of_time:
                trained.trainer.accelerator.end_training()
                print_first(trained.why)
                return output
            export(setup, trained, final)
            del trained  # its memory is for the two models that are compared
            if is_first_process():
                look_back(setup, final)
        if publish:
            after_training(publish, final)
    return final


@dataclass(frozen=True)
class Setup:
    """What is decided before the model is loaded, the same in every process."""

    resolved: Resolved
    data: PreparedData
    choice: ZeroChoice
    origin: Origin
    resume: ResumeChoice
    start: StartingPoint
    checkpoint_bytes: int  # what one checkpoint will take
    samples: Samples | None = None


def set_up(resolved: Resolved, batching: Batching | None = None) -> Setup:
    """Read the records, plan the batches, choose how the states fit, and find where to resume. Nothing is written.

    Raises:
        DollyError: bad settings or records, too little memory or disk, or a checkpoint that does not match.
    """
    config = resolved.config
    output, world = Path(config.output_dir), world_size()
    report_backends(config)

    # Records and batch plan.
    try:
        data = prepare(config, world, batching)
    except RecordsRefused as error:
        raise RecordsRefused(f"{error}{_all_problems(error.report, output)}") from None
    print_first(data.checked.report, ", ".join(f"{name} {value}" for name, value in data.plan.summary().items()))

    samples = Samples(config, data.tokenizer, data.held_out_records) if config.samples else None

    # Memory and disk: what fits, and why.
    hardware, job = Hardware.of_this_run(output), data.job
    options = {"offload": config.offload, "dtype": config.dtype, "recompute": config.checkpoint_activations}
    choice = choose(job, hardware, config.zero_stage, **options)
    use_deepspeed = choice.stage > 0 or world > 1
    print_first(
        f"{choice.dtype} ({choice.dtype_reason}); ZeRO {choice.stage}, offload {choice.offload} ({choice.reason})",
        "optimizer by DeepSpeed" if use_deepspeed else "one process and ZeRO 0: the Trainer alone, without DeepSpeed",
    )
    checkpoint = checkpoint_bytes(job.trained, choice.stage, choice.dtype, use_deepspeed)
    kept = config.keep_checkpoints + keeps_best(config)
    need = disk_need(job, len(data.plan.steps), config.save_every, kept, checkpoint, choice.dtype)
    check_disk(output, need - existing_checkpoint_bytes(output), "the run", DISK_REMEDY)

    # Where to resume.
    origin = origin_of(config, data, choice.dtype)
    resume = choose_resume(output, config.resume, origin)
    print_first(*resume.lines)
    saved = resume.checkpoint
    start = starting_point(saved, world, choice.stage, use_deepspeed, config.zero_stage == "auto")
    print_first(*start.lines)
    check_resume(data.lora, saved.path if saved else None)
    if start.stage != choice.stage:
        choice = choose(job, hardware, str(start.stage), **options)
    return Setup(resolved, data, choice, origin, resume, start, checkpoint, samples)


def _all_problems(report: DataReport, output: Path) -> str:
    """Write what is wrong with the records, and say where; the message has the first ten."""
    if not is_first_process():
        return ""
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        return f"; all of them are in {report.write_problems(output)}"


class Trained(NamedTuple):
    """A trainer after its last step; `why` it ended before that of the plan, if it did."""

    trainer: DollyTrainer
    losses: HeldOutLosses
    why: str | None = None
    out_of_time: bool = False


def train(setup: Setup, lock: FileLock | None = None, begun: float | None = None) -> Trained:
    """Train from the base model or a checkpoint to the last step, or to where the settings end it.

    Args:
        setup: from set_up.
        lock: of the run directory; the training stops when another run has taken it over.
        begun: time.monotonic() of the start, from which max_hours counts (default: now).

    Raises:
        DollyError: out of memory or disk, a loss that is not finite, or stopped by SIGTERM.
    """
    config, data, choice, start = setup.resolved.config, setup.data, setup.choice, setup.start
    output = Path(config.output_dir)
    weight_files(locate(config.model, config.model_revision))
    if is_first_process():
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
            prepare_directory(output, setup.resume)
            if problems := data.checked.report.write_problems(output):
                print(f"what is noted about the records is in {problems}")
            base = describe_base(config.model, config.model_revision, data.base)
            record_start(output / "run.json", setup.resolved, data, choice, base, setup.resume.checkpoint)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    set_seed(config.seed)
    if start.use_deepspeed:
        # DeepSpeed calls torch by outdated names, hundreds of times.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
        launch_alone()

    # The arguments come before the model: with ZeRO 3 they make from_pretrained shard while it loads.
    arguments = training_arguments(config, data.plan, choice, start)
    convert_together(start)
    model = load_base(data, choice, start.use_deepspeed, arguments.device)
    reached = setup.resume.checkpoint.step if setup.resume.checkpoint else 0
    steps, evaluations = ([row for row in rows if row["step"] <= reached] for rows in read_metrics(output))
    losses = HeldOutLosses(evaluations)
    stopper = SaveAndStop(config.max_hours, time.monotonic() if begun is None else begun, lambda: trainer.save_seconds)
    callbacks = [
        MetricsFile(output / METRICS, data.plan), Progress(data.plan), SpikeLog(config.warmup_steps, steps),
        StopOnBadLoss(), StopWithoutLock(lock), AfterConversion(start), early := EarlyStopping(config, losses), stopper,
    ]  # fmt: skip
    passes = PassDataset(data.plan, data.examples, data.tokenizer.control.eos, data.batching.collate)
    trainer = DollyTrainer(
        config, passes, setup.checkpoint_bytes, data.held_out, setup.origin, losses if keeps_best(config) else None,
        setup.samples, model=model, args=arguments, callbacks=callbacks,
    )  # fmt: skip
    check_agreement((choice.stage, choice.offload, choice.dtype, choice.recompute))
    trainer.train(resume_from_checkpoint=str(start.path) if start.path else None)
    if stopper.received:
        raise DollyError(f"stopped by SIGTERM at step {trainer.state.global_step}; the same command resumes from there")
    if stopper.out_of_time and trainer.state.global_step < trainer.state.max_steps and early.reason is None:
        saved = output / f"checkpoint-{trainer.state.global_step}"
        why = f"max_hours is {config.max_hours:g}: ended with {saved}, complete; the same command goes on from there"
        return Trained(trainer, losses, why, out_of_time=True)
    return Trained(trainer, losses, early.reason)


def export(setup: Setup, trained: Trained, final: Path) -> None:
    """Gather the weights from all processes, write the finished model, and summarize the run.

    Raises:
        DollyError: it cannot be written, or what was written has a problem.
    """
    trainer = trained.trainer
    best = best_checkpoint(final.parent, trained.losses) if setup.resolved.config.final_from == "best" else None
    lines = [trained.why] if trained.why else []
    if best:
        loss = trained.losses.losses[step_of(best)]
        lines.append(f"final/ has the weights of {best.name}, the best of those saved: held-out loss {loss:.4f}")
    state = None if setup.data.lora else trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if is_first_process():
        with writing(final):
            # Before: where there is a final/, only publishing is left.
            draw_loss(final.parent)
            record_end(final.parent / "run.json", step_of(best) if best else trainer.state.global_step, lines)
            sections = run_sections(final.parent, setup.data.checked.report)
            write_report(final.parent, setup.resolved.config.warmup_steps, lines, sections)
            export_model(trainer, state, setup.data, setup.choice.dtype, final, best)
        print(*lines, summary(final.parent), sep="\n")
        print(f"wrote {final}; try: dolly ask --model {final} 'Name three colours.'")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def look_back(setup: Setup, final: Path) -> None:
    """Compare the result with its base."""
    gc.collect()  # the trainer is gone, and its memory is for the two models
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    data = setup.data
    compare_before_after(setup.resolved.config, data.base, final, data.held_out_records)
    with writing(final.parent):
        add_comparison(final.parent)


if __name__ == "__main__":
    sys.exit(main())
