"""Rows for decoding: tokens per second of one sequence, and cache bytes per token."""

from __future__ import annotations

from benchmarks.finding import Finding, at_least, at_most
from benchmarks.sizes import decode_model
from benchmarks.timing import Spread, cpu_ratio, interleave, other_load, ratio, seconds
from benchmarks.worker import Worker


def decode(quick: bool, rounds: int) -> list[Finding]:
    findings = []
    for name in ("tiny",) if quick else ("tiny", "customllm-1b"):
        arguments = {"name": name, "prompt": 32, "new": 4 if quick else 64, "quick": quick}
        with (
            Worker("benchmarks.jax_side:decoding", **arguments) as jax,
            Worker("benchmarks.torch_side:decoding", **arguments) as torch,
        ):
            contenders = {"ours": lambda jax=jax: jax.go("decode"), "yardstick": lambda torch=torch: torch.go("decode")}
            runs = interleave(contenders, rounds)
            kept = jax.facts["cache_bytes"]
        speeds = {side: arguments["new"] / seconds(runs[side]).median for side in runs}
        findings.append(
            Finding(
                what=f"{name}, float32",
                ours=f"{speeds['ours']:,.1f} tokens/s",
                yardstick=f"{speeds['yardstick']:,.1f} tokens/s",
                value=ratio(runs["yardstick"], runs["ours"]),
                target=at_least(2.0),
                other_load=other_load(runs),
                details={"cpu_ratio": cpu_ratio(runs["yardstick"], runs["ours"])},
            )
        )
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
