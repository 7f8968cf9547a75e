"""Rows of a GPU: plans, what the card reaches, the step beside its plan and PyTorch's, commands of a user."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.finding import Finding, at_least, at_most
from benchmarks.session import Session
from benchmarks.sizes import gpu_config
from benchmarks.starting import narrow_options
from benchmarks.timing import contenders_of, interleave, seconds
from benchmarks.worker import Failure
from jaxllm.files import read_json
from jaxllm.model.flops import training_flops_per_token
from jaxllm.plan.estimate import Refused, check_extra, compile_plan
from jaxllm.plan.report import plan_as_json
from jaxllm.run.throughput import GIB
from jaxllm.store.folder import CONFIG_FILE
from jaxllm.store.metrics_file import last_evaluation

SAME_START = 0.05  # largest relative difference of the first losses: the sides' weights have the same distributions

Show = Callable[[float], str]


def plan(session: Session, remat: bool) -> list[Finding]:
    """What `jaxllm.plan` says of the step, compiled for the card's data sheet; no GPU takes part."""
    if session.target is None:
        raise Failure(session.no_sheet)
    check_extra(session.target.name, session.target)
    config = gpu_config(session.quick, remat)
    plan = compile_plan(config, session.target)
    if isinstance(plan, Refused):
        raise Failure(f"does not fit: {plan.message}")
    found = plan_as_json(plan, config.tokens_per_step)
    times, memory, mfu = found["seconds"], found["memory"], found["mfu_expected"]
    at_best = {name: plan.mfu(times["step_at_best"], name) for name in ("full", "causal")}
    bound = f"at best {1e3 * times['step_at_best']:,.1f} ms, bound by {times['bound_by']}"
    usable = f"{memory['usable'] / GIB:.1f} GiB usable"
    touched, kernels = found["bytes_touched"], found["kernels"]
    both = mfu | {f"{name}_at_best": share for name, share in at_best.items()}
    findings = [
        Finding("step, expected", _speed(config.tokens_per_step)(times["step_expected"]), bound, details=times),
        Finding("MFU of the data sheet's peak, expected", _mfu(mfu), f"at best {_mfu(at_best)}", details=both),
        Finding("device memory at its peak", _gib(memory["peak"]), usable, details=memory),
        Finding("memory read and written in a step", f"{touched / 1e9:,.1f} GB", details={"bytes": touched}),
        Finding("kernels that multiply", kernel_names(kernels), details=kernels),
    ]
    session.plans[remat] = found  # last: nothing is compared with a plan that failed
    return findings


def kernel_names(totals: dict[str, dict[str, float]]) -> str:
    """The kernels of a program with their calls in a step, as `jaxllm.plan.report.kernel_totals` has them."""
    return "; ".join(f"{name} x{total['calls']:.0f}" for name, total in totals.items())


def ladder(session: Session, precision: str) -> list[Finding]:
    """JAX on the GPU, PyTorch on the CPU: all rungs on random weights of `tiny`."""
    options = ["--precision", precision, "--steps", "20"]
    if session.quick:
        options += ["--layers", "1", "--seq-len", "64", "--rungs", "weights", "layers", "logits", "loss"]
    with tempfile.TemporaryDirectory() as folder:
        session.command("-m", "parity_tests", *options, "--out", folder)
        report = read_json(Path(folder) / "parity.json")
    rungs = list(report["seconds"])
    agrees = f"{len(report['rows'])} comparisons agree, {rungs[0]} to {rungs[-1]}"
    errors = (row["relative_l2"] for row in report["rows"])
    largest = max((error for error in errors if isinstance(error, float)), default=0.0)
    result = agrees if report["passed"] else f"BREACH, first in: {report['first_divergence']}"
    reference = f"PyTorch on the CPU; largest relative L2 {largest:.1e}"
    details = {"passed": report["passed"], "rungs": report["seconds"], "largest_relative_l2": largest}
    return [Finding(f"tiny, {precision}", result, reference, details=details)]


def self_check(session: Session) -> list[Finding]:
    """The kernels of the step, each on small inputs beside its formula: what `jaxllm.doctor` shows."""
    with session.jax("self_check", quick=session.quick) as jax:
        checked = jax.facts
    findings = []
    for precision, facts in checked.items():
        for kernel, error in facts["largest"].items():
            failure, goal = facts["failures"].get(kernel), at_most(facts["limit"])
            what, limit = f"{kernel}, {precision}", f"limit {goal.limit:.0e}"
            if failure is None:
                found = Finding(what, f"error {error:.1e}", limit, None, goal, error, details={"error": error})
            else:
                found = Finding(what, f"FAILED: {failure}", limit, details={"failure": failure})
            findings.append(found)
    return findings


def ceilings(session: Session) -> list[Finding]:
    """A large matrix product, and reading and writing memory; later rows are compared with them."""
    with session.jax("ceilings", quick=session.quick) as jax:
        runs = interleave(contenders_of(card=jax), session.rounds)
    rates = {name: amount / seconds(runs[f"card {name}"]).median for name, amount in jax.facts["work"].items()}
    product = f"bfloat16 product of {jax.facts['side']:,}³, random numbers"
    whats = {"product": product, "copy": "reading and writing an array", "sum": "reading an array"}
    findings = []
    for name, what in whats.items():
        rate, unit, sheet = rates[name] / 1e9, "GB/s", session.target and session.target.memory_gb_per_s
        if name == "product":
            rate, unit, sheet = rate / 1e3, "TFLOP/s", session.target and session.target.peak_tflops["bfloat16"]
        beside = (f"data sheet {sheet:,.4g}", rate / sheet) if sheet else (session.no_sheet, None)
        figure = "flops_per_second" if name == "product" else "bytes_per_second"
        findings.append(Finding(what, f"{rate:,.4g} {unit}", *beside, details={figure: rates[name]}))
    session.flops_per_second, session.bytes_per_second = rates["product"], max(rates["copy"], rates["sum"])
    return findings


