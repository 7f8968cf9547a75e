"""Rows for the full training step, against `torch_ref`, transformers, and the hardware's peak."""

from collections.abc import Sequence
from typing import Any

from benchmarks.finding import Finding, at_least, compare
from benchmarks.session import Session
from benchmarks.sizes import PRECISIONS, STEPS
from benchmarks.timing import Runs, fastest, interleave, ready, seconds
from benchmarks.worker import Failure, Worker
from jaxllm.model.flops import training_flops_per_token

SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}  # above this relative difference, the sides did not compute the same


def fastest_steps(rounds: int, untimed: int, **workers: Worker) -> tuple[Runs, list[str]]:
    """Steps in turns, each directly after `untimed` others, as in training; and of each worker its fastest one."""
    with ready(**workers) as contenders:
        runs = interleave(contenders, rounds, untimed=untimed)
    return runs, [fastest(runs, [name for name in runs if name.startswith(f"{side} ")]) for side in workers]


def step(
    session: Session,
    yardstick: str,
    limit: float,
    size: str = "six layers",
    ours: Sequence[str] = PRECISIONS,
    theirs: Sequence[str] = PRECISIONS,
    **options: Any,
) -> list[Finding]:
    """Tokens per second of a size of `STEPS`, in the fastest form of each side.

    `yardstick` is a function of `torch_side`, with `options`; `reference_steps` have the weights of our side.
    """
    jax = session.jax("steps", size=size, quick=session.quick, precisions=ours)
    torch = session.torch(yardstick, size=size, quick=session.quick, precisions=theirs, **options)
    runs, best = fastest_steps(session.rounds, min(1, session.rounds - 1), ours=jax, yardstick=torch)
    losses = {name: side[-1].figures["loss"] for name, side in runs.items()}
    if yardstick == "reference_steps":
        mine, other = (losses[f"{side} {theirs[0]}"] for side in ("ours", "yardstick"))
        if abs(mine - other) > SAME_LOSS[theirs[0]] * abs(other):
            raise Failure(f"the two sides did not compute the same: losses {mine:.6f} and {other:.6f} in {theirs[0]}")
    tokens = STEPS[size](session.quick).tokens_per_step
    sizes = {"ours": jax.facts["sizes"], "yardstick": torch.facts["sizes"]}
    show, details = "{rate:,.0f} tokens/s {form}", {"losses": losses, "sizes": sizes}
    return [compare("step", runs, *best, at_least(limit), show, work=tokens, **details)]


def against_peak(session: Session) -> list[Finding]:
    """Model FLOP/s of the step over the FLOP/s of the fastest square product in the same precision, measured in turn.

    In float32 that is XLA's product, and in bfloat16 PyTorch's: the faster of the two on the CPUs measured.
    """
    config = STEPS["six layers"](session.quick)
    flops = config.tokens_per_step * training_flops_per_token(config.model, config.data.seq_len, "causal")
    ours = session.jax("steps", size="six layers", quick=session.quick, precisions=PRECISIONS)
    products = {"XLA's": session.jax("products", quick=session.quick)}
    products["PyTorch's"] = session.torch("products", quick=session.quick)
    runs, _ = fastest_steps(session.rounds, min(1, session.rounds - 1), step=ours, **products)
    findings = []
    for precision, whose, limit in (("float32", "XLA's", 0.75), ("bfloat16", "PyTorch's", 0.6)):
        step = f"step {precision}"
        work = {step: flops} | {name: 2 * int(name.split()[-1]) ** 3 for name in runs if name.startswith(whose)}
        a_flop = {name: [run.per(amount) for run in runs[name]] for name, amount in work.items()}
        best = fastest(a_flop, [name for name in work if name != step])
        show = ("{rate:,.0f} GFLOP/s", "{rate:,.0f} GFLOP/s ({name})")
        gflops = {name: 1e-9 / seconds(side).median for name, side in a_flop.items()}
        details = {"flops_per_step": flops, "gflops": gflops}
        findings.append(compare(precision, a_flop, step, best, at_least(limit), *show, work=1e-9, **details))
    return findings
