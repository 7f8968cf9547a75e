"""The row of what a checkpoint costs a run beyond writing its bytes."""

from __future__ import annotations

import functools

from benchmarks.finding import Finding, at_most
from benchmarks.timing import Spread, interleave, other_load, seconds
from benchmarks.worker import Worker

STEPS_BETWEEN = 100
"""Steps from one checkpoint to the next, of which the cost is a share."""


def checkpoint_cost(quick: bool, rounds: int) -> list[Finding]:
    """Steps with one checkpoint among them, the same steps without, and the same bytes written to a file."""
    with Worker("benchmarks.jax_side:saving_steps", quick=quick) as jax:
        runs = interleave({name: functools.partial(jax.go, name) for name in ("saved", "plain", "written")}, rounds)
        steps, size = jax.facts["steps"], jax.facts["bytes"]
    triples = zip(runs["saved"], runs["plain"], runs["written"], strict=True)
    longer = [  # how many times as long so many steps take
        1 + (saved.seconds - plain.seconds - written.seconds) / (STEPS_BETWEEN * plain.seconds / steps)
        for saved, plain, written in triples
    ]
    blocked = Spread.of([run.figures["blocked"] for run in runs["saved"]]).median
    written = seconds(runs["written"]).median
    more = seconds(runs["saved"]).median - seconds(runs["plain"]).median
    return [
        Finding(
            what=f"a checkpoint every {STEPS_BETWEEN} steps of tiny, beyond its bytes",
            ours=f"{more:.2f} s, {blocked:.2f} s of it at once",
            yardstick=f"{written:.2f} s ({size / 1e6:.0f} MB)",
            value=Spread.of(longer),
            target=at_most(1.02),
            other_load=other_load(runs),
            details={"steps_measured": steps, "bytes": size, "blocked_seconds": blocked},
        )
    ]
