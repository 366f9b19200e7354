"""`make demo`: train the nano dolly if it is not there yet, then ask it through ModelScope's own pipeline()."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from modelscope.pipelines import pipeline
from modelscope.utils.constant import Tasks

import modelscope_dolly  # noqa: F401  registers the pipeline
from modelscope_dolly.cli.exit_codes import exit_code
from modelscope_dolly.cli.parser import UsageParser
from train import finetune, nano
from train.finetune import FINAL

RECIPE = Path(__file__).parent / "recipes" / "nano.yaml"
ASKED = (
    "Explain to me the difference between nuclear fission and fusion.",
    "Write a short poem about the sea.",
)


def main(arguments: list[str] | None = None) -> int:
    parser = UsageParser(prog="train.demo", description="Train and ask the nano dolly.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/nano"), help="the run (default: runs/nano)")
    parser.add_argument("--epochs", default=None, help=argparse.SUPPRESS)

    def command() -> int:
        options = parser.parse_args(arguments)
        return demonstrate(options.output, [] if options.epochs is None else ["--epochs", options.epochs])

    return exit_code(command, "train.demo")


def demonstrate(run: Path, flags: list[str]) -> int:
    """Train unless the run is finished already, ask, and count how many records come back word for word."""
    base, model = run.with_name(f"{run.name}-base"), run / FINAL
    if model.exists():
        print(f"{model} is there already; remove {run} to train again.")
    else:
        print(f"Training the nano dolly into {run}: about a minute on two CPU cores.")
        if not base.exists():
            nano.write_base(base)
        code = finetune.main([str(RECIPE), "--model", str(base), "--output-dir", str(run), *flags])
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
