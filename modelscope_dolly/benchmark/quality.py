"""`dolly bench --quality`: what a number format does to the predictions of a model, on real text.

Each record's answer is read with the right tokens before it (teacher-forced), by the same network that answers, and the
distribution of every next token is compared with that of the unquantised reference: Kullback-Leibler divergence
KL(reference || format) in nats, how often the likeliest token is the same, and perplexity of the answer itself.
"""

from __future__ import annotations

import gc
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelscope_dolly.benchmark.limits import machine
from modelscope_dolly.benchmark.lookup import encoded, read_texts
from modelscope_dolly.benchmark.process import Bench, progress
from modelscope_dolly.checkpoint.download import locate
from modelscope_dolly.checkpoint.reader import Checkpoint, open_checkpoint
from modelscope_dolly.engine.gpt_neox import KVCache, NeoX, Step
from modelscope_dolly.errors import SettingError
from modelscope_dolly.files import check_disk
from modelscope_dolly.hardware import free_memory
from modelscope_dolly.load import held_bytes, load

if TYPE_CHECKING:
    from modelscope_dolly.benchmark.options import BenchSettings
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


@dataclass(frozen=True)
class Text:
    """Ids of an example, and where its answer begins."""

    ids: list[int]
    begin: int

    @property
    def predicted(self) -> int:
        """Number of tokens of the answer, each predicted from those before it."""
        return len(self.ids) - self.begin


def compare(run: Bench) -> None:
    """`quality`: the reference and every other format, one after the other, so that only one is in memory.

    The reference is the first of --dtype, or fp32 where it fits, else bf16. The others are the rest of --dtype, bf16 as
    a yardstick where the reference is fp32, and --quantize.

    Raises:
        CheckpointError, HardwareError, SettingError.
    """
    settings, device = run.settings, run.device
    checkpoint = open_checkpoint(locate(settings.model, settings.revision), verify=False)  # load() compares the files
    texts = choose_texts(checkpoint.tokenizer, settings)
    count, vocabulary = sum(text.predicted for text in texts), checkpoint.config.vocab_size
    wanted = run.dtypes or (_widest(checkpoint, device), "bf16")
    reference, *others = dict.fromkeys(wanted)
    formats = [(name, name, None) for name in others]
    formats += [(name, reference, name) for name in settings.quantize if name != "none"]
    check_disk(tempfile.gettempdir(), count * vocabulary * 4, "what the reference predicts", "use --records")
    rows: list[dict] = []
    run.found["quality"] = {
        "model": str(checkpoint.path), "reference": reference, "records": len(texts), "tokens": count,
        "data": settings.data or "built-in sample", "rows": rows, "machine": machine(device, run.threads),
    }  # fmt: skip
    run.expect([reference, *(name for name, _, _ in formats)])
    with tempfile.NamedTemporaryFile(prefix="dolly-quality-") as file:
        kept = torch.from_file(file.name, shared=True, size=count * vocabulary).view(count, -1)
        reading = _Reading(checkpoint.path, device, settings.threads, texts, kept)
        rows.append(reading.reference(reference))
        run.has([reference])
        for one in formats:
            rows.append(reading.other(*one))
            run.has([one[0]])


def choose_texts(tokenizer: DollyTokenizer, settings: BenchSettings) -> list[Text]:
    """Examples of --data, drawn by --seed, or the built-in sample."""
    records, seed = (list(SAMPLE), None) if settings.data is None else (read_texts(settings.data), settings.seed)
    drawn = itertools.islice(encoded(tokenizer, records, seed, _LONGEST - 1), settings.records or _RECORDS)
    texts = [Text(ids[:_LONGEST], begin) for _, ids, begin in drawn]
    if not texts:
        raise SettingError(f"--data {settings.data}: every prompt has {_LONGEST} tokens or more")
    return texts


