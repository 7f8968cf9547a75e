"""Rows for the mixture of experts: the cost of routing relative to dense experts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from benchmarks.finding import Finding, at_most
from benchmarks.sizes import MixtureSizes, mixture_sizes
from benchmarks.timing import Runs, cpu_ratio, interleave, other_load, ratio, seconds
from benchmarks.worker import Run, Worker

LIMITS = {"random": 1.15, "skewed": 1.6}

DTYPES = ("float32", "bfloat16")


def against_dense(quick: bool, rounds: int) -> list[Finding]:
    sizes = mixture_sizes(quick)
    flops = 3 * sizes.tokens * sizes.per_token * 3 * 2 * sizes.hidden * sizes.expert_hidden
    findings = []
    with _worker([(sizes, dtype) for dtype in DTYPES]) as jax:
        for i, dtype in enumerate(DTYPES):
            runs = _interleave(jax, [f"{i} {name}" for name in ("random", "dense", "skewed")], rounds)
            ours = {routing: runs[f"{i} {routing}"] for routing in LIMITS}
            dense = runs[f"{i} dense"]
            findings += [
                Finding(
                    what=f"{routing} routing, {dtype}",
                    ours=_milliseconds(ours[routing]),
                    yardstick=_milliseconds(dense),
                    value=ratio(ours[routing], dense),
                    target=at_most(limit),
                    other_load=other_load(runs),
                    details={
                        "cpu_ratio": cpu_ratio(ours[routing], dense),
                        "gflops": {name: flops / seconds(side).median / 1e9 for name, side in runs.items()},
                    },
                )
                for routing, limit in LIMITS.items()
            ]
    return findings


def many_experts(quick: bool, rounds: int) -> list[Finding]:
    """8 and 64 experts: at the sizes of `against_dense`, and with smaller experts and more tokens."""
    coarse = mixture_sizes(quick)
    fine = coarse if quick else MixtureSizes(tokens=4096, hidden=1024, expert_hidden=512, experts=7, per_token=2)
    findings = []
    for sizes in (coarse, fine):
        with _worker([(sizes._replace(experts=experts), "float32") for experts in (8, 64)]) as jax:
            runs = _interleave(jax, ["0 random", "1 random"], rounds)
        few, many = runs.values()
        findings.append(
            Finding(
                what=f"N={sizes.tokens} D={sizes.hidden} F={sizes.expert_hidden}, float32",
                ours=_milliseconds(many),
                yardstick=_milliseconds(few),
                value=ratio(many, few),
                target=at_most(1.7),
                other_load=other_load(runs),
                details={"cpu_ratio": cpu_ratio(many, few)},
            )
        )
    return findings


def _worker(cases: list[tuple[MixtureSizes, str]]) -> Worker:
    return Worker("benchmarks.jax_side:mixtures", cases=[[list(sizes), dtype] for sizes, dtype in cases])


def _interleave(jax: Worker, names: list[str], rounds: int) -> Runs:
    """These take a fraction of a second, so they run more often."""
    return interleave({name: functools.partial(jax.go, name) for name in names}, 3 * rounds, warmups=2)


def _milliseconds(side: Sequence[Run]) -> str:
    return f"{1e3 * seconds(side).median:,.1f} ms"
