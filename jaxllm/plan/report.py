"""Print a plan as a table, or convert it to JSON."""

import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxllm.plan.estimate import Plan, Refused
from jaxllm.plan.hlo_cost import Product
from jaxllm.plan.roofline import ACHIEVED_FLOPS, ACHIEVED_INTERCONNECT, ACHIEVED_MEMORY
from jaxllm.run.throughput import GIB

DEFAULT_MEMORY = 0.75
"""The share of a GPU's memory that JAX allocates if XLA_PYTHON_CLIENT_MEM_FRACTION is not set."""

WIDTH = 150
"""Columns of output that does not go to a terminal."""

PART_NAMES = {
    "arguments": "arguments: state and batch",
    "temporaries": "temporaries",
    "outputs": "outputs not in an argument's place",
    "program": "program",
}


def kernel_totals(products: Iterable[Product]) -> dict[str, dict[str, float]]:
    """Calls and FLOPs of the kernels that multiply matrices, by kernel; the largest first."""
    found = _totals("flops", ((product.kernel, product.calls, product.flops) for product in products))
    return dict(sorted(found.items(), key=lambda item: -item[1]["flops"]))


def collective_totals(plan: Plan) -> dict[str, dict[str, float]]:
    """Calls of the collectives, and bytes that each device sends in them, by kind."""
    return _totals("bytes", plan.collectives)


def _totals(amount: str, rows: Iterable[tuple[str, int, float]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"calls": 0, amount: 0.0})
    for name, calls, size in rows:
        found[name]["calls"] += calls
        found[name][amount] += size
    return dict(found)


def print_plan(plan: Plan | Refused, tokens: int, run: str) -> None:
    """Print a table of the plan, then its assumptions."""
    config = plan.config
    remat = ", remat" if config.remat else ""
    micro = f"{config.data.grad_accum} x " if config.data.grad_accum > 1 else ""
    step = f"{config.preset}, {micro}{config.data.batch_size} x {config.data.seq_len} tokens, {config.precision}{remat}"
    if lora := config.adapters:
        step += f", LoRA of rank {lora.rank} on weights in {lora.base_dtype}"
    step += ", separate documents" if config.data.documents == "separate" else ""
    mesh = f", mesh {config.mesh.axes}" if plan.devices > 1 else ""
    print(f"{step} on {plan.devices} x {plan.target.name}{mesh}; all figures of one device")
    if isinstance(plan, Refused):
        print(f"does not fit: {plan.message}")
        return
    print(
        f"compiled in {plan.compile_seconds:.0f} s by JAX {plan.jax} for a device that you do not have; nothing has run"
    )
    table = Table()
    for column in ("", "what", "amount", ""):
        table.add_column(column, justify="right" if column == "amount" else "left", no_wrap=column != "")

    def section(name: str, rows: Iterable[tuple[str, str, str]]) -> None:
        for number, row in enumerate(rows):
            table.add_row("" if number else name, *row)
        table.add_section()

    verdict = "[green]fits[/]" if plan.fits else "[bold red]does not fit[/]"
    usable = f"{verdict}: {plan.usable / GIB:.1f} GiB of {plan.target.memory_gib:g} are usable"
    section("memory", [
        *((PART_NAMES[part], f"{size / GIB:.2f} GiB", "") for part, size in plan.memory.items()),
        ("peak", f"{plan.peak / GIB:.2f} GiB", usable),
    ])  # fmt: skip
    section("kernels", _kernel_rows(plan))
    section("FLOPs", _flops_rows(plan))
    section("collectives", _collective_rows(plan))
    section("time", _time_rows(plan))
    section("run", [(run, _duration(tokens, plan), "at best, and expected")])
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    for line in assumptions(plan):
        print(line)


def _kernel_rows(plan: Plan) -> Iterable[tuple[str, str, str]]:
    for kernel, total in kernel_totals(plan.products).items():
        yield kernel, f"{total['flops'] / 1e12:.3g} TFLOP", f"{total['calls']} calls"
    if not any(product.kind == "attention" for product in plan.products):
        yield "no fused attention", "", "blocks of queries, among the products"


