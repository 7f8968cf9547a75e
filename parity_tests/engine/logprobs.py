"""Log-probabilities of an inference engine, read from JSON lines, against those of a side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.errors import UserError, one_line, shown
from jaxllm.files import read_bounded
from parity_tests.engine.rows import Row

MAX_BYTES = 2**30
MEAN_DIFFERENCE = 5e-2
"""Largest mean difference in nats. bfloat16 engines differ by about 1e-2, another model by 1 or more."""

FORMATS = (
    '{"tokens": [...], "logprobs": [...]}, vLLM\'s {"prompt_token_ids", "prompt_logprobs"}, '
    'SGLang\'s {"input_token_logprobs"}, or llama.cpp\'s {"completion_probabilities"} with {"tokens"}'
)


class Scored(NamedTuple):
    """A text as an engine scored it: the first token has no log-probability."""

    tokens: list[int]
    logprobs: list[float | None]
    top: list[int | None]
    """The token with the largest log-probability at each place, where the engine says it."""


def read_logprobs(path: Path) -> list[Scored]:
    """
    Raises:
        UserError: a line is not of a known format.
    """
    found = []
    for number, line in enumerate(read_bounded(path, MAX_BYTES).decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            scored = _scored(json.loads(line))
            if len(scored.tokens) != len(scored.logprobs) or len(scored.tokens) < 2:
                raise ValueError(f"{len(scored.tokens)} tokens and {len(scored.logprobs)} log-probabilities")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {one_line(error)}; a line has one of {FORMATS}") from None
        found.append(scored)
    if not found:
        raise UserError(f"{path} has no lines: it must have at least one of {FORMATS}")
    return found


def _scored(line: dict[str, Any]) -> Scored:
    if "prompt_logprobs" in line:  # vLLM: for each token None or {token: {"logprob", "rank"}}
        tokens, logprobs, top = [int(t) for t in line["prompt_token_ids"]], [], []
        for token, options in zip(tokens, line["prompt_logprobs"], strict=True):
            values = {int(t): float(v["logprob"] if isinstance(v, dict) else v) for t, v in (options or {}).items()}
            logprobs.append(values.get(token))
            top.append(max(values, key=values.__getitem__) if len(values) > 1 else None)
        return Scored(tokens, logprobs, top)
    if "input_token_logprobs" in line:  # SGLang: [logprob, token, text]
        pairs = [(None if p[0] is None else float(p[0]), int(p[1])) for p in line["input_token_logprobs"]]
        return Scored([t for _, t in pairs], [p for p, _ in pairs], [None] * len(pairs))
    if "completion_probabilities" in line:  # llama.cpp: after the prompt's tokens
        prompt = [int(t) for t in line["tokens"]]
        made = line["completion_probabilities"]
        best = [int(m["top_logprobs"][0]["id"]) if m.get("top_logprobs") else None for m in made]
        return Scored(
            [*prompt, *(int(m["id"]) for m in made)],
            [*[None] * len(prompt), *(float(m["logprob"]) for m in made)],
            [*[None] * len(prompt), *best],
        )
    tokens = [int(t) for t in line["tokens"]]
    logprobs = [None if p is None else float(p) for p in line["logprobs"]]
    return Scored(tokens, logprobs, [None] * len(tokens))


def logprob_rows(side: Any, texts: list[Scored]) -> list[Row]:
    """Mean and largest difference, the k3 estimate of the KL divergence, and the top tokens that changed."""
    differences, changed, compared = [], 0, 0
    for text in texts:
        logits = np.asarray(side.call_logits("own", np.asarray([text.tokens]))[0], np.float64)
        if max(text.tokens) >= logits.shape[-1]:
            raise UserError(f"the engine's token {shown(max(text.tokens))} is not in the model's {logits.shape[-1]}")
        ours = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        for place, (token, theirs, top) in enumerate(zip(*text, strict=True)):
            if place == 0:
                continue
            if theirs is not None:
                differences.append(ours[place - 1, token] - theirs)
            if top is not None:
                compared += 1
                changed += int(ours[place - 1].argmax() != top)
    if not differences:
        raise UserError("the engine's file has no log-probability after a first token: there is nothing to compare")
    apart = np.asarray(differences)
    mean = float(np.abs(apart).mean())
    tops = f"; {changed} of {compared} top tokens changed" if compared else ""
    k3 = float(np.mean(np.expm1(apart) - apart))
    note = f"mean of {len(apart)} tokens {mean:.1e} nats, largest {np.abs(apart).max():.1e}, k3 {k3:.1e}{tops}"
    passed = mean <= MEAN_DIFFERENCE
    return [Row("logprobs", "engine", side.framework, bool(passed), f"mean {MEAN_DIFFERENCE:g}", mean, note=note)]
