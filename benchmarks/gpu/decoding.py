"""Greedy decoding of customllm-1b in bfloat16: the time to the first token, and the tokens after it."""

from __future__ import annotations

import functools

from benchmarks.decoding import parameters_read, step_seconds
from benchmarks.gpu.line import Line
from benchmarks.gpu.session import Session
from benchmarks.gpu.sizes import MODEL, DecodingSizes, decoding_sizes
from benchmarks.sizes import decode_model
from benchmarks.timing import Spread, interleave, seconds
from jaxllm.config import ModelConfig


def decode(session: Session) -> list[Line]:
    config, sizes = decode_model(MODEL, session.quick), decoding_sizes(session.quick)
    with session.jax("gpu.jax_side:decoding", quick=session.quick) as jax:
        runs = interleave({name: functools.partial(jax.go, name) for name in jax.contenders}, session.rounds)
        facts = jax.facts
    lines = []
    for s in sizes:
        first, whole = (runs[f"{s.batch} {name}"] for name in ("first", "all"))
        token = Spread.of(step_seconds(whole, first, s.new, session.quick)).median
        needed = bytes_of_a_token(config, s, facts["weight_bytes"], facts["cache_bytes"])
        floor = needed / session.bytes_per_second if session.bytes_per_second else None
        lines += [
            Line(
                what=f"first token after {s.prompt:,}, batch {s.batch}",
                measured=f"{1e3 * seconds(first).median:,.1f} ms",
                figures={"seconds": seconds(first)._asdict()},
            ),
            Line(
                what=f"{s.new} tokens after it, batch {s.batch}",
                measured=f"{s.batch / token:,.0f} tokens/s ({1e3 * token:,.2f} ms a step)",
                reference=f"{needed / 1e9:,.2f} GB to read" + (f": {1e3 * floor:,.2f} ms" if floor else ""),
                ratio=floor / token if floor else None,
                figures={"seconds_a_step": token, "bytes_a_step": needed},
            ),
        ]
    return lines


def bytes_of_a_token(config: ModelConfig, sizes: DecodingSizes, weight_bytes: float, cache_bytes: float) -> float:
    """The least that decoding one token of each row reads: every weight that it uses, and the cache of the rows.

    Args:
        weight_bytes: of one parameter.
        cache_bytes: of one token of one row, over all layers.
    """
    experts = min(config.n_routed_experts, sizes.batch * config.num_experts_per_tok)  # of a layer, at most
    length = sizes.prompt + sizes.new / 2
    return parameters_read(config, experts) * weight_bytes + sizes.batch * length * cache_bytes
