"""Train the nano dolly: a toy that memorises the 128 records of recipes/nano.jsonl on a CPU in about a minute.

    python -m train.nano runs/nano

It shows the whole way from records to `pipeline()` on any machine. The steps are those of the real recipe, made small:
a tokenizer with the three keys, prompts and labels by construction (only the answer is learned), AdamW, and an exported
directory like any published revision.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from modelscope_dolly.errors import DollyError
from modelscope_dolly.export import export_checkpoint
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, render_example

RECORDS = Path(__file__).parent / "recipes" / "nano.jsonl"
SEED = 42
EPOCHS = 32


def read_records(path: Path = RECORDS) -> list[dict]:
    """The instruction records, in file order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_tokenizer(records: list[dict], vocabulary: int = 1536) -> DollyTokenizer:
    """A byte-level BPE tokenizer of the GPT-NeoX kind, trained on the records, with the keys as special tokens."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(CONTROL_KEYS),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((_training_text(record) for record in records), trainer)
    backend.add_special_tokens([AddedToken(key, special=True, normalized=False) for key in CONTROL_KEYS])
    return DollyTokenizer(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )
    )


def _training_text(record: dict) -> str:
    text = render_example(record["instruction"], record["context"], record["response"])
    for key in CONTROL_KEYS:
        text = text.replace(key, " ")  # the keys are tokens of their own, not text to learn merges from
    return text


def build_examples(records: list[dict], tokenizer: DollyTokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids [T], labels [T]) per record; labels of the prompt are -100, which the loss skips."""
    examples = []
    for record in records:
        ids, prompt = tokenizer.encode_example(record["instruction"], record["context"], record["response"])
        labels = [-100] * prompt + ids[prompt:]
        examples.append((torch.tensor(ids), torch.tensor(labels)))
    return examples


def build_model(vocabulary: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of 4 layers, 2.4 million weights, as random as the seed says."""
    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def train(
    model: GPTNeoXForCausalLM,
    examples: list[tuple[torch.Tensor, torch.Tensor]],
    epochs: int = EPOCHS,
    batch_size: int = 8,
    learning_rate: float = 3e-3,
) -> float:
    """Train in place with AdamW, short warm-up and cosine decay; returns the mean loss of the last epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    batches = math.ceil(len(examples) / batch_size)
    steps, warm_up = epochs * batches, 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
    )
    generator = torch.Generator().manual_seed(SEED)
    model.train()
    losses: list[float] = []
    with tqdm(total=steps, desc="Training", unit="step", disable=None) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(examples), generator=generator).tolist()
            for begin in range(0, len(order), batch_size):
                ids, labels = _pad([examples[i] for i in order[begin : begin + batch_size]])
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()
    model.eval()
    return sum(losses[-batches:]) / batches


def _pad(examples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] ids and labels, padded on the right: under a causal mask nothing before the padding sees it."""
    ids, labels = zip(*examples, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True), pad(labels, batch_first=True, padding_value=-100)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the nano dolly, a toy that memorises its records.")
    parser.add_argument("output", type=Path, help="directory to write, for instance runs/nano")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes over the records (default: {EPOCHS})")
    parser.add_argument("--replace", action="store_true", help="replace the directory if it exists")
    options = parser.parse_args(arguments)
    try:
        if options.output.exists() and not options.replace:
            raise DollyError(f"{options.output}: exists already; pass --replace to train it anew")
        if options.epochs < 1:
            raise DollyError(f"--epochs is {options.epochs}, it must be at least 1")
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        records = read_records()
        tokenizer = build_tokenizer(records)
        model = build_model(len(tokenizer.tokenizer))
        started = time.perf_counter()
        loss = train(model, build_examples(records, tokenizer), options.epochs)
        print(f"Learned {len(records)} records in {time.perf_counter() - started:.0f} s, final loss {loss:.4f}")
        export_checkpoint(model, tokenizer, options.output, options.replace)
        print(f"Wrote {options.output}")
    except DollyError as error:
        print(f"train.nano: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
