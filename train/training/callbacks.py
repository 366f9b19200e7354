"""What the Trainer calls during a run: metrics.jsonl, progress on the terminal, what stands out, and the stop at a bad
loss, a signal, or the end of the time."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable
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
from train.training.spikes import SpikeDetector

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


class SpikeLog(TrainerCallback):
    """A line for each step that stands out; see spikes.py.

    Args:
        warmup_steps: of the schedule.
        rows: of metrics.jsonl from earlier starts of the run.
    """

    def __init__(self, warmup_steps: int, rows: Iterable[dict] = ()):
        self.detector = SpikeDetector(warmup_steps)
        for row in rows:
            self.detector.add(row)

    def on_log(self, args, state, control, logs=None, **keywords):
        if args.process_index == 0 and logs and "loss" in logs:
            row = {"step": state.global_step, "loss": logs["loss"], "grad_norm": logs.get("grad_norm")}
            for spike in self.detector.add(row | {"lr": logs.get("learning_rate")}):
                tqdm.write(f"stands out: {spike}")


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


class SaveAndStop(TrainerCallback):
    """Finish the step, save and stop: on SIGTERM, which job schedulers send before they take the machine away, and
    when a step and a save more would go beyond the time that this start has.

    Args:
        max_hours: since `begun`; 0: no limit.
        begun: time.monotonic() when this start began.
        save_seconds: how long the last save took, asked for at every step.
    """

    def __init__(self, max_hours: float = 0.0, begun: float = 0.0, save_seconds: Callable[[], float] = lambda: 0.0):
        self.received = self.out_of_time = False
        self.deadline = begun + 3600 * max_hours if max_hours else math.inf
        self.save_seconds = save_seconds
        self._last_step, self._longest = time.monotonic(), 0.0
        self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number, frame):
        self.received = True

    def on_train_begin(self, args, state, control, **keywords):
        self._last_step = time.monotonic()

    def on_step_end(self, args, state, control, **keywords):
        now = time.monotonic()
        # From the end of one step to that of the next: with an evaluation or a save between them.
        self._longest, self._last_step = max(self._longest, now - self._last_step), now
        self.out_of_time = now + self._longest + self.save_seconds() >= self.deadline
        if args.world_size > 1:  # both come to the processes at different times, and none can save alone
            asked = torch.tensor([float(self.received), float(self.out_of_time)], device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.received, self.out_of_time = map(bool, asked.tolist())
        if self.received or (self.out_of_time and state.global_step < state.max_steps):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **keywords):
        signal.signal(signal.SIGTERM, self._previous_handler)
