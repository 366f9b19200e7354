"""The tokenizer of a checkpoint directory, with the control keys wherever its files name them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modelscope_dolly.errors import CheckpointError, one_line
from modelscope_dolly.files import file_kind, read_file, read_json
from modelscope_dolly.prompt import CONTROL_KEYS, END_OF_TEXT, DollyTokenizer

if TYPE_CHECKING:
    from modelscope_dolly.engine.network_config import NetworkConfig


def read_tokenizer(path: Path, add_keys: bool = False) -> DollyTokenizer:
    """tokenizer.json, plus the control keys that only special_tokens_map.json or tokenizer_config.json names.

    Args:
        path: the directory.
        add_keys: add keys that no file names, which turns a base model's tokenizer into dolly's, as training does.

    Raises:
        CheckpointError: no usable tokenizer, or one without the keys.
    """
    file = path / "tokenizer.json"
    content = read_file(file)
    from tokenizers import AddedToken, Tokenizer

    try:
        backend = Tokenizer.from_buffer(content)
        wanted = [token for token in _named_special_tokens(path) if token in CONTROL_KEYS]
        wanted += CONTROL_KEYS if add_keys else ()
        present = [token for token in CONTROL_KEYS if backend.token_to_id(token) is not None]
        # A token that is already there keeps its id when it is added, and is marked as special whatever the file said.
        keys = dict.fromkeys([*present, *wanted])
        if END_OF_TEXT not in {token.content for token in backend.get_added_tokens_decoder().values()}:
            keys[END_OF_TEXT] = None
        backend.add_special_tokens([AddedToken(key, special=True, normalized=False) for key in keys])
        return DollyTokenizer(backend)
    except (CheckpointError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the Rust library is a BaseException
        raise CheckpointError(f"{file}: not a usable tokenizer ({one_line(error)})") from None


def _named_special_tokens(path: Path) -> Iterator[str]:
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if file_kind(path / name):
            tokens = read_json(path / name).get("additional_special_tokens") or []
            for token in tokens if isinstance(tokens, list) else []:
                text = token.get("content") if isinstance(token, dict) else token
                if isinstance(text, str):
                    yield text


def check_vocabulary(path: Path, config: NetworkConfig, tokenizer: DollyTokenizer) -> None:
    """Raises CheckpointError unless the network has an embedding for every token that the tokenizer can produce."""
    ids = tokenizer.vocabulary().values()
    if max(ids) >= config.vocab_size:
        raise CheckpointError(
            f"{path / 'config.json'}: vocab_size is {config.vocab_size}, but the tokenizer has {len(ids)} tokens with "
            f"ids up to {max(ids)}, its control tokens up to {max(tokenizer.special_ids)}"
        )
