"""The training step of customllm-1b: ours compared with its plan, and PyTorch's with ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.finding import at_least, at_most
from benchmarks.gpu.line import Line, apart
from benchmarks.gpu.plans import kernel_names
from benchmarks.gpu.session import Session
from benchmarks.gpu.sizes import step_config
from benchmarks.timing import seconds
from benchmarks.worker import Failure, Run, Worker
from jaxllm.model.flops import training_flops_per_token
from jaxllm.run.throughput import GIB

SAME_START = 0.05
"""The largest relative difference of the sides' first losses: they draw their weights from the same distributions."""


def with_remat(session: Session) -> list[Line]:
    return _ours(session, remat=True)


def without_remat(session: Session) -> list[Line]:
    return _ours(session, remat=False)


def torch_ref(session: Session) -> list[Line]:
    with session.torch("gpu.torch_side:reference_steps", quick=session.quick) as torch:
        return _theirs(session, torch, "torch.compile, bfloat16 autocast, fused AdamW")


def transformers(session: Session) -> list[Line]:
    with session.torch("gpu.torch_side:deepseek_steps", quick=session.quick) as torch:
        return _theirs(session, torch, "DeepseekV3ForCausalLM, grouped_mm, bfloat16 autocast, fused AdamW")


def _ours(session: Session, remat: bool) -> list[Line]:
    config = step_config(session.quick, remat)
    with session.jax("gpu.jax_side:train_steps", quick=session.quick, remat=remat) as jax:
        runs, facts = _rounds(session, jax), jax.facts
    taken = seconds(runs).median
    plan = session.plans.get(remat)
    tokens = config.tokens_per_step
    lines = [
        Line(
            what="step",
            measured=_speed(tokens, taken),
            reference="no plan" if plan is None else f"plan {_speed(tokens, plan['seconds']['step_expected'])}",
            **_against_plan(taken, plan and plan["seconds"]["step_expected"]),
            figures={"seconds": seconds(runs)._asdict(), "first_loss": facts["first_loss"]},
        )
    ]
    if session.flops_per_second is not None:
        mfu = {
            attention: tokens * training_flops_per_token(config.model, config.data.seq_len, attention)
            / (taken * session.flops_per_second)
            for attention in ("full", "causal")
        }  # fmt: skip
        planned = (
            "" if plan is None else f"; plan {plan['mfu_expected']['full']:.3f}, {plan['mfu_expected']['causal']:.3f}"
        )
        lines.append(
            Line(
                what="MFU of the measured product peak",
                measured=f"{mfu['full']:.3f} full, {mfu['causal']:.3f} causal",
                reference=_mfu_of_sheet(session, mfu, session.flops_per_second) + planned,
                goal=at_least(0.5),
                judged=mfu["full"],
                figures=mfu,
            )
        )
    peak = runs[-1].figures.get("peak")
    planned_peak = plan and plan["memory"]["peak"]
    lines.append(
        Line(
            what="device memory at its peak",
            measured="this device does not count it" if peak is None else f"{peak / GIB:.2f} GiB",
            reference="no plan" if planned_peak is None else f"plan {planned_peak / GIB:.2f} GiB",
            **(_against_plan(peak, planned_peak) if peak is not None else {}),
            figures={"bytes": peak},
        )
    )
    lines.append(
        Line(
            what="kernels that multiply, of the compiled program",
            measured=kernel_names(facts["kernels"]),
            reference=f"{facts['chosen']}; compiled in {facts['compile_seconds']:.0f} s",
            figures={"kernels": facts["kernels"], "memory": facts["memory"]},
        )
    )
    # last: nothing is compared with a part that failed
    session.first_loss, session.step_seconds[remat] = facts["first_loss"], taken
    return lines


def _theirs(session: Session, torch: Worker, what: str) -> list[Line]:
    config = step_config(session.quick, remat=False)
    runs = _rounds(session, torch)
    loss, ours = torch.facts["first_loss"], session.first_loss
    if ours is not None and abs(loss - ours) > SAME_START * abs(ours):
        raise Failure(f"the two sides did not compute the same: first losses {ours:.4f} and {loss:.4f}")
    taken, micro, peak = seconds(runs).median, torch.facts["micro_batches"], runs[-1].figures.get("peak")
    best = min(session.step_seconds.values(), default=None)
    split = f", {micro} micro-batches" if micro > 1 else ""
    memory = f", {peak / GIB:.1f} GiB" if peak else ""
    return [
        Line(
            what=what,
            measured=f"{_speed(config.tokens_per_step, taken)}{split}{memory}",
            reference="ours was not measured" if best is None else f"ours {_speed(config.tokens_per_step, best)}",
            ratio=None if best is None else taken / best,
            goal=at_least(1.3),
            figures={"seconds": seconds(runs)._asdict(), "first_loss": loss, "micro_batches": micro, "bytes": peak},
        )
    ]


def _rounds(session: Session, worker: Worker) -> Sequence[Run]:
    """The rounds that count, after one that warms the processor up."""
    return [worker.go("step") for _ in range(1 + session.rounds)][1:]


def _mfu_of_sheet(session: Session, mfu: dict[str, float], measured_peak: float) -> str:
    """The MFU of the data sheet's peak, from that of the measured one."""
    if session.target is None:
        return session.no_sheet
    share = measured_peak / (session.target.peak_tflops["bfloat16"] * 1e12)
    return f"of the data sheet's {share * mfu['full']:.3f}, {share * mfu['causal']:.3f}"


def _against_plan(measured: float, planned: float | None) -> dict[str, Any]:
    if planned is None:
        return {}
    ratio = measured / planned
    return {"ratio": ratio, "goal": at_most(1.15), "judged": apart(ratio)}


def _speed(tokens: int, taken: float) -> str:
    return f"{tokens / taken:,.0f} tokens/s ({1e3 * taken:,.1f} ms)"
