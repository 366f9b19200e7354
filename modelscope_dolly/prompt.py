"""The dolly prompt contract: template, token ids, control tokens. The only file that spells a key.

The bytes are those of the public training code (databrickslabs/dolly, training/consts.py and training/generate.py):

    Below is an instruction that describes a task. Write a response that appropriately completes the request.

    ### Instruction:
    {instruction}

    Input:                    (this section only when there is context)
    {context}

    ### Response:
    {response}

    ### End

Three keys are single control tokens of the tokenizer: `### Instruction:`, `### Response:` with its newline, `### End`.
A prompt is built from token ids, never by searching a string for keys, so whatever a user types stays text.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelscope_dolly.errors import CheckpointError, PromptError, shown, unknown_name

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
INSTRUCTION_KEY = "### Instruction:"
INPUT_KEY = "Input:"
RESPONSE_KEY = "### Response:\n"  # the newline belongs to the token
END_KEY = "### End"
END_OF_TEXT = "<|endoftext|>"

#: In the order in which the reference adds them to the GPT-NeoX tokenizer, which gives them ids 50277, 50278, 50279.
CONTROL_KEYS = (END_KEY, INSTRUCTION_KEY, RESPONSE_KEY)


def check_text(name: str, text: object) -> str:
    """Return `text` if it is usable text; `name` is what the message calls it.

    Raises:
        PromptError: not a string, or a string that has no UTF-8 form (a lone surrogate).
    """
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a string, found {type(text).__name__}: {shown(text, 60)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{name} is not valid Unicode: lone surrogate {text[error.start]!r} at character {error.start}"
        ) from None
    return text


def check_instruction(instruction: object) -> str:
    """`check_text`, and the text must not be blank. Raises PromptError."""
    text = check_text("instruction", instruction)
    if not text.strip():
        raise PromptError("instruction is empty: give a question or a task")
    return text


#: Of a message in a conversation.
ROLES = ("system", "user", "assistant")


def reduce_conversation(messages: object) -> tuple[str, str | None]:
    """Instruction and context of a conversation, as `chat_template` renders it; nothing else reduces one.

    dolly is not a dialogue model: the last user message is the instruction, the last system message, if there is one,
    the context, and whatever else was said is dropped.

    Args:
        messages: a list of {"role": one of ROLES, "content": text}.

    Raises:
        PromptError: not such a list, no user message, or an empty one.
    """
    if not isinstance(messages, (list, tuple)):
        raise PromptError(f"messages must be a list of messages, found {type(messages).__name__}")
    last: dict[str, str] = {}
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise PromptError(
                f"message {number} must be {{'role': ..., 'content': ...}}, found {type(message).__name__}: "
                f"{str(message)[:60]!r}"
            )
        if message["role"] not in ROLES:
            raise PromptError(unknown_name(f"role of message {number}", str(message["role"]), ROLES))
        last[message["role"]] = check_text(f"content of message {number}", message["content"])
    if "user" not in last:
        raise PromptError(f"none of the {len(messages)} messages has the role 'user': there is nothing to answer")
    return check_instruction(last["user"]), last.get("system") or None


def _body(instruction: str, context: str | None) -> str:
    """The text between the instruction key and the response key."""
    section = f"{INPUT_KEY}\n{context}\n\n" if context else ""
    return f"\n{instruction}\n\n{section}"


def render(instruction: str, context: str | None = None) -> str:
    """The prompt as one string, formatted as the reference does. For people and tests: the model gets `encode`."""
    return f"{INTRO}\n\n{INSTRUCTION_KEY}{_body(instruction, context)}{RESPONSE_KEY}"


def render_example(instruction: str, context: str | None, response: str) -> str:
    """A whole training text as one string, formatted as the reference does."""
    return f"{render(instruction, context)}{response}\n\n{END_KEY}"


@dataclass(frozen=True)
class ControlTokens:
    """Token ids of the keys in one tokenizer (GPT-NeoX-20B: end 50277, instruction 50278, response 50279, eos 0)."""

    end: int
    instruction: int
    response: int
    eos: int

    @property
    def stop(self) -> frozenset[int]:
        """Ids that end an answer."""
        return frozenset((self.end, self.eos))


class DollyTokenizer:
    """A Hugging Face tokenizer together with the prompt contract. Thread-safe.

    Text is encoded by a private backend that never recognises a special token in its input. The flag for that is a
    state of the backend which every call of the public tokenizer sets: with a shared backend, a call in another thread
    could turn a typed key into a control token.

    Args:
        tokenizer: any fast tokenizer of transformers that knows the three keys, which is copied; or a backend of the
            tokenizers library, which is then owned by this object.

    Raises:
        CheckpointError: a key is not a single token (as in a base model's tokenizer), or not marked as special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast | Tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            self.__dict__["tokenizer"] = tokenizer  # as the cached property below
        self._text = copy.deepcopy(backend) if backend is not None else tokenizer
        self._limits = self._text.truncation, self._text.padding
        self._text.no_truncation()
        self._text.no_padding()
        self._text.encode_special_tokens = False
        self.control = ControlTokens(*(_single_token(self._text, key) for key in (*CONTROL_KEYS, END_OF_TEXT)))
        self._text.encode_special_tokens = True
        self._bytes: dict[int, bytes] = {}
        self._special = {id for id, token in self._text.get_added_tokens_decoder().items() if token.special}
        from tokenizers.decoders import ByteLevel

        decoder = self._text.decoder
        if not isinstance(decoder, ByteLevel):
            found = type(decoder).__name__ if decoder is not None else "missing"
            raise CheckpointError(f"tokenizer.json: the decoder is {found}, that of a dolly model is ByteLevel")
        leaked = [key for key in (*CONTROL_KEYS, END_OF_TEXT) if set(self.encode_text(key)) & set(self.special_ids)]
        if leaked:
            raise CheckpointError(
                f"tokenizer.json: {leaked[0]!r} is not marked as special, so a user could type it as a control "
                "token; add it to additional_special_tokens in special_tokens_map.json"
            )

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """transformers' tokenizer, for other libraries. Made when it is first asked for: the import takes a second."""
        from transformers import PreTrainedTokenizerFast

        backend = copy.deepcopy(self._text)
        backend.encode_special_tokens = False
        truncation, padding = self._limits
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
        )

    def vocabulary(self) -> dict[str, int]:
        """Id of each token, added ones included."""
        return self._text.get_vocab(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        control = self.control
        return frozenset((control.end, control.instruction, control.response, control.eos))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of ordinary text; a key typed in it becomes several ordinary tokens."""
        return self._text.encode(text, add_special_tokens=False).ids

    def encode(self, instruction: str, context: str | None = None) -> list[int]:
        """Token ids of the prompt.

        For text without keys they equal the tokenization of `render(...)`: a tokenizer first splits its input at
        special tokens, so the pieces between them can be encoded one by one.
        """
        body = self.encode_text(_body(instruction, context))
        return [*self.encode_text(f"{INTRO}\n\n"), self.control.instruction, *body, self.control.response]

    def encode_example(self, instruction: str, context: str | None, response: str) -> tuple[list[int], int]:
        """Token ids of a training text, and the length of its prompt: the ids after the prompt are learned."""
        prompt = self.encode(instruction, context)
        return [*prompt, *self.encode_text(f"{response}\n\n"), self.control.end], len(prompt)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text; nothing for a special token, or an id that stands for none.

        The bytes of some ids, decoded with replacement characters, are `decode` of these ids.
        """
        if token_id not in self._bytes:
            self._bytes[token_id] = self._bytes_of(token_id)
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token as people read it: the key of a special token; otherwise its bytes, half a character as U+FFFD."""
        if token_id in self._special:
            return self._text.id_to_token(token_id)
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def _bytes_of(self, token_id: int) -> bytes:
        token = self._text.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # a token that was added as it is written
            return token.encode("utf-8")

    def decode(self, ids: list[int]) -> str:
        """Text of ids without special tokens, otherwise unchanged; incomplete UTF-8 becomes U+FFFD."""
        return self._text.decode(ids, skip_special_tokens=True)


def _byte_alphabet() -> dict[str, int]:
    """The character that a byte-level BPE writes for each byte (GPT-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _single_token(backend: Tokenizer, key: str) -> int:
    ids = backend.encode(key, add_special_tokens=False).ids
    if len(ids) != 1 or backend.id_to_token(ids[0]) != key:
        raise CheckpointError(
            f"tokenizer.json: {key!r} must be a single token, found {len(ids)} tokens {ids}. This is not the "
            "tokenizer of a dolly model; take tokenizer.json from the model's own repository"
        )
    return ids[0]


def chat_template() -> str:
    """A Jinja template that renders the last user message of a chat as this prompt, for servers that use templates.

    It keeps what `reduce_conversation` keeps: a system message becomes the context section. The template ends in an
    expression because Jinja drops a template's own last newline, and the response key needs it. A server tokenizes the
    rendered string, so keys typed by its users do become control tokens there.
    """
    quoted = {name: repr(text) for name, text in _TEMPLATE_TEXTS.items()}
    return (
        "{%- set ns = namespace(instruction='', context='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{%- set ns.instruction = message['content'] -%}"
        "{%- elif message['role'] == 'system' -%}{%- set ns.context = message['content'] -%}{%- endif -%}"
        "{%- endfor -%}"
        f"{{{{- {quoted['head']} + ns.instruction + '\\n\\n' -}}}}"
        f"{{%- if ns.context -%}}{{{{- {quoted['input']} + ns.context + '\\n\\n' -}}}}{{%- endif -%}}"
        f"{{{{- {quoted['response']} -}}}}"
    )


_TEMPLATE_TEXTS = {
    "head": f"{INTRO}\n\n{INSTRUCTION_KEY}\n",
    "input": f"{INPUT_KEY}\n",
    "response": RESPONSE_KEY,
}
