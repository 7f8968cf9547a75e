"""What `jaxllm.plan` says of the step, compiled for the card's data sheet; no GPU takes part."""

from __future__ import annotations

from benchmarks.gpu.line import Line
from benchmarks.gpu.session import Session
from benchmarks.gpu.sizes import step_config
from benchmarks.worker import Failure
from jaxllm.plan.estimate import Refused, check_extra, compile_plan
from jaxllm.plan.report import plan_as_json
from jaxllm.plan.targets import Target, load_target, target_names
from jaxllm.run.throughput import GIB

DEFAULT_TARGET = "h100"


def target_of(device: str) -> Target | None:
    """The data sheet of a card by the name that its driver gives it, such as `NVIDIA H100 80GB HBM3`; None: unknown.

    The whole name counts: an H100 PCIe, an H100 NVL and a part of a card (MIG) have other speeds than an H100 SXM.
    """
    return next((target for target in map(load_target, target_names()) if target.driver_name == device), None)


def plan_with_remat(session: Session) -> list[Line]:
    return _plan(session, remat=True)


def plan_without_remat(session: Session) -> list[Line]:
    return _plan(session, remat=False)


def _plan(session: Session, remat: bool) -> list[Line]:
    if session.target is None:
        raise Failure(session.no_sheet)
    check_extra(session.target.name, session.target)
    config = step_config(session.quick, remat)
    plan = compile_plan(config, session.target)
    if isinstance(plan, Refused):
        raise Failure(f"does not fit: {plan.message}")
    found = plan_as_json(plan, config.tokens_per_step)
    times, memory = found["seconds"], found["memory"]
    best, causal = (plan.mfu(times["step_at_best"], attention) for attention in ("full", "causal"))
    lines = [
        Line(
            what="step, expected",
            measured=f"{found['tokens_per_second']['expected']:,.0f} tokens/s ({1e3 * times['step_expected']:,.1f} ms)",
            reference=f"at best {1e3 * times['step_at_best']:,.1f} ms, bound by {times['bound_by']}",
            figures=times,
        ),
        Line(
            what="MFU of the data sheet's peak, expected",
            measured=_mfu(found["mfu_expected"]),
            reference=f"at best {best:.3f} full, {causal:.3f} causal",
            figures=found["mfu_expected"] | {"full_at_best": best, "causal_at_best": causal},
        ),
        Line(
            what="device memory at its peak",
            measured=f"{memory['peak'] / GIB:.2f} GiB",
            reference=f"{memory['usable'] / GIB:.1f} GiB usable",
            figures=memory,
        ),
        Line(
            what="memory read and written in a step",
            measured=f"{found['bytes_touched'] / 1e9:,.1f} GB",
            figures={"bytes": found["bytes_touched"]},
        ),
        Line(what="kernels that multiply", measured=kernel_names(found["kernels"]), figures=found["kernels"]),
    ]
    session.plans[remat] = found
    return lines


def kernel_names(totals: dict[str, dict[str, float]]) -> str:
    """The kernels of a program with their calls in a step, as `jaxllm.plan.report.kernel_totals` has them."""
    return "; ".join(f"{name} x{total['calls']:.0f}" for name, total in totals.items())


def _mfu(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.3f} {attention}" for attention, share in shares.items())
