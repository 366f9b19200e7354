"""The columns of a data set -> instruction, context and response, whatever it calls them.

| layout | columns | source |
|---|---|---|
| dolly | instruction, response, perhaps context | databricks-dolly-15k |
| alpaca | instruction, output, perhaps input | tatsu-lab/stanford_alpaca |
| query/response | query, response, perhaps system, history | modelscope/ms-swift, custom data sets |
| prompt/completion | prompt, completion | huggingface/trl, dataset formats |
| messages | messages: [{role, content}, ...] | OpenAI's chat format |
| ShareGPT | conversations: [{from, value}, ...], perhaps system | lm-sys/FastChat, data/dummy_conversation.json |

A conversation of one question and its answer is a record; its system message is the context, as in
`prompt.reduce_conversation`. dolly is not a dialogue model, so one of several turns is no record, unless the last pair
of it is asked for.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from modelscope_dolly.errors import PromptError, SettingError, unknown_name
from modelscope_dolly.prompt import reduce_conversation
from train.data.formats import excerpt

FIELDS = ("instruction", "context", "response")
REQUIRED = ("instruction", "response")
#: What other data sets call our fields, for a suggestion where no layout fits.
USUAL_NAMES = {
    "instruction": ("question", "prompt", "query"),
    "context": ("input",),
    "response": ("output", "answer", "completion"),
}
#: A column of conversations may be named like this in `columns`.
MESSAGES = "messages"
#: ShareGPT's speakers -> roles.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Reduced(NamedTuple):
    """What a row says, each value as it was found, and how many questions it holds."""

    fields: dict[str, Any]
    turns: int = 1


class Unusable(ValueError):
    """A row from which no fields can be taken: (kind, detail) of the problem."""


@dataclass(frozen=True)
class Layout:
    """How rows become fields.

    Attributes:
        name: for the report.
        columns: our field name -> the name in the rows; of conversations the column that holds them.
        optional: columns that are read besides where they are there.
        reduce: a row -> its fields. Raises Unusable.
    """

    name: str
    columns: Mapping[str, str]
    reduce: Callable[[Mapping[str, Any]], Reduced]
    optional: tuple[str, ...] = ()

    @property
    def read(self) -> set[str]:
        """All columns that are read."""
        return {*self.columns.values(), *self.optional}


def plain(name: str, columns: Mapping[str, str]) -> Layout:
    """A column for each field."""

    def reduce(row: Mapping[str, Any]) -> Reduced:
        return Reduced({field: row.get(column) for field, column in columns.items()})

    return Layout(name, columns, reduce)


def _with_history(row: Mapping[str, Any]) -> Reduced:
    """ms-swift's columns: what was said before is in `history`, as pairs."""
    history = row.get("history") or []
    if not isinstance(history, (list, tuple)):
        raise Unusable("wrong_type", f"history must be a list of pairs, found {type(history).__name__}")
    fields = {"instruction": row.get("query"), "context": row.get("system"), "response": row.get("response")}
    return Reduced(fields, 1 + len(history))


def conversation(name: str, column: str) -> Layout:
    """A column of messages, in OpenAI's form or in ShareGPT's; a column `system` counts as their first message."""

    def reduce(row: Mapping[str, Any]) -> Reduced:
        return _last_pair(_messages(column, row.get(column), row.get("system")))

    return Layout(name, {MESSAGES: column}, reduce, optional=("system",))


LAYOUTS = (
    plain("dolly", {field: field for field in FIELDS}),
    plain("alpaca", {"instruction": "instruction", "context": "input", "response": "output"}),
    Layout("query/response", {"instruction": "query", "response": "response"}, _with_history, ("system", "history")),
    plain("prompt/completion", {"instruction": "prompt", "response": "completion"}),
    conversation("messages", "messages"),
    conversation("ShareGPT", "conversations"),
)


def find_layout(name: str, header: Collection[str], columns: Mapping[str, str]) -> Layout:
    """The layout of a data set with these columns.

    Args:
        name: of the data set, for messages.
        header: all columns of its rows; empty where no row was readable, and the report will say why.
        columns: our field name -> theirs, from the recipe; where given, it decides.

    Raises:
        SettingError: columns that are needed are missing, or several layouts fit.
    """
    if columns:
        return _mapped(name, columns, header)
    fitting = [layout for layout in LAYOUTS if set(_required(layout)) <= set(header)]
    if not header or (fitting and fitting[0].name == "dolly"):  # our own columns decide, whatever else is there
        return LAYOUTS[0]
    if len(fitting) > 1:
        described = " and ".join(f"{layout.name} ({', '.join(_required(layout))})" for layout in fitting)
        raise SettingError(f"{name}: its columns fit {described}; say which with columns: {{our name: theirs}}")
    return fitting[0] if fitting else _mapped(name, {}, header)


