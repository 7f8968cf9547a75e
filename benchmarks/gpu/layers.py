"""The routed experts of one layer, forward and backward, against dense experts."""

from __future__ import annotations

import functools

from benchmarks.finding import at_most
from benchmarks.gpu.line import Line
from benchmarks.gpu.session import Session
from benchmarks.gpu.sizes import mixture_sizes
from benchmarks.mixtures import LIMITS
from benchmarks.timing import interleave, ratio, seconds


def experts(session: Session) -> list[Line]:
    sizes = mixture_sizes(session.quick)
    names = {name: f"0 {name}" for name in (*LIMITS, "dense")}
    with session.jax("jax_side:mixtures", cases=[[list(sizes), "bfloat16"]]) as jax:
        contenders = {name: functools.partial(jax.go, contender) for name, contender in names.items()}
        runs = interleave(contenders, 5 * session.rounds, warmups=2)
    times = {name: seconds(side).median for name, side in runs.items()}
    return [
        Line(
            what=f"{routing} routing, N={sizes.tokens:,} D={sizes.hidden:,} F={sizes.expert_hidden:,}",
            measured=f"{1e3 * times[routing]:,.2f} ms",
            reference=f"{sizes.per_token} dense experts {1e3 * times['dense']:,.2f} ms",
            ratio=ratio(runs[routing], runs["dense"]).median,
            goal=at_most(limit),
            figures={"seconds": times[routing], "dense_seconds": times["dense"]},
        )
        for routing, limit in LIMITS.items()
    ]
