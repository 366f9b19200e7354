"""Run by test_parallel_gradient.py in two processes: the gradient of one planned step, under each ZeRO stage.

Writes to the file given as argument: {stage: {"loss": ..., "error": relative error of the whole gradient}}.
"""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import safe_get_full_grad

from tests.support.models import random_model
from train.data.batch_plan import packed_plan
from train.data.collate import PassDataset, label_count, packed_batch
from train.nano import build_tokenizer, read_records
from train.training import packed_attention as attention
from train.training.loss import CausalLMLoss

__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of compiling that gloo does without
WORLD, RECORDS = 2, 16


def examples() -> list:
    records = read_records()
    tokenizer = build_tokenizer(records, vocabulary=1024)
    return [tokenizer.encode_example(r["instruction"], r["context"], r["response"]) for r in records[:RECORDS]]


def network() -> torch.nn.Module:
    model = random_model(initializer_range=0.05)
    model.config._attn_implementation = attention.NAME
    return CausalLMLoss(model)


def alone(passes: list) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient in one process, one record at a time."""
    model = network()
    total, loss = label_count(passes), 0.0
    for example in passes:
        part = model(**packed_batch([example], 0), label_total=total).loss
        part.backward()
        loss += part.item()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def main(target: str) -> None:
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    passes = examples()
    loss, expected = alone(passes)
    lengths = [len(ids) for ids, _ in passes]
    plan = packed_plan(lengths, 1, 1, RECORDS, WORLD, tokens_per_batch=max(sum(lengths) // 3, max(lengths)))
    assert plan.accumulation == 2 and len(plan.steps) == 1, plan.summary()
    items = PassDataset(plan, passes, 0)
    found = {}
    for stage in (1, 2, 3):
        model = network()
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": plan.accumulation,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        mine = torch.zeros(())
        for micro_step in range(plan.accumulation):
            part = engine(**items[micro_step * WORLD + rank]).loss
            mine += part.detach()
            engine.backward(part * WORLD, scale_wrt_gas=False)
            if micro_step + 1 < plan.accumulation:
                engine.step()
        torch.distributed.all_reduce(mine)
        squares = torch.zeros(2, dtype=torch.float64)
        for name, parameter in engine.module.named_parameters():
            full = safe_get_full_grad(parameter)  # gathered over ranks: every process must ask
            squares += torch.stack(
                [(full - expected[name]).double().pow(2).sum(), expected[name].double().pow(2).sum()]
            )
        found[stage] = {"loss": float(mine) / loss, "error": float((squares[0] / squares[1]).sqrt())}
    if rank == 0:
        with open(target, "w") as file:
            json.dump(found, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
