"""The text of a row: a text, a chat, or a prompt with its completion, in the forms in which datasets have them."""

import json
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from jaxllm.errors import listed

Chat = list[dict[str, Any]]
"""Messages with a role and a content."""


class Pair(NamedTuple):
    """A prompt and its completion, both as texts or both as messages."""

    prompt: str | Chat
    completion: str | Chat


Text = str | Chat | Pair

CHAT_FIELDS = ("messages", "conversations")

FORMS = (("text",), *((name,) for name in CHAT_FIELDS), ("prompt", "completion"), ("instruction", "output"))
"""The fields of the kinds of rows, in the order in which they are looked for. The last is Alpaca's form, which may have
a field `input`."""

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
"""Roles by the names that ShareGPT's form has for them, in a message's field `from`."""

QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "user", "input", "inputs")
ANSWERS = ("output", "outputs", "response", "responses", "completion", "answer", "answers", "solution", "assistant",
           "target", "targets", "chosen", "rejected")  # fmt: skip
"""Fields that are a question or its answer. One of them without the other is not a text to train on."""


class OtherPart(Exception):
    """A message has a part that is not text, such as a picture. The message says what it is."""


def forms(text_field: str, with_pairs: bool = True) -> tuple[tuple[str, ...], ...]:
    """The fields that a row may have its text in; earlier versions read no pairs."""
    if text_field != "text":
        return ((text_field,),)
    return FORMS if with_pairs else tuple(form for form in FORMS if len(form) == 1)


def form_in(names: Collection[str], text_field: str, with_pairs: bool = True) -> tuple[str, ...] | None:
    """Which of a row's fields are read; None: together they are not of a known form."""
    for form in forms(text_field, with_pairs):
        if {*form} <= {*names}:
            return (*form, "input") if form == FORMS[-1] and "input" in names else form
    return None


def text_in(row: dict[str, Any] | None, text_field: str, strict: bool = True) -> Text | None:
    """A row's text, chat or pair; None where its fields hold something else or nothing.

    `a.b` is the field `b` of the field `a`, where there is no field of this name.

    `strict`: a chat that is written as a text in JSON is a chat, and pairs are read; earlier versions took it for a
    text.

    Raises:
        OtherPart: a message has a part that is not text.
    """
    for form in forms(text_field, with_pairs=strict) if row else ():
        values = [_field(row, name) for name in form]
        if None in values:
            continue
        if form == FORMS[-1]:
            return _alpaca(values[0], values[1], _field(row, "input"))
        if len(form) == 2:
            return _pair(*values)
        is_chat = strict and form != ("text",)
        return _as_text(chat_in_json(values[0], form[0] in CHAT_FIELDS) if is_chat else values[0])
    return None


def _field(row: Any, name: str) -> Any:
    for part in [name] if name in row else name.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _as_text(value: Any) -> str | Chat | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, list):
        return chat_in(value)
    return valid_unicode(value) if isinstance(value, str) and value else None


def _pair(prompt: Any, completion: Any) -> Pair | None:
    prompt = "" if prompt == "" else _as_text(chat_in_json(prompt, is_chat=False))
    completion = _as_text(chat_in_json(completion, is_chat=False))
    if prompt is None or completion is None or type(prompt) is not type(completion):
        return None
    return Pair(prompt, completion)


def _alpaca(instruction: Any, output: Any, context: Any) -> Chat | None:
    parts = [_as_text(instruction), _as_text(output), _as_text(context) or ""]
    if not all(isinstance(part, str) for part in parts):
        return None
    asked = "\n\n".join(part for part in (parts[0], parts[2]) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": parts[1]}]


def first_question(text: Text) -> str | None:
    """What is asked first in a chat, or the prompt of a pair; None: nothing, or it is a text."""
    asked = text.prompt if isinstance(text, Pair) else text if isinstance(text, list) else []
    if isinstance(asked, str):
        return asked
    said = (message.get("content") for message in asked if message["role"] == "user")
    return next((content for content in said if isinstance(content, str)), None)


def valid_unicode(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes: they become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def chat_in(messages: list[Any]) -> Chat | None:
    """A list of messages as a chat; None if one of them has another form, which a template would render as it is.

    Raises:
        OtherPart: a message has a part that is not text.
    """
    chat = [_message(message) for message in messages]
    return [message for message in chat if message is not None] if chat and None not in chat else None


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, perhaps with parts that are not text."""
    try:
        return isinstance(value, list) and chat_in(value) is not None
    except OtherPart:
        return True


def chat_in_json(value: Any, is_chat: bool) -> Any:
    """The chat that a text is in JSON, or the value as it is; None for a list in a text that must be a chat."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        messages = None
    chat = chat_in(messages) if isinstance(messages, list) else None
    return chat if chat or is_chat else value


def _message(message: Any) -> dict[str, Any] | None:
    if not isinstance(message, dict):
        return None
    if isinstance(message.get("role"), str):
        content = _content(message.get("content"))
        if content is None and not (message.get("content") is None and message.get("tool_calls")):
            return None
        return message | {"content": content}
    role, content = SPEAKERS.get(str(message.get("from")).lower()), message.get("value")
    return {"role": role, "content": content} if role and isinstance(content, str) else None


def _content(content: Any) -> str | None:
    """A text, or the joined texts of a content in parts; None if it is or has something else."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    kinds = [part.get("type") for part in content if isinstance(part, dict)]
    if other := [kind for kind in kinds if isinstance(kind, str) and kind != "text"]:
        raise OtherPart(f"a message with a part of type {other[0]!r}")
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if parts and len(texts) == len(parts) else None


def paired_fields(fields: Iterable[str]) -> tuple[str, ...]:
    """The fields of a question and its answer, if rows have both; empty if not."""
    by_name = {field.lower(): field for field in fields}
    questions, answers = ([by_name[name] for name in names if name in by_name] for names in (QUESTIONS, ANSWERS))
    if not questions:
        return tuple(answers[-2:]) if {"chosen", "rejected"} <= {*by_name} else ()
    return (questions[0], answers[0]) if answers else ()


def without_text(text_field: str, fields: Iterable[str]) -> str:
    """Why rows with these fields have no text."""
    fields = list(fields)
    if not fields or text_field in fields:
        return f"no row has a text in the field {text_field!r}"
    if chats := [name for name in CHAT_FIELDS if text_field == "text" and name in fields]:
        return f"its field {chats[0]!r} holds no chat: write a list of messages, each with the texts role and content"
    if form := form_in(fields, text_field):
        return f"no row has texts in the fields {listed(form)}"
    if pair := paired_fields(fields):
        return (
            f"there is no field {text_field!r}, but questions and answers in {listed(pair)}: name them prompt and "
            'completion, or write each row as a chat, e.g. {"messages": [{"role": "user", "content": ...}, '
            '{"role": "assistant", "content": ...}]}'
        )
    return f"there is no field {text_field!r}, but {listed(fields)}: pass --text-field"


def other_side(field: str, fields: Iterable[str]) -> tuple[str, ...]:
    """The fields of the answers, if a field has the questions, or of the questions, if it has the answers."""
    mine = field.lower()
    others = ANSWERS if mine in QUESTIONS else QUESTIONS if mine in ANSWERS else ()
    return tuple(name for name in fields if name.lower() in others)


def one_sided(field: str, others: Iterable[str]) -> str:
    return f"{listed(others)}, since only the field {field!r} of questions and answers is trained on"