def _required(layout: Layout) -> list[str]:
    return [column for field, column in layout.columns.items() if field != "context"]


def _mapped(name: str, columns: Mapping[str, str], header: Collection[str]) -> Layout:
    """The layout that `columns` describes."""
    known = (*FIELDS, MESSAGES)
    wrong = [unknown_name("field in columns", str(field), known) for field in columns if field not in known]
    wrong += [f"columns: {field} is {theirs!r}, it must be text" for field, theirs in columns.items()
              if not isinstance(theirs, str)]  # fmt: skip
    if not wrong and MESSAGES in columns and len(columns) > 1:
        wrong = [f"columns: {MESSAGES} holds whole conversations and stands alone; leave out the others, or it"]
    if wrong:
        raise SettingError("; ".join(wrong))
    if MESSAGES in columns:
        layout = conversation("messages, by columns", columns[MESSAGES])
        _check_present(name, {MESSAGES: columns[MESSAGES]}, header)
        return layout
    mapping = {field: columns.get(field, field) for field in FIELDS}
    if "context" not in columns and "context" in columns.values():
        del mapping["context"]  # the column of that name holds something else, and there is no context
    repeated = [theirs for theirs, times in Counter(mapping.values()).items() if times > 1]
    if repeated:
        raise SettingError(f"columns: {excerpt(repeated[0])} is taken for more than one of {', '.join(FIELDS)}")
    _check_present(name, {field: theirs for field, theirs in mapping.items()
                          if field in REQUIRED or field in columns}, header)  # fmt: skip
    return plain("by columns", mapping)


def _check_present(name: str, wanted: Mapping[str, str], header: Collection[str]) -> None:
    """Raises SettingError for a column that is not there, with the ones that are."""
    absent = {field: theirs for field, theirs in wanted.items() if theirs not in header}
    if absent and header:
        similar = {field: column for field in absent if (column := _similar(field, absent[field], header))}
        suggestion = ", ".join(f"{field}: {column}" for field, column in similar.items())
        raise SettingError(
            f"{name}: no column {', '.join(map(excerpt, absent.values()))}."
            f"{f' Did you mean columns: {{{suggestion}}}?' if similar else ''} "
            f"Found: {', '.join(map(excerpt, list(header)[:20]))}. Name them with columns: {{our name: theirs}}"
        )


def _similar(field: str, wanted: str, header: Collection[str]) -> str | None:
    """The column that was probably meant: spelled alike, or another usual name of the field."""
    alike = difflib.get_close_matches(wanted, header, n=1, cutoff=0.6)
    usual = [column for column in (field, *USUAL_NAMES.get(field, ())) if column in header]
    return next(iter([*alike, *usual]), None)


def _messages(column: str, value: Any, system: Any) -> list[dict[str, Any]]:
    """Messages in OpenAI's form. Raises Unusable."""
    if value is None:
        raise Unusable("missing", f"no {column}")
    if not isinstance(value, (list, tuple)):
        raise Unusable("wrong_type", f"{column} must be a list of messages, found {type(value).__name__}")
    messages = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise Unusable("wrong_type", f"message {number} must be an object, found {type(message).__name__}")
        if "from" in message and "value" in message:
            role, content = message["from"], message["value"]
            if not isinstance(role, str) or role not in _SPEAKERS:
                raise Unusable("wrong_type", unknown_name(f"speaker of message {number}", str(role), _SPEAKERS))
            messages.append({"role": _SPEAKERS[role], "content": content})
        elif "role" in message and "content" in message:
            messages.append({"role": message["role"], "content": message["content"]})
        else:
            raise Unusable("wrong_type", f"message {number} has neither role and content nor from and value")
    return messages


def _last_pair(messages: Sequence[Mapping[str, Any]]) -> Reduced:
    """The last question that was answered, and its answer. Raises Unusable."""
    roles = [message["role"] for message in messages]
    answer = max((at for at, role in enumerate(roles) if role == "assistant"), default=None)
    if answer is None:
        raise Unusable("missing", "no message of the assistant")
    if answer == 0 or roles[answer - 1] != "user":
        raise Unusable("wrong_type", "the last answer does not follow a message of the user")
    question = messages[answer - 1]["content"]
    if isinstance(question, str) and not question.strip():
        raise Unusable("empty_instruction", "the message of the user is empty")
    try:
        instruction, context = reduce_conversation(messages[:answer])
    except PromptError as error:
        raise Unusable("wrong_type", str(error)) from None
    fields = {"instruction": instruction, "context": context, "response": messages[answer]["content"]}
    return Reduced(fields, max(roles.count("user"), roles.count("assistant")))
