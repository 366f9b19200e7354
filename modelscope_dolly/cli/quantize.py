"""`dolly quantize`: write a quantised copy of a checkpoint."""

from __future__ import annotations

import argparse

from modelscope_dolly.cli.options import add_revision

SUMMARY = "write a smaller copy of a checkpoint, for CPUs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="directory or hub id of a checkpoint")
    parser.add_argument("target", help="the new directory")
    parser.add_argument("--to", default="int8", metavar="METHOD", help="int8 or int4 (default: int8)")
    add_revision(parser)


def run(options: argparse.Namespace) -> int:
    from modelscope_dolly.checkpoint.download import locate
    from modelscope_dolly.checkpoint.quantize import quantize_checkpoint

    print(quantize_checkpoint(locate(options.source, options.revision), options.target, options.to))
    return 0
