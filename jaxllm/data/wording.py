"""Text of others made fit: for a tokenizer, and for a message of one line."""

from __future__ import annotations


def valid_unicode(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer takes: they become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def one_line(error: BaseException) -> str:
    """The first line of an error, shortened: for a message of one line."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
