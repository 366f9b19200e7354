"""Verify a checkpoint directory: everything that can be known about it, as a list of findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from modelscope_dolly import PIPELINE_TYPE
from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.config import read_config, read_quantization
from modelscope_dolly.checkpoint.download import repair_hint
from modelscope_dolly.checkpoint.reader import tensor_locations
from modelscope_dolly.checkpoint.tokenizer import check_vocabulary, read_tokenizer
from modelscope_dolly.checkpoint.verification import raise_problems
from modelscope_dolly.checkpoint.weights import read_tensors, weight_files
from modelscope_dolly.errors import CheckpointError, one_line, printable
from modelscope_dolly.files import file_kind, path_of, read_json
from modelscope_dolly.hardware import dtype_name
from modelscope_dolly.kernels.quantized_linear import packed_problem
from modelscope_dolly.prompt import CONTROL_KEYS


@dataclass(frozen=True)
class Finding:
    """`status` is ok, note (works, but worth knowing) or problem."""

    status: str
    subject: str
    detail: str


def check_directory(path: str | Path) -> list[Finding]:
    """Run all checks, each as far as the others allow; reads every byte of the weights."""
    path = Path(path_of("directory", path))
    findings: list[Finding] = []

    def attempt(subject: str, step: Callable[[], str]) -> bool:
        try:
            findings.append(Finding("ok", subject, step()))
        except CheckpointError as error:
            findings.append(Finding("problem", subject, str(error)))
            return False
        return True

    if not attempt("directory", lambda: _directory(path)):
        return findings
    findings.clear()
    attempt("manifest", lambda: _manifest(path))
    config_ok = attempt("config.json", lambda: _config(path))
    tokenizer_ok = attempt("tokenizer", lambda: _tokenizer(path))
    if config_ok and tokenizer_ok:
        attempt("vocabulary", lambda: _vocabulary(path))
    if config_ok and attempt("weight names", lambda: _names(path)):
        attempt("weight values", lambda: _values(path))
    findings.extend(Finding("note", subject, detail) for subject, detail in _notes(path))
    if any(finding.status == "problem" for finding in findings):
        findings.append(Finding("note", "repair", repair_hint(path)))
    return findings


def seal_checked(path: str | Path, findings: list[Finding]) -> Finding:
    """Write the manifest of a directory that is sound and has none; what was done, or why not.

    An existing manifest is never replaced: it may be what tells a damaged file from a good one.
    """
    if any(finding.status == "problem" for finding in findings):
        return Finding("problem", "write manifest", "not written: the directory has problems, see above")
    path = Path(path_of("directory", path))
    if manifest.read(path) is not None:
        return Finding("ok", "write manifest", "nothing to do: there is one, and all files are as it lists them")
    try:
        manifest.write(path, hidden=False)
    except OSError as error:
        return Finding("problem", "write manifest", f"not written: {one_line(error)}")
    return Finding("ok", "write manifest", f"written for {len(manifest.read(path) or ())} files as they are now")


def _directory(path: Path) -> str:
    kind = file_kind(path)
    if kind != "directory":
        raise CheckpointError(f"{path}: {'no such directory' if kind is None else 'not a directory'}")
    return ""


def _manifest(path: Path) -> str:
    entries = manifest.read(path)
    if entries is None:
        return "none: no recorded checksums to compare the files with; --write-manifest records them as they are"
    raise_problems(manifest.differences(path))
    return f"{len(entries)} files have the size and sha256 they were published with"


def _config(path: Path) -> str:
    config = read_config(path)
    return f"{config.num_hidden_layers} layers of width {config.hidden_size}, window {config.max_position_embeddings}"


def _tokenizer(path: Path) -> str:
    tokenizer = read_tokenizer(path)
    ids = ", ".join(f"{key.strip()} {tokenizer.tokenizer.convert_tokens_to_ids(key)}" for key in CONTROL_KEYS)
    return f"{len(tokenizer.tokenizer)} tokens, keys: {ids}"


def _vocabulary(path: Path) -> str:
    config, tokenizer = read_config(path), read_tokenizer(path)
    check_vocabulary(path, config, tokenizer)
    return f"the network has {config.vocab_size} rows for {len(tokenizer.tokenizer)} tokens"


def _names(path: Path) -> str:
    locations = tensor_locations(path, read_config(path))
    files = weight_files(path)
    return f"{len(locations)} tensors of the right shape in {len(files)} file{'s' if len(files) > 1 else ''}"


def _values(path: Path) -> str:
    locations = tensor_locations(path, read_config(path))
    method, _ = read_quantization(path)
    total, types, problems = 0, set(), []
    for name, tensor in read_tensors(locations):
        total += tensor.numel()
        types.add(dtype_name(tensor.dtype))
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"{locations[name][0]}: {name} holds values that are not finite")
        elif tensor.dtype == torch.int8 and int(tensor.min()) < -127:
            problems.append(f"{locations[name][0]}: {name} holds -128, the smallest number of int8 weights is -127")
        elif name.endswith("weight_packed") and (problem := packed_problem(tensor, method)):
            problems.append(f"{locations[name][0]}: {name} {problem}")
        elif tensor.dim() == 2 and not bool(tensor.any()):
            problems.append(f"{locations[name][0]}: {name} is all zeros")
    raise_problems(problems)
    return f"{total:,} values, all finite, stored as {', '.join(sorted(types))}"


def _notes(path: Path) -> list[tuple[str, str]]:
    notes = []
    # Two levels and no more: the directory may be any, with millions of files below it.
    if code := sorted(file.name for pattern in ("*.py", "*/*.py") for file in path.glob(pattern)):
        notes.append(("code", f"{', '.join(code[:3])}: never run by this package"))
    try:
        configuration = read_json(path / "configuration.json")
    except CheckpointError:
        configuration = {}
    entry = configuration.get("pipeline")
    kind = entry.get("type") if isinstance(entry, dict) else None
    if kind != PIPELINE_TYPE or configuration.get("allow_remote") or configuration.get("plugins"):
        text = f"does not name {PIPELINE_TYPE!r} alone: ModelScope by itself cannot load this directory, "
        notes.append(("configuration.json", f"{text}modelscope_dolly.dolly_pipeline() can"))
    return notes


def format_findings(findings: list[Finding]) -> str:
    """One line per finding, for people."""
    width = max(len(finding.subject) for finding in findings)
    lines = (f"{finding.status:<8} {finding.subject:<{width}}  {finding.detail}" for finding in findings)
    return "\n".join(map(printable, lines))  # names in a damaged or hostile directory may hold anything
