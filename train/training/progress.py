"""Progress of a run: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback

from train.data.batch_plan import Plan

#: Seconds between lines where there is no terminal.
QUIET = 20.0


class Progress(TrainerCallback):
    """Steps, loss, useful tokens per second, their share of all processed tokens, and the time that is left."""

    def __init__(self, plan: Plan):
        self.plan, self.share = plan, plan.tokens / plan.processed
        self.bar: tqdm | None = None
        self.began = self.said = time.monotonic()
        self.first = self.tokens = 0

    def on_train_begin(self, args, state, control, **keywords):
        self.first, self.began = state.global_step, time.monotonic()
        if args.process_index == 0 and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", desc="Training")

    def on_log(self, args, state, control, logs=None, **keywords):
        if args.process_index != 0 or not logs:
            return
        if "eval_loss" in logs:
            self._say(f"step {state.global_step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        self.tokens += self.plan.step_tokens[state.global_step - 1]
        seconds = max(time.monotonic() - self.began, 1e-9)
        speed = f"{self.tokens / seconds:,.0f} tokens/s, {100 * self.share:.0f} % useful"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {speed}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)
        elif time.monotonic() - self.said > QUIET or state.global_step == state.max_steps:
            left = seconds / max(1, state.global_step - self.first) * (state.max_steps - state.global_step)
            self._say(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, {speed}, {_clock(left)} left"
            )

    def on_train_end(self, args, state, control, **keywords):
        if self.bar is not None:
            self.bar.close()

    def _say(self, line: str) -> None:
        self.said = time.monotonic()
        tqdm.write(line) if self.bar is not None else print(line, flush=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
