"""Rows for decoding: tokens per second, the share of the memory's speed, the first token, the bytes of the cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.finding import Finding, at_least, at_most
from benchmarks.sizes import PRECISIONS, decode_model
from benchmarks.timing import Runs, Spread, cpu_ratio, fastest, interleave, other_load, ratio, seconds
from benchmarks.worker import Failure, Run, Worker
from jaxllm.config import ModelConfig
from jaxllm.model import flops


class Decoded(NamedTuple):
    """What a contender does: rows of a prompt's length, continued by some tokens."""

    rows: int
    prompt: int
    new: int


def decode(quick: bool, rounds: int) -> list[Finding]:
    new, long = (4, 64) if quick else (64, 1024)
    findings = []
    for name in ("tiny", "customllm-1b"):
        work = {"one row": Decoded(1, 32, new)}
        if name != "tiny":
            work |= {
                "first token": Decoded(1, 32, 1),
                "eight rows": Decoded(8, 32, new),
                "first tokens": Decoded(8, 32, 1),
                "long prompt": Decoded(1, long, 1),
            }
        arguments = {"name": name, "work": {key: list(value) for key, value in work.items()}, "quick": quick}
        with (
            Worker("benchmarks.jax_side:decoding", **arguments) as jax,
            Worker("benchmarks.torch_side:decoding", **arguments) as torch,
        ):
            contenders = {f"ours {key}": functools.partial(jax.go, key) for key in jax.contenders}
            contenders |= {f"yardstick {key}": functools.partial(torch.go, key) for key in torch.contenders}
            runs = interleave(contenders, rounds)
            kept, read_bytes = jax.facts["cache_bytes"], torch.facts["read_bytes"]
        findings.append(_speeds(name, "one row", work["one row"], runs, 2.0))
        if name != "tiny":
            findings.append(_speeds(name, "eight rows", work["eight rows"], runs, 2.0))
            for key, first in (("one row", "first token"), ("eight rows", "first tokens")):
                findings.append(_share_of_memory(quick, name, key, first, work, runs, read_bytes))
            findings.append(_first_token(name, long, runs))
    config = decode_model(name, quick)
    full = 2 * config.num_hidden_layers * config.hidden_size * 4
    findings.append(
        Finding(
            what=f"{name}, cache of a token",
            ours=f"{kept:,.0f} bytes",
            yardstick=f"{full:,.0f} bytes",
            value=Spread(kept / full, kept / full, kept / full),
            target=at_most(0.4),
            timed=False,
        )
    )
    return findings


def _best(side: str, key: str, runs: Runs) -> str:
    """The contender of a side that does `key` in its fastest precision."""
    return fastest(runs, [f"{side} {key} {precision}" for precision in PRECISIONS])


def _speeds(name: str, key: str, work: Decoded, runs: Runs, limit: float) -> Finding:
    """All new tokens, the pass over the prompt included."""
    ours, theirs = (_best(side, key, runs) for side in ("ours", "yardstick"))
    speeds = {side: work.rows * work.new / seconds(runs[side]).median for side in (ours, theirs)}
    return Finding(
        what=f"{name}, {key}",
        ours=f"{speeds[ours]:,.1f} tokens/s {ours.split()[-1]}",
        yardstick=f"{speeds[theirs]:,.1f} tokens/s {theirs.split()[-1]}",
        value=ratio(runs[theirs], runs[ours]),
        target=at_least(limit),
        other_load=other_load(runs),
        details={
            "cpu_ratio": cpu_ratio(runs[theirs], runs[ours]),
            "seconds": {side: seconds(runs[side])._asdict() for side in runs if f" {key} " in side},
        },
    )


def _share_of_memory(
    quick: bool, name: str, key: str, first: str, work: Mapping[str, Decoded], runs: Runs, read_bytes: int
) -> Finding:
    """The bytes of weights that a token needs, over what the memory reads in the time that it takes."""
    best = _best("ours", key, runs)
    precision = best.split()[-1]
    taken = step_seconds(runs[best], runs[f"ours {first} {precision}"], work[key].new - 1, quick)
    needed = weight_bytes(decode_model(name, quick), work[key].rows, 4 if precision == "float32" else 2)
    pairs = zip(taken, runs["yardstick read"], strict=True)
    shares = [needed / step / (read_bytes / read.seconds) for step, read in pairs]
    each = Spread.of(taken).median
    return Finding(
        what=f"{name}, {key}, share of the memory's speed",
        ours=f"{needed / each / 1e9:,.1f} GB/s ({1e3 * each:,.0f} ms a step)",
        yardstick=f"{read_bytes / seconds(runs['yardstick read']).median / 1e9:,.1f} GB/s (a sum)",
        value=Spread.of(shares),
        target=at_least(0.6),
        other_load=other_load(runs),
    )


def step_seconds(whole: Sequence[Run], first: Sequence[Run], steps: int, quick: bool) -> list[float]:
    """The time of a decoding step in each round: of the tokens after the first one.

    With `quick` it is the absolute value: so few steps of a small model take less than the noise.

    Raises:
        Failure: a round with these steps took no longer than the one without.
    """
    taken = [(a.seconds - b.seconds) / steps for a, b in zip(whole, first, strict=True)]
    if quick:
        return [abs(step) for step in taken]
    if min(taken) <= 0:
        raise Failure(f"{steps} more tokens took no longer than the first: other programs disturb it")
    return taken


def _first_token(name: str, length: int, runs: Runs) -> Finding:
    ours, theirs = (_best(side, "long prompt", runs) for side in ("ours", "yardstick"))
    return Finding(
        what=f"{name}, first token after {length:,}",
        ours=f"{seconds(runs[ours]).median:,.2f} s {ours.split()[-1]}",
        yardstick=f"{seconds(runs[theirs]).median:,.2f} s {theirs.split()[-1]}",
        value=ratio(runs[theirs], runs[ours]),
        target=at_least(1.0),
        other_load=other_load(runs),
    )


def weight_bytes(config: ModelConfig, rows: int, bytes_each: int) -> float:
    """Bytes of weights that a step of decoding reads, for rows whose tokens choose their experts at random."""
    E = config.n_routed_experts
    return bytes_each * parameters_read(config, E * (1 - (1 - config.num_experts_per_tok / E) ** rows))


def parameters_read(config: ModelConfig, experts: float) -> float:
    """Parameters that a step of decoding reads, without the rows of tables.

    `experts`: how many routed experts of a layer it uses.
    """
    read: dict[str, float] = dict(flops.parameters(config))
    read["routed_experts"] *= experts / config.n_routed_experts
    read["position_embeddings"] = 0
    if not config.tie_word_embeddings:
        read["token_embeddings"] = 0
    return sum(read.values())