def _flops_rows(plan: Plan) -> Iterable[tuple[str, str, str]]:
    full, causal = plan.model_flops("full"), plan.model_flops("causal")
    yield "model, attention full", f"{full / 1e12:.4g} TFLOP", ""
    yield "model, attention causal", f"{causal / 1e12:.4g} TFLOP", ""
    note = f"{plan.program_flops * plan.devices / causal:.2f} of the model's causal"
    if plan.unknown_loops:
        note = f"without {plan.unknown_loops} loops of unknown length"
    yield "compiled program", f"{plan.program_flops / 1e12:.4g} TFLOP", note


def _collective_rows(plan: Plan) -> Iterable[tuple[str, str, str]]:
    found = collective_totals(plan)
    for kind, total in found.items():
        yield kind, f"{total['bytes'] / 1e9:.3g} GB", f"{total['calls']} calls, sent by each device"
    if not found:
        yield "none", "0 GB", "one device" if plan.devices == 1 else ""


def _time_rows(plan: Plan) -> Iterable[tuple[str, str, str]]:
    roofline = plan.roofline
    for name, seconds in roofline.bounds.items():
        touched = f"{plan.touched / 1e9:.4g} GB read and written" if name == "memory" else ""
        note = [touched, "bounds the step" if name == roofline.bound_by else ""]
        yield name, f"{1e3 * seconds:.1f} ms", "; ".join(filter(None, note))
    for name, seconds in (("step, at best", roofline.at_best), ("step, expected", roofline.expected)):
        yield name, f"{1e3 * seconds:.1f} ms", _speed(plan, seconds)


def _speed(plan: Plan, seconds: float) -> str:
    full, causal = plan.mfu(seconds, "full"), plan.mfu(seconds, "causal")
    speed = plan.config.tokens_per_step / seconds
    return f"{speed:,.0f} tokens/s, MFU {full:.3f} (attention full), {causal:.3f} (causal)"


def run_seconds(plan: Plan, tokens: int) -> tuple[float, float]:
    """Of a run of so many tokens: at best, and expected."""
    steps = tokens / plan.config.tokens_per_step
    return steps * plan.roofline.at_best, steps * plan.roofline.expected


def _duration(tokens: int, plan: Plan) -> str:
    best, expected = run_seconds(plan, tokens)
    units = {"days": 86400, "h": 3600, "min": 60, "s": 1}
    unit, seconds = next(((unit, seconds) for unit, seconds in units.items() if expected > seconds), ("s", 1))
    return f"{best / seconds:.3g} - {expected / seconds:.3g} {unit}"


def assumptions(plan: Plan) -> list[str]:
    """The assumptions of a plan, as lines of text."""
    target, peak = plan.target, plan.target.peak_tflops[plan.config.decided_precision]
    text = (
        f"Assumed, not measured: products reach {ACHIEVED_FLOPS['dot']} (dense), {ACHIEVED_FLOPS['grouped']} (grouped) "
        f"and {ACHIEVED_FLOPS['attention']} (attention) of {peak:g} TFLOP/s, memory {ACHIEVED_MEMORY} of "
        f"{target.memory_gb_per_s:,g} GB/s, collectives {ACHIEVED_INTERCONNECT} of {target.interconnect_gb_per_s:g} "
        "GB/s; a kernel touches its operands and results once, a token once for each of its rows; the grouped products "
        "have as many tiles as at worst"
        f"{', and of them those of an even routing multiply' if plan.config.mesh.sizes.get('expert', 1) > 1 else ''}.",
        "At best: compute, memory and collectives overlap, and the slowest one counts. Expected: kernel after kernel, "
        "each bound by its own products or memory, and no collective hidden. Data, evaluation and saving cost nothing.",
    )
    if target.platform == "cuda":
        enough = "would do too" if plan.peak <= DEFAULT_MEMORY * target.memory_gib * GIB else "is too little"
        text += (
            f"Usable: with XLA_PYTHON_CLIENT_MEM_FRACTION={plan.usable / GIB / target.memory_gib:.2f}; JAX's "
            f"default of {DEFAULT_MEMORY} {enough}. On the device XLA autotunes: it may choose cuBLAS in place of "
            "Triton, and it sorts with CUB, unlike here.",
        )
    if plan.unknown_loops:
        text += (
            f"{plan.unknown_loops} loops have a length that only the routing knows and are left out: the memory time "
            "is too short; the compute time is that of the model's FLOPs.",
        )
    return [line for paragraph in text for line in textwrap.wrap(paragraph, WIDTH)]