def step(session: Session, remat: bool) -> list[Finding]:
    """Our step, and its plan."""
    config, size = gpu_config(session.quick, remat), "gpu, remat" if remat else "gpu"
    with session.jax("steps", size=size, quick=session.quick, precisions=["bfloat16"], described=True) as jax:
        runs, facts = [jax.go("bfloat16") for _ in range(1 + session.rounds)][1:], jax.facts  # the first warms it up
    spread, peak, first = seconds(runs), runs[-1].figures["peak"], facts["first_loss"]
    plan, tokens, taken = session.plans.get(remat), config.tokens_per_step, spread.median
    times = {"seconds": spread._asdict(), "first_loss": first}
    expected = plan and plan["seconds"]["step_expected"]
    findings = [_beside_plan("step", taken, expected, _speed(tokens), times)]
    if session.flops_per_second is not None:
        mfu = {}
        for name in ("full", "causal"):
            flops = tokens * training_flops_per_token(config.model, config.data.seq_len, name)
            mfu[name] = flops / taken / session.flops_per_second
        reference = session.no_sheet
        if session.target is not None:
            share = session.flops_per_second / (session.target.peak_tflops["bfloat16"] * 1e12)
            reference = f"of the data sheet's {share * mfu['full']:.3f}, {share * mfu['causal']:.3f}"
        if plan:
            reference += f"; plan {plan['mfu_expected']['full']:.3f}, {plan['mfu_expected']['causal']:.3f}"
        what = "MFU of the measured product peak"
        findings.append(Finding(what, _mfu(mfu), reference, target=at_least(0.5), judged=mfu["full"], details=mfu))
    expected = plan and plan["memory"]["peak"]
    findings.append(_beside_plan("device memory at its peak", peak, expected, _gib, {"bytes": peak}))
    what, compiled = "kernels that multiply, of the compiled program", f"compiled in {facts['compile_seconds']:.0f} s"
    kernels = {"kernels": facts["kernels"], "memory": facts["memory"]}
    reference = f"{facts['chosen']}; {compiled}"
    findings.append(Finding(what, kernel_names(facts["kernels"]), reference, details=kernels))
    session.first_loss, session.step_seconds[remat] = first, taken  # last: nothing is compared with a step that failed
    return findings


def yardstick(session: Session, function: str, what: str, **options: Any) -> list[Finding]:
    """PyTorch's step, and ours; `function`: of `torch_side`, with these options."""
    config = gpu_config(session.quick)
    fixed = {"size": "gpu", "quick": session.quick, "precisions": ["bfloat16"], "on_gpu": not session.quick}
    with session.torch(function, **fixed, **options) as torch:
        runs, facts = [torch.go(torch.contenders[0]) for _ in range(1 + session.rounds)][1:], torch.facts
    loss, ours = facts["first_loss"], session.first_loss
    if ours is not None and abs(loss - ours) > SAME_START * abs(ours):
        raise Failure(f"the two sides did not compute the same: first losses {ours:.4f} and {loss:.4f}")
    spread, micro, peak = seconds(runs), facts["micro_batches"], runs[-1].figures["peak"]
    show, best = _speed(config.tokens_per_step), min(session.step_seconds.values(), default=None)
    measured = f"{show(spread.median)}{f', {micro} micro-batches' if micro > 1 else ''}, {peak / GIB:.1f} GiB"
    reference, ratio = (f"ours {show(best)}", spread.median / best) if best else ("ours was not measured", None)
    details = {"seconds": spread._asdict(), "first_loss": loss, "micro_batches": micro, "bytes": peak}
    what = f"{what}, bfloat16 autocast, fused AdamW"
    return [Finding(what, measured, reference, ratio, at_least(1.3), details=details)]


def default_run(session: Session) -> list[Finding]:
    """`python train.py`, from its start to its end."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        options = narrow_options(Path(scratch)) if session.quick else []
        started = time.perf_counter()
        session.command("train.py", "--run-dir", str(run), *options)
        taken = time.perf_counter() - started
        last, config = last_evaluation(run), read_json(run / CONFIG_FILE)
    if last is None:
        raise Failure("the run was not evaluated")
    what = f"{config['preset']}, {last['step']} steps, {config['precision']}"
    measured = f"{taken:,.1f} s, start, compilation and samples included"
    learned = f"evaluation loss {last['eval_loss']:.4f}, {last['eval_bits_per_byte']:.4f} bits per byte"
    details = {"seconds": taken, "eval_loss": last["eval_loss"], "steps": last["step"]}
    return [Finding(what, measured, learned, details=details)]


def _beside_plan(what: str, measured: float, planned: float | None, show: Show, details: dict[str, Any]) -> Finding:
    """The target is about the distance: 0.8 of the plan is as far from it as 1.25."""
    if planned is None:
        return Finding(what, show(measured), "no plan", details=details)
    ratio = measured / planned
    distance = max(ratio, 1 / ratio)
    return Finding(what, show(measured), f"plan {show(planned)}", ratio, at_most(1.15), distance, details=details)


def _speed(tokens: int) -> Show:
    return lambda taken: f"{tokens / taken:,.0f} tokens/s ({1e3 * taken:,.1f} ms)"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"


def _mfu(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.3f} {attention}" for attention, share in shares.items())
