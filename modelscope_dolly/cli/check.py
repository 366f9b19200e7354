"""`dolly check`: verify a checkpoint directory."""

from __future__ import annotations

import argparse
import dataclasses
import json

from modelscope_dolly.cli.options import add_json
from modelscope_dolly.errors import printable

SUMMARY = "verify a checkpoint directory; exit code 0 if sound, 1 if not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", help="the directory that holds config.json and the weights")
    parser.add_argument(
        "--write-manifest", action="store_true",
        help="record the checksums of a sound directory that has none, if you trust it: loading compares them",
    )  # fmt: skip
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from modelscope_dolly.checkpoint.check import check_directory, format_findings, seal_checked

    findings = check_directory(options.directory)
    if options.write_manifest:
        findings.append(seal_checked(options.directory, findings))
    sound = all(finding.status != "problem" for finding in findings)
    if options.json:
        print(json.dumps({"sound": sound, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
    else:
        print(format_findings(findings))
        print(f"{printable(options.directory)}: {'sound' if sound else 'NOT usable'}")
    return 0 if sound else 1
