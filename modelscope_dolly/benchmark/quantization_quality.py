"""`dolly bench --quality`: what a number format does to the predictions of a model, on real text.

Each record's answer is read with the right tokens before it (teacher forcing), by the same network that answers, and
the distribution of every next token is compared with that of the unquantised reference: Kullback-Leibler divergence
KL(reference || format) in nats, how often the likeliest token is the same, and perplexity of the answer itself.
With --outliers all of it is done again with a copy of the model that has large channels, see outlier_channels.py.
"""

from __future__ import annotations

import gc
import itertools
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelscope_dolly.benchmark.bench_run import BenchRun, Variant
from modelscope_dolly.benchmark.examples import Example, encode, read_records, shuffled
from modelscope_dolly.benchmark.machine import describe_machine
from modelscope_dolly.benchmark.outlier_channels import copy_with_outliers
from modelscope_dolly.benchmark.own_engine import load_model, log_probabilities
from modelscope_dolly.benchmark.process import progress
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.reader import Checkpoint, open_checkpoint
from modelscope_dolly.errors import SettingError
from modelscope_dolly.files import check_disk
from modelscope_dolly.hardware import free_memory
from modelscope_dolly.load import held_bytes

if TYPE_CHECKING:
    from modelscope_dolly.benchmark.bench_options import BenchSettings
    from modelscope_dolly.prompt import DollyTokenizer

_RECORDS = 32
#: Longer examples are cut: a pass over one is one block of logits [N, V].
_LONGEST = 1024
#: Without --data: enough to see that nothing is broken, not enough for a figure to decide by.
SAMPLE = (
    {
        "instruction": "Why does bread rise?",
        "response": "Yeast eats the sugars in the flour and gives off carbon dioxide. The gas is caught in the elastic "
        "net of gluten that kneading has made, so the dough swells, and the heat of the oven sets it in that shape.",
    },
    {
        "instruction": "Which towns does the road pass?",
        "context": "The road leaves the harbour of Ostrand in the west, crosses the river at Millbridge and climbs to "
        "Hollin, where it meets the railway.",
        "response": "It passes Ostrand, Millbridge and Hollin.",
    },
    {
        "instruction": "Give me three ways to keep a small kitchen tidy.",
        "response": "1. Wash up while the food cooks, not afterwards.\n2. Hang pans and ladles on the wall instead of "
        "stacking them.\n3. Keep on the worktop only what you use every day.",
    },
    {
        "instruction": "Explain the difference between weather and climate to a child.",
        "response": "Weather is what you see when you look out of the window today: rain, wind or sunshine. Climate is "
        "what you may expect at a place over many years, such as snow in winter and heat in summer.",
    },
)


def measure(run: BenchRun) -> None:
    """`quality`: the reference and every other format, one after the other, so that only one is in memory.

    The reference is the first of --dtype, or fp32 where it fits, else bf16. The others are the rest of --dtype, bf16 as
    a yardstick where the reference is fp32, and --quantize.

    Raises:
        CheckpointError, HardwareError, SettingError.
    """
    settings = run.settings
    checkpoint = open_checkpoint(locate(settings.model, settings.revision), verify=False)  # load() compares the files
    examples = choose_examples(checkpoint.tokenizer, settings)
    count, vocabulary = sum(len(example.answer) for example in examples), checkpoint.config.vocab_size
    dtypes = list(dict.fromkeys(run.dtypes or (_widest(checkpoint, run.device), "bf16")))
    variants = [Variant("dolly", name, name) for name in dtypes]
    variants += [Variant("dolly", name, dtypes[0]) for name in settings.quantize if name != "none"]
    check_disk(tempfile.gettempdir(), count * vocabulary * 4, "what the reference predicts", "use --records")
    rows: list[dict] = []
    run.results["quality"] = {
        "model": str(checkpoint.path), "reference": dtypes[0], "records": len(examples), "tokens": count,
        "data": settings.data or "built-in sample", "rows": rows,
        "machine": describe_machine(run.device, run.threads),
    }  # fmt: skip
    factors = [None, settings.outliers] if settings.outliers else [None]
    run.expect(_name(variant, factor) for factor in factors for variant in variants)
    with tempfile.TemporaryDirectory(prefix="dolly-quality-") as folder:
        reference = torch.from_file(f"{folder}/logits", shared=True, size=count * vocabulary).view(count, -1)
        for factor in factors:
            model = copy_with_outliers(checkpoint, Path(folder, "model"), factor) if factor else checkpoint.path
            for variant in variants:
                job = {"model": model, "device": run.device, "threads": settings.threads, **variant._asdict()}
                row = _row(job, examples, reference, is_reference=variant is variants[0])
                rows.append({**row, "outliers": factor})
                run.measured([_name(variant, factor)])


def _name(variant: Variant, outliers: float | None) -> str:
    return f"{variant.format}, outliers {outliers:g}" if outliers else variant.format


def choose_examples(tokenizer: DollyTokenizer, settings: BenchSettings) -> list[Example]:
    """Of --data, drawn by --seed, or the built-in sample."""
    records = SAMPLE if settings.data is None else shuffled(read_records(settings.data), settings.seed)
    drawn = itertools.islice(encode(tokenizer, records, _LONGEST - 1), settings.records or _RECORDS)
    examples = [example._replace(ids=example.ids[:_LONGEST]) for example in drawn]
    if not examples:
        raise SettingError(f"--data {settings.data}: every prompt has {_LONGEST} tokens or more")
    return examples


def _widest(checkpoint: Checkpoint, device: torch.device) -> str:
    return "fp32" if held_bytes(checkpoint, torch.float32, device)[0] < 0.8 * free_memory(device) else "bf16"


def _row(job: dict, examples: list[Example], reference: torch.Tensor, is_reference: bool) -> dict:
    """Read all answers with one model and compare its predictions with the reference.

    Args:
        job: see own_engine.load_model.
        examples: what it reads.
        reference: log-probabilities of the reference, [tokens of all answers, V], in a file.
        is_reference: fill `reference` with this model's.
    """
    progress(f"quality: loading {job['format']}")
    gc.collect()
    if job["device"].type == "cuda":  # torch keeps the memory of the last model until it is told to give it back
        torch.cuda.empty_cache()
    net = load_model(job).net
    loss, same, divergences, end = 0.0, 0, [], 0
    for number, example in enumerate(examples, start=1):
        progress(f"quality: {job['format']} reads answer {number} of {len(examples)}")
        logs = log_probabilities(net, job["device"], example.ids, example.prompt_tokens)
        start, end = end, end + len(logs)
        if is_reference:
            reference[start:end] = logs
        truth = reference[start:end]
        divergences.append((truth.exp() * (truth - logs)).double().sum(-1))
        same += (logs.argmax(-1) == truth.argmax(-1)).sum().item()
        loss -= logs.gather(1, torch.tensor(example.answer)[:, None]).double().sum().item()
    divergence = torch.cat(divergences).clamp_(min=0)
    return {
        "format": job["format"], "perplexity": math.exp(loss / len(divergence)), "kl_mean": divergence.mean().item(),
        "kl_p99": divergence.quantile(0.99).item(), "top1": same / len(divergence),
    }  # fmt: skip
