"""Rows for the full training step, against eager and compiled `torch_ref`, transformers, and the hardware's peak."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.finding import Finding, Target, at_least
from benchmarks.sizes import learner_config, train_config
from benchmarks.timing import Runs, Spread, cpu_ratio, fastest, interleave, other_load, ratio, seconds
from benchmarks.worker import Failure, Run, Worker
from jaxllm.model.flops import training_flops_per_token

SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
"""The largest relative difference of the two sides' losses; above it, they did not compute the same."""

BOTH = ("float32", "bfloat16")


def against_eager(quick: bool, rounds: int) -> list[Finding]:
    with _sides(quick, "train_steps") as (jax, torch):
        runs = _interleave(jax, torch, ["float32"], ["float32"], rounds)
    _check_same_loss(runs, "float32")
    return [_compare("step", runs, ["float32"], ["float32"], at_least(1.45), train_config(quick).tokens_per_step)]


def against_compiled(quick: bool, rounds: int) -> list[Finding]:
    with _sides(quick, "train_steps", compiled=True) as (jax, torch):
        runs = _interleave(jax, torch, ["float32"], ["float32"], rounds)
    _check_same_loss(runs, "float32")
    return [_compare("step", runs, ["float32"], ["float32"], at_least(1.25), train_config(quick).tokens_per_step)]


def against_autocast(quick: bool, rounds: int) -> list[Finding]:
    with _sides(quick, "train_steps") as (jax, torch):
        runs = _interleave(jax, torch, BOTH, ["bfloat16"], rounds)
    _check_same_loss(runs, "bfloat16")
    return [_compare("step", runs, BOTH, ["bfloat16"], at_least(1.25), train_config(quick).tokens_per_step)]


def against_transformers(quick: bool, rounds: int) -> list[Finding]:
    with _sides(quick, "deepseek_steps") as (jax, torch):
        theirs = torch.contenders
        runs = _interleave(jax, torch, BOTH, theirs, rounds)
        sizes = {"ours": jax.facts, "yardstick": torch.facts}
    finding = _compare("step", runs, BOTH, theirs, at_least(1.4), train_config(quick).tokens_per_step)
    finding.details["sizes"] = sizes
    return [finding]


def tiny_against_transformers(quick: bool, rounds: int) -> list[Finding]:
    """The step of the default run's size, with AdamW, as in the learning curves."""
    ours = Worker("benchmarks.jax_learner:learner_steps", quick=quick)
    theirs = Worker("benchmarks.torch_learner:learner_steps", quick=quick)
    with ours as jax, theirs as torch:
        runs = _interleave(jax, torch, [f"adamw {p}" for p in BOTH], torch.contenders, rounds)
        sizes = {"ours": jax.facts, "yardstick": torch.facts}
    tokens = learner_config("adamw", quick).tokens_per_step
    finding = _compare("step", runs, [f"adamw {p}" for p in BOTH], torch.contenders, at_least(1.6), tokens)
    finding.details["sizes"] = sizes
    return [finding]


def against_peak(quick: bool, rounds: int) -> list[Finding]:
    """Model FLOP/s of the step over the FLOP/s of the fastest square product in the same precision, measured in turn.

    In float32 that is XLA's product, and in bfloat16 PyTorch's: the faster of the two on the CPUs measured.
    """
    config = train_config(quick)
    step = config.tokens_per_step * training_flops_per_token(config.model, config.data.seq_len, "causal")
    ours = Worker("benchmarks.jax_side:train_steps", quick=quick, peak=True)
    theirs = Worker("benchmarks.torch_side:matrix_products", quick=quick)
    with ours as jax, theirs as torch:
        contenders = {name: functools.partial(side.go, name) for side in (jax, torch) for name in side.contenders}
        runs = interleave(contenders, rounds, untimed=1 if rounds > 1 else 0)
        products = [name for name in jax.contenders if name not in BOTH]
        return [
            _share_of_peak(runs, "float32", step, products, at_least(0.75)),
            _share_of_peak(runs, "bfloat16", step, torch.contenders, at_least(0.6)),
        ]


def _share_of_peak(runs: Runs, precision: str, step: float, products: Sequence[str], target: Target) -> Finding:
    """`step`: the FLOPs of one step; `products`: the runs of square products, whose names end with their size."""

    def rate(name: str, run: Run) -> float:
        return (2 * int(name.split()[-1]) ** 3 if name in products else step) / run.seconds

    medians = {name: Spread.of([rate(name, run) for run in runs[name]]) for name in (precision, *products)}
    best = max(products, key=lambda name: medians[name].median)
    pairs = zip(runs[precision], runs[best], strict=True)
    return Finding(
        what=precision,
        ours=f"{medians[precision].median / 1e9:,.0f} GFLOP/s",
        yardstick=f"{medians[best].median / 1e9:,.0f} GFLOP/s ({best})",
        value=Spread.of([rate(precision, made) / rate(best, product) for made, product in pairs]),
        target=target,
        other_load=other_load({name: runs[name] for name in medians}),
        details={"flops_per_step": step, "gflops": {name: spread.median / 1e9 for name, spread in medians.items()}},
    )


@contextmanager
def _sides(quick: bool, yardstick: str, **arguments) -> Iterator[tuple[Worker, Worker]]:
    """Both workers; they prepare in parallel."""
    ours = Worker("benchmarks.jax_side:train_steps", quick=quick)
    theirs = Worker(f"benchmarks.torch_side:{yardstick}", quick=quick, **arguments)
    with ours, theirs:
        yield ours, theirs


def _interleave(jax: Worker, torch: Worker, ours: Sequence[str], theirs: Sequence[str], rounds: int) -> Runs:
    contenders = {f"ours {p}": functools.partial(jax.go, p) for p in ours}
    contenders |= {f"yardstick {p}": functools.partial(torch.go, p) for p in theirs}
    # as in training, each timed step directly follows another step
    return interleave(contenders, rounds, untimed=1 if rounds > 1 else 0)


def _compare(what: str, runs: Runs, ours: Sequence[str], theirs: Sequence[str], target: Target, tokens: int) -> Finding:
    """Compare tokens per second, of steps of `tokens`, in the fastest precision of each side."""
    best, yardstick = fastest(runs, [f"ours {p}" for p in ours]), fastest(runs, [f"yardstick {p}" for p in theirs])
    return Finding(
        what=what,
        ours=_speed(best, runs, tokens),
        yardstick=_speed(yardstick, runs, tokens),
        value=ratio(runs[yardstick], runs[best]),
        target=target,
        other_load=other_load(runs),
        details={
            "cpu_ratio": cpu_ratio(runs[yardstick], runs[best]),
            "seconds": {name: seconds(side)._asdict() for name, side in runs.items()},
            "losses": {name: side[-1].figures["loss"] for name, side in runs.items()},
        },
    )


def _speed(name: str, runs: Runs, tokens: int) -> str:
    return f"{tokens / seconds(runs[name]).median:,.0f} tokens/s {name.partition(' ')[2]}"


def _check_same_loss(runs: Runs, precision: str) -> None:
    ours, theirs = (runs[f"{side} {precision}"][-1].figures["loss"] for side in ("ours", "yardstick"))
    if abs(ours - theirs) > SAME_LOSS[precision] * abs(theirs):
        raise Failure(f"the two sides did not compute the same: losses {ours:.6f} and {theirs:.6f} in {precision}")
