"""The untrained nano dolly: a tokenizer with the three keys made from 128 records, and a small random network.

    python -m train.nano runs/nano-base

recipes/nano.yaml trains it on the same records until it has memorised them, in about a minute on a CPU. That shows all
steps from records to `pipeline()` on any machine, and gives tests a real model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from modelscope_dolly.checkpoint.writer import export_checkpoint
from modelscope_dolly.cli.exit_codes import exit_code
from modelscope_dolly.cli.parser import UsageParser
from modelscope_dolly.errors import DollyError, one_line
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer, render_example

RECORDS = Path(__file__).parent / "recipes" / "nano.jsonl"
SEED = 42


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


def build_model(vocabulary: int) -> GPTNeoXForCausalLM:
    """A GPT-NeoX of 4 layers and 2.4 million weights, random from a fixed seed."""
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


def write_base(target: Path) -> None:
    """The directory that recipes/nano.yaml starts from: random weights, and a tokenizer made from the records.

    Raises:
        DollyError: it exists, or cannot be written.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    tokenizer = build_tokenizer(read_records())
    try:
        export_checkpoint(build_model(len(tokenizer.tokenizer)), tokenizer, target)
    except OSError as error:
        raise DollyError(f"{target} cannot be written ({one_line(error)})") from None


def main(arguments: list[str] | None = None) -> int:
    parser = UsageParser(prog="train.nano", description="Write the untrained nano dolly.", allow_abbrev=False)
    parser.add_argument("output", type=Path, help="directory to write, for instance runs/nano-base")

    def command() -> int:
        options = parser.parse_args(arguments)
        write_base(options.output)
        print(
            f"wrote {options.output}; next: python -m train.finetune train/recipes/nano.yaml --model {options.output}"
        )
        return 0

    return exit_code(command, "train.nano")


if __name__ == "__main__":
    sys.exit(main())
