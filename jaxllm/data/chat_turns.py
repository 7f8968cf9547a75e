"""Where the assistant's turns are in a chat that a template has rendered."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Protocol

from jaxllm.data.chats import Chat

BEGIN, END = "\ufdd2", "\ufdd3"
"""Noncharacters of Unicode that stand for the ends of a `{% generation %}` block."""

_GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")

Turns = list[tuple[int, int]]
"""Characters of a rendering: the first of each turn, and the one after its last."""


class Render(Protocol):
    """Renders a chat by the tokenizer's template, or by another one."""

    def __call__(self, chat: Chat, add_generation_prompt: bool = False, template: str | None = None) -> str: ...


def assistant_turns(
    render: Render, same_tokens: Callable[[str, str], int], chat: Chat, first: int, template: str
) -> tuple[str, Turns, bool]:
    """A chat's rendering, the assistant's turns in it from message `first` on, and whether only the last one is there.

    Where the template marks them with `{% generation %}`, they are what it marks. Else a turn is what the rendering
    that ends with it has after the one that ends before it, with the generation prompt. A template may change earlier
    turns, such as one that leaves out earlier reasoning: then only the last turn counts, from a rendering that ends
    with it.

    Args:
        same_tokens: returns the character of the second rendering up to which the tokens of both are the same.

    Raises:
        ValueError: the renderings do not show where the turns are.
    """
    if _GENERATION.search(template) and (marked := _marked_turns(render, chat, first, template)) is not None:
        return *marked, False
    said = [i for i, message in enumerate(chat) if message.get("role") == "assistant" and i >= first]
    text = render(chat)
    if not said:
        return text, [], False
    # a template may join messages of the assistant that follow one another
    runs = [[i for _, i in run] for _, run in itertools.groupby(enumerate(said), lambda pair: pair[1] - pair[0])]
    for units in ([[i] for i in said], runs):
        turns = [_turn(render, same_tokens, chat, unit) for unit in units]
        if all(turn and text.startswith(turn[0]) for turn in turns):
            return text, [turn[1] for turn in turns if turn], False
    for unit in ([said[-1]], runs[-1]):
        if turn := _turn(render, same_tokens, chat, unit):
            return turn[0], [turn[1]], len(said) > len(unit)
    raise ValueError("the template changes what comes before an answer")


def _turn(
    render: Render, same_tokens: Callable[[str, str], int], chat: Chat, messages: list[int]
) -> tuple[str, tuple[int, int]] | None:
    """The rendering up to the end of some messages, and where they are in it; None: the rendering does not show it."""
    earlier = chat[: messages[0]]
    if not earlier:
        return None
    before, with_turn = render(earlier, add_generation_prompt=True), render(chat[: messages[-1] + 1])
    start = len(before)
    if not with_turn.startswith(before):
        # the prompt may have more than the turn, such as the beginning of reasoning that the turn leaves out
        start = same_tokens(before, with_turn)
        if start < len(render(earlier).rstrip()):
            return None
    return with_turn, (start, len(with_turn))


def _marked_turns(render: Render, chat: Chat, first: int, template: str) -> tuple[str, Turns] | None:
    """The rendering, and what the template marks as generated; None: marking it changes the rendering."""

    def with_marks(found: re.Match[str]) -> str:  # a block, as whitespace around it is treated otherwise than a value's
        return f"{{%{found[1]} if true %}}{END if found[2] else BEGIN}{{% endif {found[3]}%}}"

    marking = _GENERATION.sub(with_marks, template)
    text, marked = render(chat), render(chat, template=marking)
    if BEGIN in text or END in text or marked.replace(BEGIN, "").replace(END, "") != text:
        return None
    parts = re.split(f"[{BEGIN}{END}]", marked)
    ends = [0, *itertools.accumulate(map(len, parts))]
    turns = [(ends[i], ends[i + 1]) for i in range(1, len(parts) - 1, 2)]
    skipped = render(chat[:first], template=marking).count(BEGIN) if first else 0
    return text, turns[skipped:]
