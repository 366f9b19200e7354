"""Find a checkpoint directory and check its configuration, tokenizer and weights. No code from it is ever run."""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelscope_dolly.checkpoint import manifest
from modelscope_dolly.checkpoint.manifest import read_json
from modelscope_dolly.checkpoint.weights import inventory, weight_files
from modelscope_dolly.engine.gpt_neox import parameter_shapes
from modelscope_dolly.errors import CheckpointError, one_line
from modelscope_dolly.kernels.quantized_linear import METHODS, MODEL_TYPE, stored_shapes
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

#: What a download takes: no .py, and no pickle but the weights, which are read without running any.
DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.md", "LICENSE*"]
#: Wanted only where there is no safetensors: many repositories hold the same weights in both forms.
PICKLED = "pytorch_model*.bin"
DEFAULT_REVISION = "master"

#: owner/name of a model or a data set on a hub.
HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
#: Keys of config.json that shape the network: (smallest, largest) plausible value.
_REQUIRED = {
    "vocab_size": (3, 1 << 24),
    "hidden_size": (1, 1 << 17),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 1 << 19),
}
_OPTIONAL = (
    "max_position_embeddings", "hidden_act", "layer_norm_eps", "use_parallel_residual", "attention_bias",
    "tie_word_embeddings", "rotary_pct", "rotary_emb_base", "rope_parameters", "rope_scaling",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose configuration, tokenizer and list of tensors have been checked; the weights are still on disk.

    Attributes:
        path: the directory.
        config: sizes and constants of the network.
        tokenizer: with the prompt contract.
        tensors: name of each parameter -> (file, name inside that file).
        quantization: "int8" or "int4" where the linear layers are stored so (see quantize.py), otherwise None.
    """

    path: Path
    config: GPTNeoXConfig
    tokenizer: DollyTokenizer
    tensors: dict[str, tuple[Path, str]]
    quantization: str | None = None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in parameter_shapes(self.config).values())


def locate(model: str, revision: str | None = None, patterns: Sequence[str] = DOWNLOAD_PATTERNS) -> Path:
    """The local directory of `model`: itself, or a downloaded snapshot of a hub id, of the files that match `patterns`.

    Raises:
        CheckpointError: neither a directory nor a model that the hub gives us.
    """
    if not model.strip():
        raise CheckpointError("the name of the model is empty; give a directory or a hub id of the form owner/name")
    path = Path(os.path.expanduser(model))  # unlike Path.expanduser, leaves the name of an unknown user as it is
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{model}: is a file; give the directory that holds config.json")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such directory, and not a hub id of the form owner/name either")
    path = _download(model, revision or DEFAULT_REVISION, list(patterns))
    if patterns is DOWNLOAD_PATTERNS and not any(path.glob("*.safetensors")):
        path = _download(model, revision or DEFAULT_REVISION, [*patterns, PICKLED])
    return path


def locate_config(model: str, revision: str | None = None) -> Path:
    """A directory with the config.json of `model`, which is all that is downloaded of a hub id."""
    return locate(model, revision, ["config.json"])


def _download(model: str, revision: str, patterns: list[str]) -> Path:
    from modelscope.hub.snapshot_download import snapshot_download

    def snapshot(**options: Any) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, **options))

    try:
        return snapshot()
    except Exception as error:  # the client's errors have no common base: requests', its own, ValueError
        try:
            return snapshot(local_files_only=True)  # no network: what was downloaded before will do
        except Exception:  # likewise; what is told is why the hub was of no use, not that the cache is empty
            raise CheckpointError(
                f"{model}: no such directory here, and revision {revision!r} cannot be had from the hub "
                f"({type(error).__name__}: {one_line(error, 160)}). Check the name, the revision and the network"
            ) from error


def open_checkpoint(path: str | Path, verify: bool = True) -> Checkpoint:
    """Check everything but the values of the weights, in seconds; with a manifest and `verify`, those too.

    Raises:
        CheckpointError: names the file, what was found, what was expected, and the command that repairs it.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            found = "is a file; give the directory that holds config.json" if path.exists() else "no such directory"
            raise CheckpointError(f"{path}: {found}")
        config = read_config(path)
        files = weight_files(path)
        if verify:
            refuse(manifest.problems(path, [*_side_files(path), *(file.name for file in files)]))
        tokenizer = read_tokenizer(path)
        refuse(vocabulary_problems(path, config, tokenizer))
        quantization = read_quantization(path)
        tensors, wrong = inventory(path, stored_shapes(parameter_shapes(config), quantization), files)
        refuse(wrong)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {repair_hint(path)}") from error.__cause__
    return Checkpoint(path, config, tokenizer, tensors, quantization)


def expected_tensors(path: Path, config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that the weight files must hold."""
    return stored_shapes(parameter_shapes(config), read_quantization(path))


def read_quantization(path: Path) -> str | None:
    """How the linear layers of a directory are stored: "int8", "int4" or None; another way is a CheckpointError."""
    return _quantization(path / "config.json", read_json(path / "config.json"))


def _quantization(file: Path, raw: dict) -> str | None:
    entry = raw.get("quantization_config")
    if entry is None:
        return None
    found = (entry.get("quant_method"), entry.get("version")) if isinstance(entry, dict) else (entry, None)
    for method in METHODS:
        if found == (f"dolly-{method}", 1):
            return method
    known = ", ".join(f"dolly-{method}" for method in METHODS)
    raise CheckpointError(
        f"{file}: quantization_config is {found[0]!r} version {found[1]!r}, which this version cannot "
        f"read; it knows version 1 of {known}. Use the checkpoint that it was made from"
    )


def refuse(found: list[str]) -> None:
    """Raises CheckpointError where there are problems, and tells three of them."""
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise CheckpointError("; ".join(found[:3]) + more)


def _side_files(path: Path) -> list[str]:
    names = ("config.json", "tokenizer.json", "special_tokens_map.json", "tokenizer_config.json")
    return [name for name in names if (path / name).exists()] + [p.name for p in sorted(path.glob("*.index.json"))]


def repair_hint(path: Path) -> str:
    """The command that fetches a good copy, with the hub id where the path tells it."""
    found = re.search(r"models/([^/]+)--([^/]+)/snapshots/([^/]+)$", path.absolute().as_posix())
    model, revision, place = ("OWNER/NAME", "REVISION", f" --local_dir {shlex.quote(str(path))}")
    if found:
        model, revision, place = f"{found[1]}/{found[2]}", found[3], ""
    return f"To repair it: modelscope download --model {model} --revision {revision}{place}"


def read_config(path: Path) -> GPTNeoXConfig:
    """config.json in the spelling of 2023 (rotary_pct, rotary_emb_base), of today (rope_parameters), or both."""
    file = path / "config.json"
    raw = read_json(file)
    model_type = MODEL_TYPE if _quantization(file, raw) else "gpt_neox"
    if raw.get("model_type") != model_type:
        raise CheckpointError(f"{file}: model_type is {raw.get('model_type')!r}, dolly-v2 is {model_type!r}")
    for key, (low, high) in _REQUIRED.items():
        if type(raw.get(key)) is not int or not low <= raw[key] <= high:
            raise CheckpointError(f"{file}: {key} is {raw.get(key)!r}, expected a whole number from {low} to {high}")
    from transformers import GPTNeoXConfig

    try:
        config = GPTNeoXConfig(**{key: raw[key] for key in (*_REQUIRED, *_OPTIONAL) if key in raw})
        config.rope_parameters = {key: value for key, value in config.rope_parameters.items()}
        _check_constants(config)
        _check_spellings(raw)
    except Exception as error:  # transformers validates with errors of several kinds
        raise CheckpointError(f"{file}: {one_line(error)}") from None
    return config


def _check_constants(config: GPTNeoXConfig) -> None:
    from transformers.activations import ACT2FN

    rope = config.rope_parameters
    factor, theta, heads = rope["partial_rotary_factor"], rope["rope_theta"], config.num_attention_heads
    for name, value in (("rotary_pct (partial_rotary_factor)", factor), ("rotary_emb_base (rope_theta)", theta)):
        if type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}, expected a number")
    width = config.hidden_size // heads * factor
    positions = config.max_position_embeddings
    sound = {
        f"{heads} heads do not divide hidden_size {config.hidden_size}": config.hidden_size % heads == 0,
        f"hidden_act {config.hidden_act!r} is unknown": config.hidden_act in ACT2FN,
        f"rope_type {rope['rope_type']!r} is not supported, expected 'default'": rope["rope_type"] == "default",
        f"rotary_pct (partial_rotary_factor) {factor!r} must be in (0, 1]": 0 < factor <= 1,
        f"rotary width {width} must be even and at least 2": int(width) >= 2 and int(width) % 2 == 0,
        f"rotary_emb_base (rope_theta) {theta!r} must be positive": 0 < theta < float("inf"),
        f"layer_norm_eps {config.layer_norm_eps!r} must be in (0, 1)": 0 < config.layer_norm_eps < 1,
        f"max_position_embeddings {positions!r} must be 1 to 1048576": 1 <= positions <= 1 << 20,
    }
    wrong = [message for message, holds in sound.items() if not holds]
    if wrong:
        raise ValueError("; ".join(wrong))


def _check_spellings(raw: dict) -> None:
    """Old and new rope keys, where both are there, must agree: readers of either would compute another network."""
    rope = raw.get("rope_parameters") or {}
    for old, new in (("rotary_pct", "partial_rotary_factor"), ("rotary_emb_base", "rope_theta")):
        if old in raw and new in rope and raw[old] != rope[new]:
            raise ValueError(f"{old} is {raw[old]!r}, but rope_parameters says {new} {rope[new]!r}; make them equal")


def read_tokenizer(path: Path, add_keys: bool = False) -> DollyTokenizer:
    """tokenizer.json as it is, plus the keys where only special_tokens_map.json or tokenizer_config.json names them.

    Args:
        path: the directory.
        add_keys: add keys that are named nowhere, which makes a base model's tokenizer dolly's, as training does.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_file(str(file))
        named = [*(token for token in _named_special_tokens(path) if token in CONTROL_KEYS)]
        named += CONTROL_KEYS if add_keys else ()
        present = [token for token in CONTROL_KEYS if backend.token_to_id(token) is not None]
        # Adding a token that is there keeps its id and marks it as special, whatever the file said.
        keys = [*present, *(token for token in dict.fromkeys(named) if token not in present)]
        backend.add_special_tokens([AddedToken(key, special=True, normalized=False) for key in keys])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )
        return DollyTokenizer(tokenizer)
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is a BaseException
        raise CheckpointError(f"{file}: not a usable tokenizer ({one_line(error)})") from None


def _named_special_tokens(path: Path) -> Iterator[str]:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).exists():
            tokens = read_json(path / name).get("additional_special_tokens") or []
            for token in tokens if isinstance(tokens, list) else []:
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    yield text


def vocabulary_problems(path: Path, config: GPTNeoXConfig, tokenizer: DollyTokenizer) -> list[str]:
    """Whether the network knows every token that the tokenizer can produce."""
    ids = tokenizer.tokenizer.get_vocab().values()
    if max(ids) < config.vocab_size:
        return []
    return [
        f"{path / 'config.json'}: vocab_size is {config.vocab_size}, but the tokenizer has {len(ids)} tokens with ids "
        f"up to {max(ids)}, its control tokens up to {max(tokenizer.special_ids)}"
    ]
