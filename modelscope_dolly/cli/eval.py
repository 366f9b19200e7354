"""`dolly eval`: score a model on the tasks of the dolly-v2 card."""

from __future__ import annotations

import argparse

from modelscope_dolly.cli.options import MODEL_VARIABLE, model_name
from modelscope_dolly.evaluation import command

SUMMARY = "score a model on the seven tasks of the dolly-v2 card"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_options(parser, MODEL_VARIABLE)


def run(options: argparse.Namespace) -> int:
    return command.run(options, model_name(options))
