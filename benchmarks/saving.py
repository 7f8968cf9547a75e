"""The row for checkpoints: their cost to a run beyond writing the bytes."""

from __future__ import annotations

import functools

from benchmarks.finding import Finding, at_most
from benchmarks.timing import Spread, interleave, other_load, seconds
from benchmarks.worker import Worker

STEPS_BETWEEN = 100
"""Steps between checkpoints; the cost is relative to their time."""


def checkpoint_cost(quick: bool, rounds: int) -> list[Finding]:
    """Steps with one checkpoint, the same steps without it, and the same bytes written to a file."""
    with Worker("benchmarks.jax_side:saving_steps", quick=quick) as jax:
        runs = interleave({name: functools.partial(jax.go, name) for name in ("saved", "plain", "written")}, rounds)
        steps, size = jax.facts["steps"], jax.facts["bytes"]
    triples = zip(runs["saved"], runs["plain"], runs["written"], strict=True)
    slowdown = [  # time of STEPS_BETWEEN steps with a checkpoint, relative to the time without
        1 + (saved.seconds - plain.seconds - written.seconds) / (STEPS_BETWEEN * plain.seconds / steps)
        for saved, plain, written in triples
    ]
    blocked = Spread.of([run.figures["blocked"] for run in runs["saved"]]).median
    written = seconds(runs["written"]).median
    more = seconds(runs["saved"]).median - seconds(runs["plain"]).median
    return [
        Finding(
            what=f"a checkpoint every {STEPS_BETWEEN} steps of tiny, beyond its bytes",
            ours=f"{more:.2f} s, {blocked:.2f} s of it blocking",
            yardstick=f"{written:.2f} s ({size / 1e6:.0f} MB)",
            value=Spread.of(slowdown),
            target=at_most(1.02),
            other_load=other_load(runs),
            details={"steps_measured": steps, "bytes": size, "blocked_seconds": blocked},
        )
    ]
