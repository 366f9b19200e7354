"""What the Trainer calls during a run: metrics.jsonl, progress on the terminal, the stop at a bad loss or a signal."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from modelscope_dolly.errors import DollyError
from modelscope_dolly.locks import FileLock
from train.data.batch_plan import BatchPlan
from train.training.checkpoints import writing
from train.training.report import cut_metrics

#: Seconds between lines of progress where there is no terminal.
PROGRESS_INTERVAL = 20.0


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one object per optimizer step, appended at once; cut back to the step that a run resumes from."""

    def __init__(self, path: Path, plan: BatchPlan):
        self.path, self.plan = path, plan
        self._step_start = time.perf_counter()

    def on_train_begin(self, args, state, control, **keywords):
        if args.process_index == 0:
            with writing(self.path):
                cut_metrics(self.path, state.global_step)
        self._step_start = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **keywords):
        if args.process_index != 0 or not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        row: dict[str, Any] = {"step": state.global_step}
        if "eval_loss" in logs:
            row["eval_loss"] = logs["eval_loss"]
        else:
            now = time.perf_counter()
            seconds, self._step_start = now - self._step_start, now
            tokens = self.plan.step_tokens[state.global_step - 1]
            row |= {"loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": logs.get("learning_rate")}
            row |= {"tokens": tokens, "seconds": round(seconds, 4), "useful_tokens_per_s": round(tokens / seconds, 1)}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


class Progress(TrainerCallback):
    """A bar on a terminal, elsewhere a line now and then: steps, loss, useful tokens per second, time left."""

    def __init__(self, plan: BatchPlan):
        self.plan, self.useful_share = plan, plan.tokens / plan.processed
        self.bar: tqdm | None = None
        self.train_start = self.last_line = time.monotonic()
        self.first_step = self.tokens = 0

    def on_train_begin(self, args, state, control, **keywords):
        self.first_step, self.train_start = state.global_step, time.monotonic()
        if args.process_index == 0 and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="Training")

    def on_log(self, args, state, control, logs=None, **keywords):
        if args.process_index != 0 or not logs:
            return
        if "eval_loss" in logs:
            self._print(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.tokens += self.plan.step_tokens[state.global_step - 1]
        seconds = max(time.monotonic() - self.train_start, 1e-9)
        status = (
            f"loss {logs['loss']:.4f}, {self.tokens / seconds:,.0f} tokens/s, {100 * self.useful_share:.0f} % useful"
        )
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        elif time.monotonic() - self.last_line > PROGRESS_INTERVAL or state.global_step == state.max_steps:
            left = seconds / max(1, state.global_step - self.first_step) * (state.max_steps - state.global_step)
            self._print(f"step {state.global_step}/{state.max_steps}: {status}, {_clock(left)} left")

    def on_train_end(self, args, state, control, **keywords):
        if self.bar is not None:
            self.bar.close()

    def _print(self, line: str) -> None:
        self.last_line = time.monotonic()
        tqdm.write(line) if self.bar is not None else print(line, flush=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class StopOnBadLoss(TrainerCallback):
    """Stop after several losses in a row that are not finite, or exactly zero: the run does not recover from that."""

    def __init__(self, limit: int = 3):
        self.limit, self.bad_steps = limit, 0

    def on_log(self, args, state, control, logs=None, **keywords):
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.bad_steps = 0 if math.isfinite(loss) and loss != 0.0 else self.bad_steps + 1
        if self.bad_steps >= self.limit:
            raise DollyError(
                f"loss was {loss} for {self.bad_steps} steps in a row, up to step {state.global_step}; lower "
                "learning_rate, or use dtype bf16 or fp32, and go on from the last complete checkpoint, which is "
                "untouched: --resume DIR"
            )


class StopWithoutLock(TrainerCallback):
    """Stop before a step is saved in a directory that another run has taken over; see run_lock.py."""

    def __init__(self, lock: FileLock | None):
        self.lock = lock

    def on_step_end(self, args, state, control, **keywords):
        if self.lock is not None:
            self.lock.check()


class SaveOnSignal(TrainerCallback):
    """On SIGTERM, which job schedulers send before they take the machine away: finish the step, save, stop."""

    def __init__(self):
        self.received = False
        self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number, frame):
        self.received = True

    def on_step_end(self, args, state, control, **keywords):
        if args.world_size > 1:  # the signal reaches the processes at different times, and none can save alone
            received = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            self.received = bool(received)
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **keywords):
        signal.signal(signal.SIGTERM, self._previous_handler)
