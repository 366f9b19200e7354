"""`make demo`: train the nano dolly if it is not there yet, then ask it through ModelScope's own pipeline()."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks

import modelscope_dolly
from modelscope_dolly import manifest
from train import nano

ASKED = (
    "Explain to me the difference between nuclear fission and fusion.",
    "Write a short poem about the sea.",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train and ask the nano dolly.")
    parser.add_argument("--output", type=Path, default=Path("runs/nano"), help="where it is kept (default: runs/nano)")
    parser.add_argument("--epochs", type=int, default=nano.EPOCHS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        return demonstrate(options.output, options.epochs)
    except modelscope_dolly.DollyError as error:
        print(f"train.demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def demonstrate(model: Path, epochs: int) -> int:
    """Train unless `model` is whole already, ask, and count how many records come back word for word."""
    if (model / manifest.NAME).exists():
        print(f"{model} is there already; remove it to train again.")
    else:
        print(f"Training the nano dolly into {model}: about a minute on two CPU cores.")
        code = nano.main([str(model), "--epochs", str(epochs)])
        if code:
            return code
    pipe = pipeline(Tasks.text_generation, model=str(model), device="cpu")
    for question in ASKED:
        print(f"\n> {question}\n{pipe(question, do_sample=False)['text']}")
    records = nano.read_records()
    answers = pipe(records, do_sample=False)
    right = sum(answer["text"] == record["response"] for answer, record in zip(answers, records, strict=True))
    print(
        f"\nThis is a toy: {right} of its {len(records)} training records come back word for word, and of anything "
        "else it knows nothing."
    )
    print(
        f"Ask it yourself:     .venv/bin/dolly ask --model {model} 'Write a short poem about the sea.'\n"
        "A real checkpoint:   .venv/bin/dolly plan AI-ModelScope/dolly-v2-3b    (what it needs, against what is here)\n"
        "                     .venv/bin/dolly ask --model AI-ModelScope/dolly-v2-3b 'Who was Ada Lovelace?'"
    )
    if right < 0.9 * len(records):
        print(f"train.demo: only {right} of {len(records)} records were learned", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