def print_search(found: list[tuple[Plan | Refused, bool]], tokens: int, run: str) -> None:
    """The largest batch size of each mesh, with and without recomputation."""
    first = found[0][0]
    config, device = first.config, f"{first.devices} x {first.target.name}"
    print(f"{config.preset}, sequence {config.data.seq_len}, {config.precision} on {device}: the largest batch size")
    table = Table()
    for column in ("mesh", "remat", "batch size", "peak", "step, expected", "tokens/s", "MFU causal", run):
        table.add_column(column, justify="left" if column in ("mesh", "remat") else "right")
    for plan, exact in found:
        how = (plan.config.mesh.axes or "one device", "on" if plan.config.remat else "off")
        if isinstance(plan, Refused) or not plan.fits:
            peak = "" if isinstance(plan, Refused) else f"{plan.peak / GIB:.1f} GiB"
            table.add_row(*how, "none", f"{peak} at {plan.config.data.batch_size}", "", "", "", "")
            continue
        seconds = plan.roofline.expected
        table.add_row(
            *how,
            f"{plan.config.data.batch_size}" if exact else f">= {plan.config.data.batch_size}",
            f"{plan.peak / GIB:.1f} of {plan.usable / GIB:.1f} GiB",
            f"{1e3 * seconds:.1f} ms",
            f"{plan.config.tokens_per_step / seconds:,.0f}",
            f"{plan.mfu(seconds, 'causal'):.3f}",
            _duration(tokens, plan),
        )
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
    for line in next((assumptions(plan) for plan, _ in found if isinstance(plan, Plan)), []):
        print(line)


def plan_as_json(plan: Plan | Refused, tokens: int) -> dict[str, Any]:
    """The answer for a program: bytes, FLOPs and seconds."""
    config = plan.config.to_dict()
    names = ["preset", "batch_size", "seq_len", "grad_accum", "documents", "precision", "remat", "mesh", "model"]
    names += [name for name in config if name.startswith("lora_")] if plan.config.adapters else []
    answer = {name: config[name] for name in names} | {"fits": plan.fits}
    if isinstance(plan, Refused):
        return answer | {"message": plan.message}
    roofline, tokens_per_step = plan.roofline, plan.config.tokens_per_step
    best, expected = run_seconds(plan, tokens)
    return answer | {
        "target": {name: value for name, value in asdict(plan.target).items() if name != "config"},
        "devices": plan.devices,
        "memory": plan.memory | {"peak": plan.peak, "usable": round(plan.usable)},
        "kernels": kernel_totals(plan.products),
        "flops": {
            "model_full": plan.model_flops("full"),
            "model_causal": plan.model_flops("causal"),
            "program": plan.program_flops,
            "unknown_loops": plan.unknown_loops,
        },
        "collectives": collective_totals(plan),
        "seconds": {
            **roofline.bounds,
            "bound_by": roofline.bound_by,
            "step_at_best": roofline.at_best,
            "step_expected": roofline.expected,
        },
        "bytes_touched": plan.touched,
        "tokens_per_second": {
            "at_most": tokens_per_step / roofline.at_best,
            "expected": tokens_per_step / roofline.expected,
        },
        "mfu_expected": {name: plan.mfu(roofline.expected, name) for name in ("full", "causal")},
        "run": {"tokens": tokens, "seconds_at_best": best, "seconds_expected": expected},
        "assumptions": assumptions(plan),
        "compile_seconds": plan.compile_seconds,
        "jax": plan.jax,
    }
