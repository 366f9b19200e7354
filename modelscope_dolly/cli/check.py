"""`dolly check`: verify a checkpoint directory."""

from __future__ import annotations

import argparse
import dataclasses
import json

from modelscope_dolly.cli.options import add_json

SUMMARY = "verify a checkpoint directory; exit code 0 if sound, 1 if not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="the directory that holds config.json and the weights")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from modelscope_dolly.checkpoint.check import check_directory, format_findings

    findings = check_directory(options.directory)
    sound = all(finding.status != "problem" for finding in findings)
    if options.json:
        print(json.dumps({"sound": sound, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        print(format_findings(findings))
        print(f"{options.directory}: {'sound' if sound else 'NOT usable'}")
    return 0 if sound else 1
