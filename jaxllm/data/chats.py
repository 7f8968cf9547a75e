"""Chats: lists of messages with a role and a content, in the forms in which datasets have them."""

import json
from collections.abc import Iterable
from typing import Any

from jaxllm.errors import listed

Chat = list[dict[str, Any]]

CHAT_FIELDS = ("messages", "conversations")
"""Fields of a chat. They are read where there is no field `text`."""

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
"""Roles by the names that ShareGPT's form has for them, in a message's field `from`."""

QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "user", "input", "inputs")
ANSWERS = ("output", "outputs", "response", "responses", "completion", "answer", "answers", "solution", "assistant",
           "target", "targets", "chosen", "rejected")  # fmt: skip
"""Fields that are a question or its answer. One of them without the other is not a text to train on."""


def chat_in(messages: list[Any]) -> Chat | None:
    """A list of messages as a chat; None if one of them has another form, which a template would render as it is."""
    chat = [_message(message) for message in messages]
    return [message for message in chat if message is not None] if chat and None not in chat else None


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
    """A text, or the joined texts of a content in parts; None if it is or has something else, such as a picture."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
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


def other_side(field: str, fields: Iterable[str]) -> tuple[str, ...]:
    """The fields of the answers, if a field has the questions, or of the questions, if it has the answers."""
    mine = field.lower()
    others = ANSWERS if mine in QUESTIONS else QUESTIONS if mine in ANSWERS else ()
    return tuple(name for name in fields if name.lower() in others)


def one_sided(field: str, others: Iterable[str]) -> str:
    return f"{listed(others)}: of questions and answers, only the field {field!r} is trained on"
