"""Inputs, outputs and keywords as ModelScope's tasks of text generation and chat have them: for its pipeline, and for
a server that answers in the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelscope_dolly.errors import SettingError

#: Keywords of ModelScope's schemas of both tasks that dolly does not have -> what to do instead.
_REFUSED = {
    "max_length": "it counts the prompt, too; give max_new_tokens, which counts the answer alone",
    "eos_token_id": "an answer ends at the end tokens of the checkpoint; give stop for a text that ends it earlier",
    "bos_token_id": "a prompt begins as dolly was trained; leave it out",
    "pad_token_id": "prompts are not padded; leave it out",
}


def as_input(value: Any) -> Any:
    """{"messages": value} for a list of messages, which is how ModelScope's server hands over a conversation."""
    if isinstance(value, list) and value and all(isinstance(each, Mapping) and "role" in each for each in value):
        return {"messages": value}
    return value


def output(value: Any, text: str) -> dict[str, Any]:
    """An answer in the form that belongs to its input."""
    return message(text) if isinstance(value, Mapping) and "messages" in value else {"text": text}


def message(text: str) -> dict[str, Any]:
    """An answer as the next message of a conversation."""
    return {"message": {"role": "assistant", "content": text}}


def refuse_keywords(keywords: Mapping[str, Any]) -> None:
    """Raises SettingError for those that ModelScope's schemas advertise and that mean nothing here."""
    if found := [name for name in keywords if name in _REFUSED]:
        raise SettingError("; ".join(f"{name} is not a keyword of dolly: {_REFUSED[name]}" for name in found))
