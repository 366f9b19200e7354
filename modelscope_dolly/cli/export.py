"""`dolly export`: write a checkpoint as one GGUF file."""

from __future__ import annotations

import argparse

from modelscope_dolly.cli.options import add_revision

SUMMARY = "write a checkpoint as one GGUF file, for llama.cpp and Ollama"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="directory or hub id of a checkpoint")
    parser.add_argument("target", help="the new file, NAME.gguf")
    parser.add_argument("--type", default="bf16", help="f32, f16, bf16 or q8_0, of the matrices (default: bf16)")
    add_revision(parser)


def run(options: argparse.Namespace) -> int:
    from modelscope_dolly.checkpoint.download import locate
    from modelscope_dolly.checkpoint.gguf_export import check_request, export_gguf

    check_request(options.target, options.type)  # before a model is downloaded
    print(export_gguf(locate(options.source, options.revision), options.target, options.type))
    return 0
