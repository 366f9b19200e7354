"""config.json: read in every spelling, checked, and the entry that says how the weights are quantised."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.engine.network_config import NetworkConfig
from modelscope_dolly.errors import CheckpointError, one_line, shown
from modelscope_dolly.files import read_json
from modelscope_dolly.kernels.quantized_linear import MODEL_TYPE, PACKED, STORED_METHODS, VERSIONS

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

#: Keys that shape the network: (smallest, largest) plausible value.
_REQUIRED = {
    "vocab_size": (3, 1 << 24),
    "hidden_size": (1, 1 << 17),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 1 << 19),
}
#: Keys that may be missing: their types.
_OPTIONAL = {
    "max_position_embeddings": int, "hidden_act": str, "layer_norm_eps": float, "use_parallel_residual": bool,
    "attention_bias": bool, "tie_word_embeddings": bool,
}  # fmt: skip
_KINDS = {int: "a whole number", str: "a text", float: "a number with a decimal point", bool: "true or false"}
#: Entries of rope_parameters: how they were spelled until 2025, and what they are where nothing is said.
_ROPE = {"rope_theta": ("rotary_emb_base", 10000), "partial_rotary_factor": ("rotary_pct", 0.25)}


def read_config(path: Path) -> NetworkConfig:
    """The configuration of a directory, with rotary_pct and rotary_emb_base (2023), rope_parameters (today), or both.

    Raises:
        CheckpointError: not the configuration of a dolly-v2.
    """
    file = path / "config.json"
    raw = read_json(file)
    model_type = MODEL_TYPE if _quantization(file, raw)[0] else "gpt_neox"
    if raw.get("model_type") != model_type:
        raise CheckpointError(f"{file}: model_type is {raw.get('model_type')!r}, dolly-v2 is {model_type!r}")
    for key, (low, high) in _REQUIRED.items():
        if type(raw.get(key)) is not int or not low <= raw[key] <= high:
            raise CheckpointError(f"{file}: {key} is {raw.get(key)!r}, expected a whole number from {low} to {high}")
    try:
        given = {key: _of_type(key, raw[key], kind) for key, kind in _OPTIONAL.items() if key in raw}
        config = NetworkConfig(**{key: raw[key] for key in _REQUIRED}, **given, rope_parameters=_rope(raw))
        _check_constants(config)
        _check_spellings(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: {one_line(error)}") from None
    return config


def transformers_config(config: NetworkConfig, **more: object) -> GPTNeoXConfig:
    """The same as transformers' class, which writes config.json."""
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**dataclasses.asdict(config), **more)


def _of_type(key: str, value: object, kind: type) -> object:
    if type(value) is not kind:
        raise ValueError(f"{key} is {shown(value)}, expected {_KINDS[kind]}")
    return value


def _rope(raw: dict) -> dict:
    """rope_parameters (called rope_scaling before), filled up from the entries of 2023."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {shown(rope)}, expected an object")
    constants = {name: rope.get(name, raw.get(old, default)) for name, (old, default) in _ROPE.items()}
    return {"rope_type": rope.get("rope_type", rope.get("type", "default")), **constants}


def read_quantization(path: Path) -> tuple[str | None, int]:
    """How the linear layers of a directory are stored: "int8", "int4" or None, and the version of that layout (see
    kernels/quantized_linear.py). Any other way is a CheckpointError."""
    return _quantization(path / "config.json", read_json(path / "config.json"))


def quantization_entry(method: str) -> dict:
    """The keys of config.json that mark a checkpoint as quantised by `method`."""
    return {"model_type": MODEL_TYPE, "quantization_config": {"quant_method": f"dolly-{method}", "version": PACKED}}


def _quantization(file: Path, raw: dict) -> tuple[str | None, int]:
    entry = raw.get("quantization_config")
    if entry is None:
        return None, PACKED
    name, version = (entry.get("quant_method"), entry.get("version")) if isinstance(entry, dict) else (entry, None)
    for method in STORED_METHODS:
        if name == f"dolly-{method}" and type(version) is int and version in VERSIONS:
            return method, version
    known = ", ".join(f"dolly-{method}" for method in STORED_METHODS)
    raise CheckpointError(
        f"{file}: quantization_config is {name!r} version {version!r}, which this version cannot "
        f"read; it knows versions {' and '.join(map(str, VERSIONS))} of {known}. Use the checkpoint that it was made "
        "from"
    )


def _known_activation(name: str) -> bool:
    if name == "gelu":  # of every dolly-v2; the import takes a second
        return True
    from transformers.activations import ACT2FN

    return name in ACT2FN


def _check_constants(config: NetworkConfig) -> None:
    rope = config.rope_parameters
    factor, theta, heads = rope["partial_rotary_factor"], rope["rope_theta"], config.num_attention_heads
    for name, value in (("rotary_pct (partial_rotary_factor)", factor), ("rotary_emb_base (rope_theta)", theta)):
        if type(value) not in (int, float):
            raise ValueError(f"{name} is {value!r}, expected a number")
    width = config.hidden_size // heads * factor
    positions = config.max_position_embeddings
    conditions = {
        f"{heads} heads do not divide hidden_size {config.hidden_size}": config.hidden_size % heads == 0,
        f"hidden_act {config.hidden_act!r} is unknown": _known_activation(config.hidden_act),
        f"rope_type {rope['rope_type']!r} is not supported, expected 'default'": rope["rope_type"] == "default",
        f"rotary_pct (partial_rotary_factor) {factor!r} must be in (0, 1]": 0 < factor <= 1,
        f"rotary width {width} must be even and at least 2": int(width) >= 2 and int(width) % 2 == 0,
        f"rotary_emb_base (rope_theta) {theta!r} must be positive": 0 < theta < float("inf"),
        f"layer_norm_eps {config.layer_norm_eps!r} must be in (0, 1)": 0 < config.layer_norm_eps < 1,
        f"max_position_embeddings {positions!r} must be 1 to 1048576": 1 <= positions <= 1 << 20,
    }
    violations = [message for message, holds in conditions.items() if not holds]
    if violations:
        raise ValueError("; ".join(violations))


def _check_spellings(raw: dict) -> None:
    """Old and new rope keys must agree where both are present: their readers would compute different networks."""
    rope = raw.get("rope_parameters") or {}
    for new, (old, _) in _ROPE.items():
        if old in raw and new in rope and raw[old] != rope[new]:
            raise ValueError(f"{old} is {raw[old]!r}, but rope_parameters says {new} {rope[new]!r}; make them equal")
