"""transformers' Trainer, driven by a batch plan: it decides nothing about batches, order or the scale of the loss."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPTNeoXForCausalLM, Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from modelscope_dolly.errors import DollyError, HardwareError
from modelscope_dolly.files import write_atomically
from train.config import TrainConfig
from train.data.batch_plan import Plan
from train.training.checkpoints import check_disk, mark_complete, prune, remove, writing
from train.training.loss import Example, label_count, packed_batch, padded_batch, response_loss


class LossOf(torch.nn.Module):
    """A network whose forward pass gives the loss of a planned pass, so that DeepSpeed sees one call per pass.

    Around the network, not a subclass of it: transformers renames `embed_out` on disk to `lm_head` in memory by the
    name of the class, and leaves the head of any other class at random values with no more than a warning.
    """

    def __init__(self, network: GPTNeoXForCausalLM):
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, labels: torch.Tensor, label_total: int, **inputs: Any) -> CausalLMOutput:
        """See loss.response_loss; `label_total` is that of the whole global batch."""
        return CausalLMOutput(loss=response_loss(self.network, {**inputs, "labels": labels}, label_total))


class PlannedPasses(Dataset):
    """The plan as a sequence of forward passes: step by step, turn by turn, one item per rank.

    Accelerate deals items out to ranks in turn, so item i goes to rank i % world.
    """

    def __init__(self, plan: Plan, examples: Sequence[Example], filler: int, padded: bool):
        self.plan, self.examples, self.filler = plan, examples, filler
        self.make = padded_batch if padded else packed_batch
        self.label_totals = [
            label_count([examples[i] for rank in step for records in rank for i in records]) for step in plan.steps
        ]

    def __len__(self) -> int:
        return len(self.plan.steps) * self.plan.accumulation * self.plan.world

    def __getitem__(self, item: int) -> dict[str, Any]:
        rest, rank = divmod(item, self.plan.world)
        step, turn = divmod(rest, self.plan.accumulation)
        records = [self.examples[i] for i in self.plan.steps[step][rank][turn]]
        return {**self.make(records, self.filler), "label_total": self.label_totals[step]}


class DollyTrainer(Trainer):
    """Trainer with the plan's batches, the reference's schedule, and checkpoints that are complete or do not count.

    Args:
        config: of the run.
        plan: for this number of ranks.
        checkpoint_bytes: expected size of one checkpoint, to check the disk before it is written.
        held_out: examples for evaluation.
    """

    def __init__(
        self, config: TrainConfig, plan: Plan, checkpoint_bytes: int, held_out: Sequence[Example], **keywords: Any
    ):
        super().__init__(data_collator=lambda items: items[0], eval_dataset=list(held_out), **keywords)
        self.config, self.plan, self.checkpoint_bytes, self.held_out = config, plan, checkpoint_bytes, held_out
        self._rehearsed = False
        self.loss_is_scaled_for_ga = True  # losses of a step add up to its mean over labels

    def _get_train_sampler(self, *arguments: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        factor = schedule(self.config.schedule, self.config.warmup_steps, num_training_steps)
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Gradients are averaged over ranks afterwards; the plan wants their sum.
        loss = model(**inputs).loss
        return loss * self.plan.world if model.training else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self._rehearsed:
            self._rehearsed = True
            self.rehearse(model)
        return super().training_step(model, inputs, num_items_in_batch)

    def rehearse(self, model: torch.nn.Module) -> None:
        """Run the largest pass of the whole plan forward and backward, and forget it.

        What does not fit fails in the first minute instead of in the middle of the night. The backward pass goes to the
        inputs only: gradients of weights are not touched, so that DeepSpeed, which collects them as they are made,
        notices nothing. Optimizer states, made at the first step, are not part of it.

        Raises:
            HardwareError: out of memory; names the first setting to change.
        """
        tokens, step, _, turn = self.plan.largest
        item = (step * self.plan.accumulation + turn) * self.plan.world + self.args.process_index
        batch = self._prepare_inputs(self.train_dataset[item])
        shape = (*batch.pop("input_ids").shape, self.model.config.hidden_size)
        # Past DeepSpeed's engine, whose own hooks would take this for the backward pass of a step.
        model = getattr(model, "module", model)
        dtype = next(model.parameters()).dtype
        before = torch.get_rng_state()
        try:
            model.train()
            embedded = torch.full(shape, 0.01, dtype=dtype, device=self.args.device, requires_grad=True)
            with self.compute_loss_context_manager():
                loss = model(**batch, inputs_embeds=embedded).loss
            torch.autograd.grad(loss, embedded)
        except torch.OutOfMemoryError as error:
            raise HardwareError(
                f"out of memory in the largest pass, {tokens} tokens; lower tokens_per_batch (now "
                f"{self.config.tokens_per_batch}) and max_length first, then set checkpoint_activations, then lora"
            ) from error
        finally:
            torch.set_rng_state(before)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def evaluate(self, *arguments: Any, metric_key_prefix: str = "eval", **keywords: Any) -> dict[str, float]:
        """Mean loss per response token of the held-out records, each rank doing its share one by one."""
        world, rank = self.args.world_size, self.args.process_index
        self.model_wrapped.eval()
        total = torch.zeros((), device=self.args.device, dtype=torch.float64)
        for begin in range(0, len(self.held_out), world):  # all ranks take as many passes
            mine = self.held_out[begin : begin + world][rank : rank + 1]
            make = padded_batch if self.config.batching == "padded" else packed_batch
            with torch.no_grad():
                batch = make(mine, 0, device=self.args.device)
                total += self.model_wrapped(**batch, label_total=1).loss.double()
        if world > 1:
            torch.distributed.all_reduce(total)
        metrics = {f"{metric_key_prefix}_loss": float(total) / max(1, label_count(self.held_out))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(self.args.output_dir)
        path = run / f"checkpoint-{self.state.global_step}"
        check_disk(run, self.checkpoint_bytes, path.name)
        if self.args.should_save:
            remove(path)  # of a damaged one, what is left, above all a marker, must not vouch for the new files
        self.accelerator.wait_for_everyone()
        with writing(path):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            with writing(path):
                mark_complete(path, self.plan.world, self.plan.hash, self.plan.order_hash)
            prune(run, self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()


def schedule(name: str, warmup: int, total: int):
    """Factor on the peak learning rate at step 0, 1, ...

    `warmup` is DeepSpeed's WarmupLR with its default logarithmic warm-up (deepspeed/runtime/lr_schedules.py):
    log(step + 1) / log(warmup), then constant; so the first step has rate 0. `cosine` and `linear` warm up linearly and
    end at 0.
    """

    def factor(step: int) -> float:
        if name == "warmup":
            return min(1.0, math.log(step + 1) / math.log(max(warmup, 2))) if warmup else 1.0
        if step < warmup:
            return (step + 1) / warmup
        share = (step - warmup) / max(1, total - warmup)
        return max(0.0, 1 - share) if name == "linear" else 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return factor


class Metrics(TrainerCallback):
    """metrics.jsonl: one object per optimizer step, appended as it is made, and cut back to the step resumed from."""

    def __init__(self, path: Path, plan: Plan):
        self.path, self.plan = path, plan
        self._began = time.perf_counter()

    def on_train_begin(self, args, state, control, **keywords):
        if args.process_index == 0 and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= state.global_step]
            with writing(self.path):
                write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self._began = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **keywords):
        if args.process_index != 0 or not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        row: dict[str, Any] = {"step": state.global_step}
        if "eval_loss" in logs:
            row["eval_loss"] = logs["eval_loss"]
        else:
            now = time.perf_counter()
            seconds, self._began = now - self._began, now
            tokens = self.plan.step_tokens[state.global_step - 1]
            row |= {"loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": logs.get("learning_rate")}
            row |= {"tokens": tokens, "seconds": round(seconds, 4), "useful_tokens_per_s": round(tokens / seconds, 1)}
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _step(line: str) -> float:
    """Of a line of metrics.jsonl; infinite for one that was cut short, which ends the file of a run that was killed."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class StopOnBadLoss(TrainerCallback):
    """Stop after several losses in a row that are not finite, or exactly zero: nothing good follows."""

    def __init__(self, limit: int = 3):
        self.limit, self.bad = limit, 0

    def on_log(self, args, state, control, logs=None, **keywords):
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.bad = 0 if math.isfinite(loss) and loss != 0.0 else self.bad + 1
        if self.bad >= self.limit:
            raise DollyError(
                f"loss was {loss} for {self.bad} steps in a row, up to step {state.global_step}; lower learning_rate, "
                "or use dtype bf16 or fp32; the last complete checkpoint is untouched"
            )


class SaveOnSignal(TrainerCallback):
    """SIGTERM, as a scheduler sends it before it takes the machine away: finish the step, save, end."""

    def __init__(self):
        self.received = False
        self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number, frame):
        self.received = True

    def on_step_end(self, args, state, control, **keywords):
        if args.world_size > 1:  # the signal reaches each process in its own time, and none can save alone
            received = torch.tensor(float(self.received), device=args.device)
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            self.received = bool(received)
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **keywords):
        signal.signal(signal.SIGTERM, self._before)
