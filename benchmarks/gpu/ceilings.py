"""What the card reaches at best: a large matrix product, and reading and writing memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.line import Line
from benchmarks.gpu.session import Session
from benchmarks.timing import interleave, seconds
from jaxllm.plan.targets import Target


def ceilings(session: Session) -> list[Line]:
    """Sets the session's `flops_per_second` and `bytes_per_second`, which later parts are compared with."""
    with session.jax("gpu.jax_side:ceilings", quick=session.quick) as jax:
        work = jax.facts["work"]
        runs = interleave({name: functools.partial(jax.go, name) for name in work}, session.rounds)
    rates = {name: amount / seconds(runs[name]).median for name, amount in work.items()}
    product = rates.pop("product")
    lines = [
        Line(
            what=f"bfloat16 product of {jax.facts['side']:,}³, random numbers",
            measured=f"{product / 1e12:,.4g} TFLOP/s",
            **_against_sheet(session, product / 1e12, lambda sheet: sheet.peak_tflops["bfloat16"]),
            figures={"flops_per_second": product},
        ),
        *(
            Line(
                what={"copy": "reading and writing an array", "sum": "reading an array"}[name],
                measured=f"{rate / 1e9:,.4g} GB/s",
                **_against_sheet(session, rate / 1e9, lambda sheet: sheet.memory_gb_per_s),
                figures={"bytes_per_second": rate},
            )
            for name, rate in rates.items()
        ),
    ]
    session.flops_per_second, session.bytes_per_second = product, max(rates.values())
    return lines


def _against_sheet(session: Session, measured: float, of_sheet: Callable[[Target], float]) -> dict[str, Any]:
    if session.target is None:
        return {"reference": session.no_sheet}
    wanted = of_sheet(session.target)
    return {"reference": f"data sheet {wanted:,.4g}", "ratio": measured / wanted}