def _widest(checkpoint: Checkpoint, device: torch.device) -> str:
    return "fp32" if held_bytes(checkpoint, torch.float32, device)[0] < 0.8 * free_memory(device) else "bf16"


def log_probabilities(net: NeoX, device: torch.device, text: Text) -> torch.Tensor:
    """Of the whole vocabulary at each token of the answer, given the right ones before: [predicted, V] float32, CPU."""
    with torch.inference_mode():
        step = Step.extend([(0, 0, len(text.ids))])
        logits = net(torch.tensor(text.ids, device=device), step, KVCache(1, len(text.ids)))
        return torch.log_softmax(logits[text.begin - 1 : -1].float(), dim=-1).cpu()


@dataclass(frozen=True)
class _Reading:
    """One model and the answers it reads.

    Attributes:
        model, device, threads: see loading.load.
        texts: the examples.
        kept: log-probabilities of the reference, [tokens of all answers, V], in a file.
    """

    model: Path
    device: torch.device
    threads: int | None
    texts: list[Text]
    kept: torch.Tensor

    def reference(self, dtype: str) -> dict:
        """Read the answers and keep what is predicted."""
        loss = 0.0
        for text, place, found in self._read(dtype, dtype, None):
            self.kept[place] = found
            loss += _loss(found, text)
        perplexity = math.exp(loss / len(self.kept))
        return {"format": dtype, "perplexity": perplexity, "kl_mean": 0.0, "kl_p99": 0.0, "top1": 1.0}

    def other(self, name: str, dtype: str, quantize: str | None) -> dict:
        """Read them again in another format, and compare."""
        loss, same, divergences = 0.0, 0, []
        for text, place, found in self._read(name, dtype, quantize):
            truth = self.kept[place]
            divergences.append((truth.exp() * (truth - found)).double().sum(-1))
            same += (found.argmax(-1) == truth.argmax(-1)).sum().item()
            loss += _loss(found, text)
        divergence = torch.cat(divergences).clamp_(min=0)
        return {
            "format": name, "perplexity": math.exp(loss / len(divergence)), "kl_mean": divergence.mean().item(),
            "kl_p99": divergence.quantile(0.99).item(), "top1": same / len(divergence),
        }  # fmt: skip

    def _read(self, name: str, dtype: str, quantize: str | None) -> Iterator[tuple[Text, slice, torch.Tensor]]:
        """Each text, its rows in `kept`, and the log-probabilities of its answer's tokens."""
        progress(f"quality: loading {name}")
        gc.collect()
        if self.device.type == "cuda":  # what the last one took counts as taken until torch gives it back
            torch.cuda.empty_cache()
        net = load(self.model, self.device, dtype, quantize=quantize, threads=self.threads).net
        row = 0
        for number, text in enumerate(self.texts, start=1):
            progress(f"quality: {name} reads answer {number} of {len(self.texts)}")
            yield text, slice(row, row + text.predicted), log_probabilities(net, self.device, text)
            row += text.predicted


def _loss(found: torch.Tensor, text: Text) -> float:
    """Summed negative log-likelihood of the answer."""
    return -found.gather(1, torch.tensor(text.ids[text.begin :])[:, None]).double().sum().item()


def report(found: dict) -> str:
    """The figures for people."""
    lines = [
        f"{found['model']}: {found['tokens']} tokens of {found['records']} answers from {found['data']}, each "
        f"predicted from the right tokens before it; reference {found['reference']}",
        "",
        f"{'format':<8}{'KL mean':>12}{'KL 99 %':>12}{'top-1 same':>12}{'perplexity':>12}",
    ]
    for row in found["rows"]:
        divergence = f"{row['kl_mean']:>12.2e}{row['kl_p99']:>12.2e}"
        lines.append(f"{row['format']:<8}{divergence}{row['top1']:>12.2%}{row['perplexity']:>12.4f}")
    if found["data"] == "built-in sample":
        lines += ["", "the built-in sample is small; give --data FILE for figures to decide by"]
    return "\n".join(lines)
