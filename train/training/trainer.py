"""transformers' Trainer, driven by a batch plan: it decides nothing about batches, order or the scale of the loss."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer

from modelscope_dolly.errors import HardwareError
from modelscope_dolly.files import check_disk, free_disk, gigabytes
from train.config import TrainConfig
from train.data.collate import Example, PassDataset, label_count
from train.distributed import gather
from train.training.checkpoints import DISK_REMEDY, Origin, digests, file_sizes, mark_complete, prune, remove, writing
from train.training.held_out import HeldOutLosses, best_checkpoint
from train.training.samples import Samples, send
from train.training.samples import lines as sample_lines
from train.training.schedule import schedule


class DollyTrainer(Trainer):
    """Trainer with the plan's batches, the reference's schedule, and crash-safe checkpoints.

    Args:
        config: of the run.
        passes: the forward passes of the plan, for this number of ranks.
        checkpoint_bytes: expected size of one checkpoint, to check the disk before it is written.
        held_out: examples for evaluation.
        origin: what its checkpoints come from (default: the plan alone).
        losses: of the held-out records, where the best checkpoint is kept as well as the newest.
        samples: answered before the first step and at every evaluation.
    """

    def __init__(
        self, config: TrainConfig, passes: PassDataset, checkpoint_bytes: int, held_out: Sequence[Example],
        origin: Origin | None = None, losses: HeldOutLosses | None = None, samples: Samples | None = None,
        **keywords: Any,
    ):  # fmt: skip
        super().__init__(
            data_collator=lambda items: items[0], train_dataset=passes, eval_dataset=list(held_out), **keywords
        )
        self.config, self.plan, self.checkpoint_bytes, self.held_out = config, passes.plan, checkpoint_bytes, held_out
        self.origin = origin or Origin(self.plan.hash, self.plan.order_hash)
        self.losses, self.save_seconds = losses, 0.0
        self.samples = samples
        self._dry_run_done = False
        self.loss_is_scaled_for_ga = True  # losses of a step add up to its mean over labels
        self.remove_callback(PrinterCallback)  # callbacks.Progress prints instead
        self.remove_callback(ProgressCallback)

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
        if not self._dry_run_done:
            self._dry_run_done = True
            self.dry_run(model)
            if self.samples and self.args.should_save:
                self.samples.start(self.state.global_step)
            if self.state.global_step == 0:
                self.answer_samples()
        return super().training_step(model, inputs, num_items_in_batch)

    def dry_run(self, model: torch.nn.Module) -> None:
        """Run the largest pass of the whole plan forward and backward, and discard the result.

        What does not fit fails in the first minute and not hours later. The backward pass goes to the inputs only:
        gradients of weights are not touched, so that DeepSpeed, which collects them as they appear, is not affected.
        Optimizer states, which the first step creates, are not part of it.

        Raises:
            HardwareError: out of memory; names the first setting to change.
        """
        largest = self.plan.largest
        item = (largest.step * self.plan.accumulation + largest.micro_step) * self.plan.world + self.args.process_index
        batch = self._prepare_inputs(self.train_dataset[item])
        shape = (*batch.pop("input_ids").shape, self.model.config.hidden_size)
        # Bypass DeepSpeed's engine, whose own hooks would take this for the backward pass of a step.
        model = getattr(model, "module", model)
        dtype = next(model.parameters()).dtype
        random_state = torch.get_rng_state()
        try:
            model.train()
            embedded = torch.full(shape, 0.01, dtype=dtype, device=self.args.device, requires_grad=True)
            with self.compute_loss_context_manager():
                loss = model(**batch, inputs_embeds=embedded).loss
            torch.autograd.grad(loss, embedded)
        except torch.OutOfMemoryError as error:
            raise HardwareError(
                f"out of memory in the largest pass, {largest.tokens} tokens; lower tokens_per_batch (now "
                f"{self.config.tokens_per_batch}) and max_length first, then set checkpoint_activations, then lora"
            ) from error
        finally:
            torch.set_rng_state(random_state)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None

    def evaluate(self, *arguments: Any, metric_key_prefix: str = "eval", **keywords: Any) -> dict[str, float]:
        """Mean loss per response token of the held-out records; each rank computes its share one record at a time."""
        world, rank = self.args.world_size, self.args.process_index
        self.model_wrapped.eval()
        total = torch.zeros((), device=self.args.device, dtype=torch.float64)
        for begin in range(0, len(self.held_out), world):  # all ranks take the same number of passes
            records = self.held_out[begin : begin + world][rank : rank + 1]
            with torch.no_grad():
                batch = self.train_dataset.collate(records, 0, device=self.args.device)
                total += self.model_wrapped(**batch, label_total=1).loss.double()
        if world > 1:
            torch.distributed.all_reduce(total)
        metrics = {f"{metric_key_prefix}_loss": float(total) / max(1, label_count(self.held_out))}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.answer_samples()
        return metrics

    def answer_samples(self) -> None:
        """Answer the samples with the weights as they are, and tell of it wherever the losses go."""
        if not self.samples:
            return
        arguments = self.args
        self.model_wrapped.eval()

        @torch.no_grad()
        def logits(inputs: dict[str, Any], places: torch.Tensor) -> torch.Tensor:
            return self.model_wrapped(**inputs, places=places).logits

        step, ranks = self.state.global_step, (arguments.process_index, arguments.world_size)
        answers = self.samples.answer(logits, step, *ranks, arguments.device)
        self.model_wrapped.train()
        if arguments.should_save:
            self.samples.record(answers)
            tqdm.write("\n".join([f"step {step}: samples", *sample_lines(answers)]))
            send(answers, self.callback_handler.callbacks)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run = Path(self.args.output_dir)
        path = run / f"checkpoint-{self.state.global_step}"
        begun = time.monotonic()
        check_disk(run, self.checkpoint_bytes, path.name, DISK_REMEDY)
        if self.args.should_save:
            remove(path)  # a damaged one of this step: its marker must not stand beside new files
        self.accelerator.wait_for_everyone()
        with writing(path):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        with writing(path):  # right after the files were written: they are still in memory
            hashed = gather(digests(path, self.args.process_index, self.args.world_size))
        if self.args.should_save:
            with writing(path):
                mark_complete(path, self.plan.world, self.origin, hashed)
            prune(run, self.config.keep_checkpoints, best_checkpoint(run, self.losses) if self.losses else None)
            self._look_ahead(run, path)
        self.accelerator.wait_for_everyone()
        self.save_seconds = time.monotonic() - begun

    def _look_ahead(self, run: Path, saved: Path) -> None:
        """Say it while there is time to act, if the next checkpoint will not fit; and learn how large they are."""
        self.checkpoint_bytes = max(self.checkpoint_bytes, sum(size for _, size in file_sizes(saved)))
        free, following = free_disk(run), self.state.global_step + self.config.save_every
        if free < self.checkpoint_bytes and following <= self.state.max_steps:
            tqdm.write(
                f"the disk fills up: {run} has {gigabytes(free)} free, and checkpoint-{following} will need "
                f"{gigabytes(self.checkpoint_bytes)}; {DISK_REMEDY} before step {following}, or the run ends there"
            )
